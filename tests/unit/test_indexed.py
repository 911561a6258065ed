"""The fast way gives, to the last bit, what the others give, and leaves alone what it cannot vouch for."""

import dataclasses

import av
import numpy as np
import pytest

from tests.shared import needs_shared, shared
from tests.videos import damage, number_of, overwrite, trim, turn, write_video
from xclip_lab import indexed, video
from xclip_lab.errors import VideoError

FRAMES, GROUP = 60, 12
VFR = [*range(30), *range(30, 30 + 6 * (FRAMES - 30), 6)]


def textured(count=FRAMES, width=96, height=64):
    """Moving noise, other noise after a cut: residuals, many references, groups of any length."""
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(count):
        if number % 37 == 0:
            scene = rng.integers(0, 200, (2 * height, 2 * width, 3)).astype(np.uint8)
        x, y = (int(size / 2 * (1 + np.sin(number / pace))) for size, pace in ((width, 9), (height, 7)))
        pictures.append(np.ascontiguousarray(scene[y : y + height, x : x + width]))
    return pictures


def other_ways(info, indices):
    """What decord gives, verified, or PyAV."""
    return video.read_frames_and_decoder(info.path, indices, info=dataclasses.replace(info, _packets=None))


def assert_same_frames(path, asked=None):
    """As the other ways give them, and through the index."""
    info = video.probe(path)
    rng = np.random.default_rng(1)
    single = [[int(number)] for number in rng.permutation(info.frame_count)[:6]]
    several = rng.integers(0, info.frame_count, 6).tolist()
    for indices in asked or [list(range(info.frame_count)), several, *single]:
        found, decoder = video.read_frames_and_decoder(path, indices, info=info)
        assert decoder == "indexed", indices
        (expected, times), other = other_ways(info, indices)
        assert other != "indexed"
        np.testing.assert_array_equal(found.frames, expected, str(indices))
        np.testing.assert_array_equal(found.timestamps, times)
    return info


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(
    ("codec", "parameters"),
    [
        ("libx264", "bframes=0"),
        ("libx264", "bframes=3:b-pyramid=none:slices=2"),
        ("libx264", "bframes=3:open-gop=1:b-pyramid=normal"),
        ("libx264", "bframes=5:open-gop=1:b-adapt=2:ref=5:repeat-headers=1"),
        ("libx264", "bframes=3:intra-refresh=1"),
        ("libx264", "bframes=2:keyint=2:open-gop=1"),
        ("libx265", "bframes=4:open-gop=0"),
        ("libx265", "bframes=8:open-gop=1:b-pyramid=1"),
        ("libx265", "bframes=4:open-gop=1:radl=2"),
        ("libx265", "bframes=4:temporal-layers=3:b-adapt=0"),
    ],
)
def test_every_kind_of_group(tmp_path, name, codec, parameters):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    key = codec.removeprefix("lib") + "-params"
    quiet = "log-level=none:" if codec == "libx265" else ""
    keyint = "" if "keyint" in parameters else f":keyint={GROUP}"
    path = write_video(tmp_path / name, textured(), codec=codec, options={key: quiet + parameters + keyint})
    info = assert_same_frames(path)
    assert info._packets.needed.all() == ("bframes=0" in parameters)


def test_a_variable_frame_rate(tmp_path):
    options = {"g": str(GROUP), "bf": "3"}
    assert_same_frames(write_video(tmp_path / "a.mkv", textured(), rate=30, times=VFR, options=options))


@pytest.mark.parametrize(("clockwise", "mirror"), [(90, False), (180, False), (270, False), (90, True)])
def test_a_turned_picture(tmp_path, clockwise, mirror):
    assert_same_frames(turn(write_video(tmp_path / "a.mp4", textured(20)), clockwise, mirror))


@pytest.mark.parametrize("colours", [(1, 1), (1, 5), (2, 1), (2, 9)])
def test_every_range_and_space_of_colours(tmp_path, colours):
    """`colours`: FFmpeg's numbers of them."""
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 102, 50, "yuv420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = colours
        for pixels in textured(20, 102, 50):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    assert_same_frames(tmp_path / "a.mp4")


