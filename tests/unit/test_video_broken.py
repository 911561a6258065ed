"""Broken files: one VideoError, never wrong frames in silence, never a hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.shared import needs_shared, shared
from tests.videos import damage, number_of, overwrite, write_sound, write_video
from xclip_lab import video
from xclip_lab.errors import VideoError

needs_decord = pytest.mark.skipif(video.decord is None, reason="decord is not installed")
WATCHDOG = 120  # seconds after which a decoder counts as hanging
READ_ALL = """
import json, sys
from tests.videos import number_of
from xclip_lab import video
from xclip_lab.errors import VideoError
for path in sys.argv[1:]:
    try:
        frames, timestamps = video.read_frames(path)
        found = {"count": len(frames), "numbers": [number_of(frame) for frame in frames]}
        found["timestamps"], found["shape"] = timestamps.tolist(), frames.shape[1:3]
    except VideoError as error:
        found = {"error": str(error)}
    print(json.dumps(found))
"""


def read_guarded(paths):
    """What each file gives, read in a process of its own that a hang or a crash cannot take along."""
    command = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WATCHDOG, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the decoders keep quiet; the error speaks
    return [json.loads(line) for line in done.stdout.splitlines()]


def refusal(path):
    with pytest.raises(VideoError) as caught:
        video.read_frames(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_what_is_no_video(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.mp4")
    assert "a folder without a frame" in refusal(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "0 bytes" in refusal(tmp_path / "empty.mp4")
    for name in ("words.mp4", "words.txt", "words"):
        (tmp_path / name).write_text("these are words\n" * 100)
        assert "PyAV" in refusal(tmp_path / name)
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
        assert "not a video" in refusal(tmp_path / name)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/a.ts\n")
    refusal(tmp_path / "list.m3u8")
    assert "no video stream" in refusal(write_sound(tmp_path / "sound.mp4"))


def test_what_is_no_file_never_hangs(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "endless.mp4").symlink_to("/dev/zero")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "folder.mp4" / "1.jpg")
    for found in read_guarded(sorted(tmp_path.iterdir())):
        assert found["error"].startswith(str(tmp_path))


def test_an_encrypted_file_is_told(tmp_path):
    path = write_video(tmp_path / "a.mp4", 20)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"encv"))
    assert "no decoder for its codec" in refusal(path)


@needs_decord
def test_decord_seeks_only_where_times_rise(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "10", "bf": "2"})
    overwrite(path, b"ctts", 4, b"\0\0\0\7")
    (frames, _), decoder = video.read_frames_and_decoder(path)
    assert decoder == "pyav"
    np.testing.assert_array_equal(video.read_frames(path, [59, 30]).frames, frames[[59, 30]])


CUT = [
    ("a.mp4", "libx264", {"movflags": "faststart"}),
    ("b.mp4", "libx264", {"movflags": "frag_every_frame+empty_moov"}),
    ("a.mkv", "libx264", {}),
    ("a.webm", "libvpx-vp9", {}),
    ("a.avi", "libx264", {}),
    ("a.ts", "libx264", {}),
    ("a.flv", "libx264", {}),
    ("a.gif", "gif", {}),
    ("a.wmv", "wmv2", {}),
]


@pytest.mark.parametrize(("name", "codec", "container"), CUT)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.85])
def test_cut_off(tmp_path, name, codec, container, share):
    path = write_video(tmp_path / name, 75, codec=codec, container=container)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refusal(path)


def test_a_transport_stream_is_cut_by_the_length_of_its_own_packets(tmp_path):
    """188 bytes each: a length that happens to be one of 192s or 204s is no excuse."""
    path = write_video(tmp_path / "a.ts", 75)
    data = path.read_bytes()
    for length in (192, 204):
        path.write_bytes(data[: length * 20])
        assert "cut off: it does not end as its format does" in refusal(path)
    path.write_bytes(b"".join(b"time" + data[place : place + 188] for place in range(0, len(data), 188)))
    assert video.probe(path).frame_count == 75  # as cameras write it


class Pipe:
    """Of what is written to it nothing can be changed later."""

    def __init__(self):
        self.write = (data := bytearray()).extend
        self.data = data


@pytest.mark.parametrize("of_header", [60, 100, -10])
def test_asf_with_a_long_header(tmp_path, of_header):
    """What says how it was recorded may lie across the end of what is read of the header, or behind it."""
    path = write_video(tmp_path / "a.wmv", 20, codec="wmv2")
    data = bytearray(path.read_bytes())
    properties = data.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    padding = bytes.fromhex("74d40618dfca0945a4ba9aabcb96aae8")
    length = (1 << 16) - of_header - properties
    data[properties:properties] = (padding + length.to_bytes(8, "little")).ljust(length, b"\0")
    data[16:24] = (int.from_bytes(data[16:24], "little") + length).to_bytes(8, "little")
    data[24] += 1  # objects in the header
    path.write_bytes(data)
    assert video.probe(path).frame_count == 20


def test_asf_recorded_live_knows_no_length(tmp_path):
    source, pipe, path = write_video(tmp_path / "a.wmv", 20, codec="wmv2"), Pipe(), tmp_path / "live.wmv"
    with av.open(str(source)) as whole, av.open(pipe, "w", format="asf") as live:
        stream = whole.streams.video[0]
        copy = live.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.size:
                packet.stream = copy
                live.mux(packet)
    place = pipe.data.index(bytes.fromhex("3626b275")) + 16
    for length in (50, 10**6):  # of its data: what a recorder makes up
        pipe.data[place : place + 8] = length.to_bytes(8, "little")
        path.write_bytes(pipe.data)
        assert video.probe(path).frame_count == 20


MATROSKA = [
    ("a.mkv", "libx264", {}),
    ("a.mkv", "mpeg4", {"write_crc32": "0", "cues_to_front": "1"}),
    ("a.mkv", "libx264", {"live": "1"}),
    ("a.webm", "libvpx-vp9", {"cluster_size_limit": "600"}),
    ("a.webm", "libvpx", {"live": "1", "cluster_time_limit": "300"}),
]


@pytest.mark.parametrize(("name", "codec", "container"), MATROSKA)
def test_a_hole_in_matroska(tmp_path, name, codec, container):
    """FFmpeg goes on behind it with the next cluster, without a word of what is missing."""
    path = write_video(tmp_path / name, 60, codec=codec, container=container, options={"g": "10"})
    assert video.probe(path).frame_count == 60
    data, rng = path.read_bytes(), np.random.default_rng(0)
    first = data.index(b"\x1f\x43\xb6\x75")  # of the clusters
    for trial in range(30):
        place = int(rng.integers(first, len(data) - 1100))
        hole = (bytes(1000), rng.bytes(1000), b"")[trial % 3]
        path.write_bytes(data[:place] + hole + data[place + 1000 :])
        assert "damaged or cut off" in refusal(path)


def test_matroska_without_a_checksum_or_with_a_wrong_one(tmp_path):
    path = write_video(tmp_path / "a.mkv", 20)
    data = bytearray(path.read_bytes())
    place = data.index(b"\xa3", data.index(b"\x1f\x43\xb6\x75")) + 100  # in the first frame
    data[place] ^= 1
    path.write_bytes(data)
    assert "do not fit their checksum" in refusal(path)
    path = write_video(tmp_path / "b.mkv", 20, container={"write_crc32": "0"})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x81\0\x28\0", b"\x82\0\x28\0"))  # the frame after 40 ms
    assert "belong to no track" in refusal(path)


def test_damage_is_told_and_the_rest_can_be_read(tmp_path):
    path = write_video(tmp_path / "a.mp4", 120, options={"g": "20", "bf": "2"})
    damage(path, 0.42, 0.46)
    assert any(word in refusal(path) for word in ("damaged", "Invalid data"))
    early = video.read_frames(path, [0, 9, 25]).frames
    assert [number_of(frame) for frame in early] == [0, 9, 25]
    late = video.read_frames(path, [110, 119]).frames
    assert [number_of(frame) for frame in late] == [110, 119]


def test_damaged_and_cut_files_never_give_wrong_frames_in_silence(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for name, codec in [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx"), ("a.gif", "gif")]:
        whole = write_video(tmp_path / name, 40, codec=codec).read_bytes()
        for trial in range(8):
            path = tmp_path / f"{trial}_{name}"
            path.write_bytes(whole if trial % 2 else whole[: int(rng.uniform(0.05, 0.95) * len(whole))])
            if trial % 2:
                damage(path, rng.uniform(0.2, 0.5), 1.0, seed=trial, every=300)
            paths.append(path)
    found = read_guarded(paths)
    assert len(found) == len(paths)
    refused = sum("error" in one for one in found)
    assert refused >= 20
    for path, one in zip(paths, found, strict=True):
        if "error" not in one and path.suffix == ".mp4":
            assert one["numbers"] == list(range(40)), path.name


@needs_shared("hostile", "HOSTILE.json")
def test_every_hostile_file_is_read_or_refused():
    table = json.loads(shared("hostile", "HOSTILE.json").read_text())
    paths = [shared("hostile", *name.split("/")) for name in table]
    read = 0
    for (name, known), found in zip(table.items(), read_guarded(paths), strict=True):
        decoders = known["av"]
        whole = decoders.get("decoded") and not decoders.get("err") and decoders.get("rate") != "None"
        if not whole:
            assert str(shared("hostile", *name.split("/"))) in found.get("error", ""), name
            assert "\n" not in found["error"]
            continue
        assert "error" not in found, (name, found)
        assert found["count"] == decoders["decoded"], name
        upright = known["decord"].get("batch", [0, *decoders["shape"]])[1:3]
        assert list(found["shape"]) == upright, name
        steps = np.diff(found["timestamps"])
        assert (steps > 0).all(), name
        info = video.probe(shared("hostile", *name.split("/")))
        assert info.fps == pytest.approx(known["cv2"]["fps"], abs=1e-3), name
        if "vfr" not in name:
            np.testing.assert_allclose(steps, 1 / info.fps, atol=2e-3)
        read += 1
    assert read > 15
