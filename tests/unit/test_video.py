"""Real files in, the right frames at the right times out."""

import math
import subprocess
import sys

import av
import numpy as np
import pytest

from tests.shared import ROOT, needs_shared, shared
from tests.videos import damage, number_of, picture, trim, turn, write_video
from xclip_lab import sampling, video
from xclip_lab.clips import load_frames
from xclip_lab.config import load_config
from xclip_lab.datasets import Sample
from xclip_lab.errors import VideoError


def numbers(frames):
    return [number_of(frame) for frame in frames]


def each_decoder(info, indices):
    wanted = np.asarray(indices)
    by_decord = {"decord": video._decode_decord(info, wanted)} if video.decord else {}
    return by_decord | {"PyAV": video._decode_pyav(info, wanted)}


def test_h264_with_b_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40, rate=25, options={"bf": "3"})
    info = video.probe(path)
    assert (info.frame_count, info.width, info.height, info.codec) == (40, 96, 64, "h264")
    assert info.fps == pytest.approx(25)
    assert info.duration == pytest.approx(1.6)
    frames, timestamps = video.read_frames(path)
    assert frames.dtype == np.uint8
    assert frames.shape == (40, 64, 96, 3)
    assert numbers(frames) == list(range(40))
    np.testing.assert_allclose(timestamps, np.arange(40) / 25, atol=1e-6)


@pytest.mark.skipif(video.decord is None, reason="decord is not installed")
def test_both_decoders_give_the_same_pixels(tmp_path):
    info = video.probe(write_video(tmp_path / "a.mp4", 60, options={"g": "12", "bf": "2"}))
    got = each_decoder(info, [50, 3, 3, 17])
    assert numbers(got["decord"]) == [50, 3, 3, 17]
    np.testing.assert_array_equal(got["decord"], got["PyAV"])


@pytest.mark.parametrize(
    ("name", "codec", "decoder"),
    [("a.mp4", "libx264", "indexed"), ("a.mp4", "mpeg4", "decord"), ("a.gif", "gif", "pyav")],
)
def test_the_decoder_is_told(tmp_path, monkeypatch, name, codec, decoder):
    path = write_video(tmp_path / name, 5, codec=codec)
    if video.decord is not None:
        assert video.read_frames_and_decoder(path)[1] == decoder
    monkeypatch.setattr(video, "decord", None)
    without = "pyav" if decoder == "decord" else decoder
    assert video.read_frames_and_decoder(path)[1] == without