def test_edit_lists(tmp_path):
    source = write_video(
        tmp_path / "a.mp4", textured(), options={"g": str(GROUP), "bf": "2", "sc_threshold": "0"}
    )
    at_a_key = trim(source, tmp_path / "b.mp4", GROUP / 25)
    assert assert_same_frames(at_a_key).frame_count == FRAMES - GROUP
    within = video.probe(trim(source, tmp_path / "c.mp4", 0.56))
    assert within._packets is None  # frames that are decoded and not shown
    assert within.frame_count == FRAMES - 14


def test_only_what_the_wanted_frames_need_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 48, options={"g": "24", "bf": "3", "sc_threshold": "0"})
    info = video.probe(path)
    packets = info._packets
    decoded = []
    run = indexed._decode_run

    def counted(*given):
        for frame in run(*given):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(indexed, "_decode_run", counted)
    assert [number_of(frame) for frame in video.read_frames(path, [26, 2], info=info).frames] == [26, 2]
    shown = np.sort(packets.pts)
    assert {shown[2], shown[26]} <= set(decoded)
    assert len(decoded) <= 8  # of 48: nothing of the groups' tails
    assert not packets.needed.all()


def test_what_nothing_on_its_level_refers_to_may_serve_a_higher_one(tmp_path, monkeypatch):
    told = [(True, True, 0), (False, False, 0), (False, False, 1), (False, True, 1)]
    headers = iter([indexed._Headers(*one, sets=False) for one in told])
    monkeypatch.setattr(indexed, "_read_h264", lambda units: next(headers))
    info = video.probe(write_video(tmp_path / "a.mp4", 4))
    assert info._packets.needed.tolist() == [True, True, False, True]


def test_damage_ends_as_it_does_without_the_index(tmp_path):
    """As error or as frames; where the headers themselves are damaged there is no index."""
    whole = write_video(tmp_path / "a.mp4", textured(), options={"g": str(GROUP), "bf": "3"})
    expected = video.read_frames(whole).frames
    refused = {"indexed": 0, "other": 0}
    for seed in range(24):
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(whole.read_bytes())
        info = video.probe(damage(path, 0.2, 0.9, seed, every=6000))
        right = {}
        for way, given in (("indexed", info), ("other", dataclasses.replace(info, _packets=None))):
            try:
                right[way] = np.array_equal(video.read_frames(path, info=given).frames, expected)
            except VideoError:
                refused[way] += 1
        assert right.get("indexed") in (True, right.get("other"))
    assert refused["indexed"] >= refused["other"] > 5


def test_what_moved_since_it_was_indexed_is_read_another_way(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40, options={"g": "10", "bf": "2"})
    info = video.probe(path)
    for change in ({"pts": info._packets.pts + 1}, {"size": (64, 96)}, {"starts": np.array([5])}):
        doubtful = dataclasses.replace(info, _packets=info._packets._replace(**change))
        frames, decoder = video.read_frames_and_decoder(path, [3, 35], info=doubtful)
        assert decoder != "indexed"
        assert [number_of(frame) for frame in frames.frames] == [3, 35]


@pytest.mark.parametrize(
    ("name", "codec", "options", "pixels"),
    [
        ("a.mp4", "mpeg4", {}, "yuv420p"),
        ("a.avi", "libx264", {}, "yuv420p"),
        ("a.ts", "libx264", {}, "yuv420p"),
        ("a.mp4", "libx264", {}, "yuv444p"),  # its conversion differs between versions of FFmpeg
        ("a.mp4", "libx264", {"x264-params": "tff=1"}, "yuv420p"),
    ],
)
def test_what_has_no_index(tmp_path, name, codec, options, pixels):
    path = write_video(tmp_path / name, 20, codec=codec, options=options, pixel_format=pixels)
    assert video.probe(path)._packets is None
    assert len(video.read_frames(path).frames) == 20


def test_a_file_whose_frames_share_a_time_has_no_index(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "10", "bf": "2"})
    assert video.probe(overwrite(path, b"ctts", 4, b"\0\0\0\7"))._packets is None


@needs_shared("clips")
@pytest.mark.slow
@pytest.mark.parametrize("folder", ["clips", "hostile"])
def test_the_real_files(folder):
    read = 0
    for path in sorted(
        path for path in shared(folder).rglob("*") if path.is_file() and path.suffix != ".json"
    ):
        try:
            info = video.probe(path)
        except VideoError:
            continue
        if info._packets is not None:
            assert_same_frames(path, [video.frame_indices(info, "uniform", count) for count in (12, 5)])
            read += 1
    assert read > (18 if folder == "clips" else 8)