def test_without_decord_pyav_reads_everything(tmp_path):
    """In a process in which decord cannot be imported, as on a platform that it is not built for."""
    whole = write_video(tmp_path / "a.mp4", 40, codec="mpeg4", options={"g": "12", "bf": "2"})
    broken = damage(write_video(tmp_path / "b.mp4", 120, options={"g": "20"}), 0.42, 0.46)
    script = """
import sys
sys.modules["decord"] = None
from tests.videos import number_of
from xclip_lab import video
from xclip_lab.errors import VideoError
read, decoder = video.read_frames_and_decoder(sys.argv[1], [31, 7])
print(decoder, [number_of(frame) for frame in read.frames])
try:
    video.read_frames(sys.argv[2])
except VideoError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(whole), str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    first, second = done.stdout.splitlines()
    assert first == "pyav [31, 7]"
    assert second.startswith(f"{broken}: by its index: the frame at tick ")
    assert "; decord: not installed; PyAV: " in second


@pytest.mark.parametrize("group", ["open-gop=0", "open-gop=1"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_seeking_finds_the_frame(tmp_path, name, group):
    options = {"g": "12", "bf": "3", "x264-params": f"{group}:scenecut=0"}
    path = write_video(tmp_path / name, 60, options=options)
    info = video.probe(path)
    for first in (1, 11, 12, 13, 30, 59):
        assert numbers(video.read_frames(path, [first]).frames) == [first]
        found = [index for index, _ in video._pyav_frames(info, np.arange(first, 60))]
        assert found == list(range(found[0], 60))
        assert found[0] <= first
    assert numbers(video.read_frames(path, [59, 20, 20, 31, 0]).frames) == [59, 20, 20, 31, 0]


def test_variable_frame_rate_keeps_time(tmp_path):
    times = [*range(0, 30), *range(30, 120, 6)]  # 30 frames a second, then 5
    path = write_video(tmp_path / "a.mp4", 45, rate=30, times=times, options={"bf": "2"})
    frames, timestamps = video.read_frames(path)
    assert numbers(frames) == list(range(len(timestamps)))
    np.testing.assert_allclose(timestamps, np.array(times[: len(timestamps)]) / 30, atol=1e-3)
    assert len(timestamps) >= 44
    info = video.probe(path)
    chosen = timestamps[video.frame_indices(info, "uniform", 4)]
    middles = (np.arange(4) + 0.5) * info.duration / 4
    assert ((middles - chosen >= 0) & (middles - chosen < 0.2)).all()


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.avi", "libx264", {"bf": "2"}),
        ("a.avi", "mpeg4", {}),
        ("a.mkv", "libx264", {"bf": "2"}),
        ("a.mov", "mpeg4", {}),
        ("a.ts", "libx264", {"bf": "2"}),
        ("a.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "4"}),
        ("a.gif", "gif", {}),
        ("a.mp4", "libsvtav1", {"preset": "12"}),
        ("a.mp4", "libx265", {"x265-params": "log-level=none:bframes=4:open-gop=1:keyint=15"}),
        ("a.mov", "mjpeg", {}),
        ("a.mpg", "mpeg2video", {"bf": "2"}),
        ("a.flv", "flv", {}),
        ("a.wmv", "wmv2", {}),
        ("a.apng", "apng", {}),
    ],
)
def test_containers_and_codecs(tmp_path, name, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    pixel_format = "rgb24" if codec == "apng" else "yuv420p"
    path = write_video(tmp_path / name, 40, codec=codec, options=options, pixel_format=pixel_format)
    frames, timestamps = video.read_frames(path)
    assert numbers(frames) == list(range(40))
    np.testing.assert_allclose(timestamps, np.arange(40) / 25, atol=0.002)
    picked = video.read_frames(path, [31, 7])
    assert numbers(picked.frames) == [31, 7]
    np.testing.assert_allclose(picked.timestamps, timestamps[[31, 7]])


def test_webm_without_duration(tmp_path):
    path = write_video(
        tmp_path / "a.webm", 30, codec="libvpx-vp9", container={"live": "1"}, options={"cpu-used": "8"}
    )
    with av.open(str(path)) as container:
        assert container.duration is None
    assert numbers(video.read_frames(path).frames) == list(range(30))


@pytest.mark.parametrize(("clockwise", "corner"), [(90, (0, -1)), (180, (-1, -1)), (270, (-1, 0))])
def test_rotation_is_applied_by_both_decoders(tmp_path, clockwise, corner):
    marked = np.zeros((64, 96, 3), np.uint8)
    marked[:24, :24] = 255  # the upper left corner as stored
    path = turn(write_video(tmp_path / "a.mp4", [marked] * 5), clockwise)
    info = video.probe(path)
    assert (info.width, info.height) == ((96, 64) if clockwise == 180 else (64, 96))
    assert info.rotation == -clockwise % 360
    for frames in [*each_decoder(info, [0, 4]).values(), video.read_frames(path).frames]:
        assert frames.shape[1:3] == (info.height, info.width)
        bright = {(r, c) for r in (0, -1) for c in (0, -1) if frames[0][r, c].mean() > 127}
        assert bright == {corner}


@pytest.mark.parametrize(("codec", "pixels"), [("libx264", "yuv422p10le"), ("libx265", "yuv420p10le")])
def test_more_than_eight_bits(tmp_path, codec, pixels):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / "a.mp4", 20, codec=codec, options=options, pixel_format=pixels)
    assert numbers(video.read_frames(path).frames) == list(range(20))


@pytest.mark.parametrize(
    ("clockwise", "corner"), [(0, (0, -1)), (90, (-1, -1)), (180, (-1, 0)), (270, (0, 0))]
)
def test_a_mirrored_picture_is_mirrored_back(tmp_path, clockwise, corner):
    marked = np.zeros((64, 96, 3), np.uint8)
    marked[:24, :24] = 255  # the upper left corner as stored
    path = turn(write_video(tmp_path / "a.mp4", [marked] * 5), clockwise, mirror=True)
    frame = video.read_frames(path, [4]).frames[0]
    assert {(r, c) for r in (0, -1) for c in (0, -1) if frame[r, c].mean() > 127} == {corner}


def test_dropped_frames_of_an_avi_keep_their_time(tmp_path):
    times = [*range(0, 30), *range(30, 120, 6)]
    path = write_video(tmp_path / "a.avi", 45, rate=30, codec="mpeg4", times=times)
    frames, timestamps = video.read_frames(path)
    assert numbers(frames) == list(range(45))
    np.testing.assert_allclose(timestamps, np.array(times) / 30, atol=1e-6)


def test_a_trimmed_file_shows_what_its_edit_list_leaves(tmp_path):
    source = write_video(tmp_path / "a.mp4", 60, options={"g": "10", "bf": "2"})
    path = trim(source, tmp_path / "b.mp4", 0.56)
    frames, timestamps = video.read_frames(path)
    assert numbers(frames) == list(range(14, 60))
    np.testing.assert_allclose(timestamps, np.arange(46) / 25, atol=1e-6)
    assert numbers(video.read_frames(path, [30]).frames) == [44]


def test_frames_one_by_one(tmp_path):
    info = video.probe(write_video(tmp_path / "a.mp4", 40, options={"g": "12", "bf": "2"}))
    found = [(index, number_of(frame)) for index, frame in video.iterate_frames(info, [31, 7, 7, 8])]
    assert found == [(7, 7), (8, 8), (31, 31)]


def test_more_frames_than_fit_into_memory(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 40)
    monkeypatch.setattr(video, "available_memory", lambda: 96 * 64 * 3 * 20)
    assert len(video.read_frames(path, list(range(20))).frames) == 20
    with pytest.raises(VideoError, match="40 frames of 96 x 64 pixels need"):
        video.read_frames(path)


def test_start_and_end(tmp_path):
    path = write_video(tmp_path / "a.mp4", 50, rate=25)
    assert numbers(video.read_frames(path, start=0.4, end=0.6).frames) == [10, 11, 12, 13, 14]
    assert numbers(video.read_frames(path, start=1.8).frames) == [45, 46, 47, 48, 49]
    assert numbers(video.read_frames(path, start=0.41, end=0.42).frames) == [10]  # the one on display
    for stretch in ({"start": 9.0}, {"start": 0.5, "end": 0.2}):
        assert video.read_frames(path, **stretch).frames.shape == (0, 64, 96, 3)
    info = video.probe(path)
    assert video.frame_indices(info, "uniform", 2, start=0.4, end=0.8) == [12, 17]
    assert video.frame_indices(info, "official", 12, start=1, end=1) == [25]


def test_uniform_sampler_gives_fewer_of_a_short_video(tmp_path):
    info = video.probe(write_video(tmp_path / "a.mp4", 5))
    assert video.frame_indices(info, "uniform", 8) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("count", "rate", "written"),  # by ffmpeg 9.0.2 -i FILE -r 5, the numbers read off the JPEGs
    [
        (1, 25, [0]),
        (2, 25, [0, 1]),
        (40, 25, [0, 1, 4, 9, 14, 19, 24, 29, 34, 39]),
        (40, 24, [0, 1, 4, 9, 13, 18, 23, 28, 33, 37]),
        (60, 30, [0, 1, 5, 11, 17, 23, 29, 35, 41, 47, 53, 59]),
        (60, 50, [0, 1, 8, 18, 28, 38, 48, 58]),
        (12, 5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (8, 3, [0, 0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7]),
    ],
)
def test_clip2video_reads_what_ffmpeg_writes_at_5_a_second(tmp_path, count, rate, written):
    info = video.probe(write_video(tmp_path / "a.mp4", count, rate=rate))
    assert video.frame_indices(info, "clip2video", 100) == written


def test_clip2video_with_a_variable_frame_rate(tmp_path):
    times = [*range(0, 30), *range(30, 120, 6)]  # 30 frames a second, then 5
    info = video.probe(write_video(tmp_path / "a.mp4", 45, rate=30, times=times))
    assert video.frame_indices(info, "clip2video", 100) == [0, 1, 5, 11, 17, 23, 29, *range(31, 45)]


def test_a_frame_that_stays_is_in_every_slot_that_clip2video_has_for_it():
    still = np.array([*range(10), 60]) / 10  # nothing new from second 1 to second 6
    assert sampling.folder_frames(still, 0.1) == [0, 1, 2, 3, 5, 7, *[9] * 23, 10, 10]


def test_clip2video_cuts_to_max_frames(tmp_path):
    info = video.probe(write_video(tmp_path / "a.mp4", 40, rate=25))
    assert video.frame_indices(info, "clip2video", 4) == [0, 9, 24, 39]
    assert video.frame_indices(info, "clip2video", 12, feature_framerate=2) == [0, 4, 14, 24, 39]
    assert video.frame_indices(info, "clip2video", 2, slice_framepos=1) == [34, 39]
    assert video.frame_indices(info, "clip2video", 12, start=0.8, end=1.2) == [20, 21, 24, 29]
    assert video.frame_indices(info, "clip2video", 12, start=9) == []


def test_clip2video_gives_none_of_a_video_shorter_than_a_stride(tmp_path):
    info = video.probe(write_video(tmp_path / "a.mp4", 2, rate=25))
    assert video.frame_indices(info, "clip2video", 12, feature_framerate=2) == [0]
    assert video.frame_indices(info, "clip2video", 12, feature_framerate=3) == []
    config = load_config("quickstart", {"data.sampler": "clip2video", "data.feature_framerate": 3})
    words = r"a\.mp4: no frame .*data.sampler=clip2video, data.feature_framerate=3"
    with pytest.raises(VideoError, match=words):
        load_frames(Sample("a", "x", path=info.path), config, 32)


def test_glscl_sampler(tmp_path):
    info = video.probe(write_video(tmp_path / "a.mp4", 60, rate=25))
    assert video.frame_indices(info, "glscl", 12) == [0, 25, 50]
    assert video.frame_indices(info, "glscl", 2) == [0, 50]
    assert video.frame_indices(info, "glscl", 12, start=1.9, end=1.1) == [25, 50]
    assert video.frame_indices(info, "glscl", 12, start=1) == [25, 50]
    assert video.frame_indices(info, "glscl", 12, end=1) == [0, 25]
    assert video.frame_indices(info, "glscl", 12, start=9) == []
    assert video.frame_indices(info, "glscl", 100, feature_framerate=30) == list(range(60))
    with pytest.raises(ValueError, match="feature_framerate 50 is twice the video's 25 frames a second"):
        video.frame_indices(info, "glscl", 12, feature_framerate=50)


def test_glscl_sampler_and_a_video_of_one_frame(tmp_path):
    info = video.probe(write_video(tmp_path / "a.mp4", 1))
    assert video.frame_indices(info, "glscl", 12) == [0]


def test_the_second_video_stream_is_not_mixed_in(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        streams = [output.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, (width, height) in zip(streams, [(192, 128), (96, 64)], strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(20):
            for stream, shift in zip(streams, [0, 100], strict=True):
                pixels = picture(i + shift, stream.width, stream.height)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            output.mux(stream.encode())
    frames = video.read_frames(path).frames
    assert frames.shape == (20, 128, 192, 3)
    assert numbers(frames) == list(range(20))


@pytest.mark.parametrize("name", ["a b.mp4", "file:x.mp4", "视频 ü%03d.mp4", "noext"])
def test_odd_names(tmp_path, name):
    plain = write_video(tmp_path / "plain.mp4", 3)
    path = plain.rename(tmp_path / name)
    assert numbers(video.read_frames(path).frames) == [0, 1, 2]


def test_an_index_that_is_not_there(tmp_path):
    path = write_video(tmp_path / "a.mp4", 3)
    for index in (3, -1):
        with pytest.raises(VideoError, match=f"frame {index} was asked for, it has 3"):
            video.read_frames(path, [0, index])


def test_what_is_no_path_and_no_index(tmp_path):
    path = write_video(tmp_path / "a.mp4", 3)
    for what in (None, 5, b"a.mp4"):
        with pytest.raises(VideoError, match="is no path; give a video file or a folder"):
            video.read_frames(what)
    for indices in (["a"], [[1]], [math.nan], [1.5], 1, np.array([[0, 1]])):
        with pytest.raises(VideoError, match=r"a\.mp4: indices .*: give seconds, or whole numbers of frames"):
            video.read_frames(path, indices)
    assert numbers(video.read_frames(path, iter([2, 0])).frames) == [2, 0]
    with pytest.raises(VideoError, match="frame 1000000000000000000000000000000 was asked for, it has 3"):
        video.read_frames(path, [10**30])
    with pytest.raises(VideoError, match="start 'a', end None: give seconds"):
        video.read_frames(path, start="a")
    assert numbers(video.read_frames(path, np.array([2, 0])).frames) == [2, 0]


@needs_shared("clips")
def test_every_clip_can_be_read():
    paths = [path for path in shared("clips").iterdir() if path.suffix != ".json"]
    assert len(paths) == 24
    for path in paths:
        info = video.probe(path)
        frames, timestamps = video.read_frames(path, video.frame_indices(info, "official", 12))
        assert len(frames) == len(timestamps) > 1
        assert frames.shape[1:] == (info.height, info.width, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampler": "unifrm"},
            "sampler 'unifrm' is not one of 'official', 'clip2video', 'glscl', 'uniform'",
        ),
        ({"slice_framepos": 9}, "slice_framepos 9 is not one of 0, 1, 2"),
        ({"feature_framerate": 0}, "feature_framerate 0 is not 1 or more"),
        ({"feature_framerate": 0, "sampler": "glscl"}, "feature_framerate 0 is not 1 or more"),
        ({"start": -1.0}, "start -1 s lies before the video"),
    ],
)
def test_misspelled_options(tmp_path, options, message):
    info = video.probe(write_video(tmp_path / "a.mp4", 8))
    with pytest.raises(ValueError, match=message):
        video.frame_indices(info, **options)
    with pytest.raises(ValueError, match="frame_order 9 is not one of 0, 1, 2"):
        sampling.order_frames([0, 1], 9)
