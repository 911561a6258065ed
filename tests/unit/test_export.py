"""Videos written out as folders of JPEGs or small copies, and read again."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.shared import ROOT
from tests.videos import number_of, picture, turn, write_video
from xclip_lab import atomic, video
from xclip_lab.errors import ConfigError, DatasetError, VideoError
from xclip_lab.export import export, names, to_frames, to_video

VFR = [*range(0, 30), *range(30, 120, 6)]  # 30 frames a second, then 5


def numbers(path):
    return [number_of(frame) for frame in video.read_frames(path).frames]


@pytest.mark.parametrize(
    ("count", "rate", "written"),  # by ffmpeg -i FILE -r 5, as in test_video
    [
        (40, 25, [0, 1, 4, 9, 14, 19, 24, 29, 34, 39]),
        (60, 50, [0, 1, 8, 18, 28, 38, 48, 58]),
        (8, 3, [0, 0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7]),
        (1, 25, [0]),
    ],
)
def test_frames_are_those_of_ffmpeg(tmp_path, count, rate, written):
    path = write_video(tmp_path / "a.mp4", count, rate=rate, options={"bf": "2", "g": "12"})
    assert to_frames(path, tmp_path / "out") == len(written)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        f"{i:08d}.jpg" for i in range(1, len(written) + 1)
    ]
    assert numbers(tmp_path / "out") == written
    info = video.probe(tmp_path / "out")
    of_the_file = video.frame_indices(video.probe(path), "clip2video", 4)
    of_the_folder = video.frame_indices(info, "clip2video", 4)
    assert [written[index] for index in of_the_folder] == of_the_file


def test_another_rate_and_size(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, rate=30)
    to_frames(path, tmp_path / "out", fps=2, short_side=32)
    assert numbers(tmp_path / "out") == [0, 1, 13, 28, 43, 58]
    assert video.probe(tmp_path / "out").height == 32
    assert video.probe(tmp_path / "out").width == 48


def test_pixels_survive(tmp_path):
    path = write_video(tmp_path / "a.mp4", 10, rate=5)
    to_frames(path, tmp_path / "out")
    difference = video.read_frames(tmp_path / "out").frames.astype(int) - video.read_frames(path).frames
    assert np.abs(difference).mean() < 2


def test_a_copy_has_three_frames_a_second(tmp_path):
    path = write_video(tmp_path / "a.avi", 60, rate=30, codec="mpeg4")
    assert to_video(path, tmp_path / "b.mp4") == 6
    info = video.probe(tmp_path / "b.mp4")
    assert (info.frame_count, info.fps, info.codec, info.height, info.width) == (6, 3.0, "h264", 224, 336)
    assert numbers(tmp_path / "b.mp4") == [0, 10, 20, 30, 40, 50]
    assert len(video.frame_indices(info, "official", 12)) == 2  # as many as of the source
    again = tmp_path / "c.mp4"
    assert to_video(path, again, fps=7.5, short_side=33) == 15
    assert (video.probe(again).width, video.probe(again).height) == (48, 32)
    np.testing.assert_allclose(video.read_frames(again).timestamps, np.arange(15) / 7.5, atol=1e-3)


def test_time_rules_where_the_rate_varies(tmp_path):
    path = write_video(tmp_path / "a.mkv", 45, rate=30, times=VFR)
    to_video(path, tmp_path / "b.mp4", fps=2)
    assert numbers(tmp_path / "b.mp4")[:8] == [0, 15, 30, 32, 35, 37, 40, 42]
    to_frames(path, tmp_path / "out")
    assert numbers(tmp_path / "out") == [0, 1, 5, 11, 17, 23, 29, *range(31, 45)]


@pytest.mark.parametrize(
    ("size", "wanted"), [((53, 97), (224, 408)), ((97, 53), (408, 224)), ((1, 1), (224, 224))]
)
def test_odd_sizes_and_portraits_keep_their_shape(tmp_path, size, wanted):
    height, width = size
    frames = [picture(i, width, height) for i in range(4)]
    path = write_video(tmp_path / "a.mkv", frames, rate=4, codec="ffv1")
    to_video(path, tmp_path / "b.mp4")
    assert (video.probe(tmp_path / "b.mp4").height, video.probe(tmp_path / "b.mp4").width) == wanted
    to_frames(path, tmp_path / "out")
    assert video.read_frames(tmp_path / "out").frames.shape[1:3] == size


def test_rotation_is_applied(tmp_path):
    marked = np.zeros((64, 96, 3), np.uint8)
    marked[:24, :24] = 255  # the upper left corner as stored
    path = turn(write_video(tmp_path / "a.mp4", [marked] * 5), 90)
    to_frames(path, tmp_path / "out")
    to_video(path, tmp_path / "b.mp4")
    for copy in (tmp_path / "out", tmp_path / "b.mp4"):
        frame = video.read_frames(copy, [0]).frames[0]
        assert frame.shape[0] == frame.shape[1] * 3 // 2
        assert [int(frame[r, c].mean() > 127) for r in (0, -1) for c in (0, -1)] == [0, 1, 0, 0]


@pytest.mark.parametrize("to", ["frames", "video"])
def test_a_folder_of_videos(tmp_path, to):
    (tmp_path / "in" / "movie").mkdir(parents=True)
    good = write_video(tmp_path / "in" / "movie" / "a.mp4", 20)
    other = write_video(tmp_path / "in" / "b.webm", 20, codec="libvpx")
    broken = tmp_path / "in" / "c.mp4"
    broken.write_text("words")
    videos = names([good, other, broken], tmp_path / "in")
    assert list(videos) == ["movie/a", "b", "c"]
    out = tmp_path / "out"
    report = export(videos, out, to, workers=2, progress=False)
    assert (report.written, report.found, list(report.failed)) == (2, 0, ["c"])
    assert str(broken) in report.failed["c"]
    assert "1 videos cannot be read" in str(report)
    assert json.loads((out / "failures.json").read_text()) == report.failed
    copies = [out / "movie" / "a", out / "b"] if to == "frames" else [out / "movie" / "a.mp4", out / "b.mp4"]
    for copy in copies:
        info = video.probe(copy)
        assert info.fps == (5.0 if to == "frames" else 3.0)
    assert not list(out.rglob(f"{atomic.TEMPORARY}*"))
    write_video(broken, 20)
    before = [copy.stat().st_mtime_ns for copy in copies]
    report = export(videos, out, to, progress=False)
    assert (report.written, report.found, report.failed) == (1, 2, {})
    assert before == [copy.stat().st_mtime_ns for copy in copies]
    assert json.loads((out / "failures.json").read_text()) == {}


@pytest.mark.parametrize("write", [to_frames, to_video])
def test_stopped_in_the_middle_there_is_nothing_half_done(tmp_path, monkeypatch, write):
    path = write_video(tmp_path / "a.mp4", 100)
    out = tmp_path / "out"
    whole = video._pyav_frames

    def stopped(info, wanted):
        for count, found in enumerate(whole(info, wanted)):
            if count == 50:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(video, "_pyav_frames", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(path, out)
    assert not out.exists()
    monkeypatch.undo()
    write(path, out)
    assert len(video.read_frames(out).frames) == (22 if write is to_frames else 12)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "out"]


def test_a_damaged_video_leaves_nothing(tmp_path):
    path = write_video(tmp_path / "a.mp4", 75, container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(VideoError, match=r"a\.mp4"):
        to_frames(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5)
    out = tmp_path / "out"
    export({"a": path}, out, "frames", progress=False)
    for options, error, message in [
        ({"to": "frames", "fps": 3}, DatasetError, "out: holds .*5.0.*, not .*3"),
        ({"to": "film"}, ConfigError, "'film' is not one of frames, video"),
        ({"to": "video", "fps": 0}, ConfigError, "fps: 0"),
        ({"to": "video", "fps": 0.0009}, ConfigError, "fps: 0.0009 .* from 0.001 to 1000"),
        ({"to": "video", "short_side": 1}, ConfigError, "short_side: 1"),
        ({"to": "video", "short_side": 0}, ConfigError, "short_side: 0"),
    ]:
        with pytest.raises(error, match=message):
            export({"a": path}, out, progress=False, **options)
    with pytest.raises(DatasetError, match="holds other files"):
        export({"a": path}, tmp_path, "frames", progress=False)
    for name in ("../a", "/a", "", "a/../../b"):
        with pytest.raises(DatasetError, match="cannot be written below"):
            export({name: path}, tmp_path / "new", "frames", progress=False)
    with pytest.raises(DatasetError, match="cannot be written below"):
        export({"a": path, "a/b": path}, tmp_path / "new", "frames", progress=False)
    with pytest.raises(DatasetError, match="would share the name 'a'"):
        names([path, path.with_suffix(".avi")], tmp_path)


def test_the_lowest_rate_there_is(tmp_path):
    path = write_video(tmp_path / "a.mkv", 30, times=[i * 2500 for i in range(30)])  # 50 minutes
    assert to_video(path, tmp_path / "b.mp4", fps=0.001) == 3
    assert numbers(tmp_path / "b.mp4") == [0, 10, 20]
    for write in (to_frames, to_video):
        with pytest.raises(ConfigError, match=r"fps: 0\.0001"):
            write(path, tmp_path / "c", fps=0.0001)


@pytest.mark.parametrize("to", ["frames", "video"])
def test_what_it_wrote_is_not_written_again(tmp_path, to):
    """Where `out` lies among the videos, the next call finds the copies there as well."""
    first = write_video(tmp_path / "a.mp4", 10)
    out = tmp_path / "sub"
    export(names([first], tmp_path), out, to, progress=False)
    before = sorted(out.rglob("*"))
    copy = out / "a" if to == "frames" else out / "a.mp4"
    report = export(names([first, copy], tmp_path), out, to, progress=False)
    assert (report.written, report.found, report.failed) == (0, 1, {})
    assert sorted(out.rglob("*")) == before


FULL = """
import resource, sys
from pathlib import Path
from xclip_lab.export import export
from xclip_lab.errors import DatasetError
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    folder, to = Path(sys.argv[1]), sys.argv[2]
    videos = {path.stem: path for path in sorted(folder.glob("*.mkv"))}
    try:
        export(videos, folder / "out", to, workers=2, progress=False)
    except DatasetError as error:
        print(error, file=sys.stderr)
        failed = error  # its frames live on, as those of a notebook's last error do
"""


@pytest.mark.parametrize("to", ["frames", "video"])
def test_a_disk_that_takes_no_more(tmp_path, to):
    """One line, and nothing half done is left."""
    rng = np.random.default_rng(0)
    write_video(tmp_path / "0.mkv", 1500, rate=5)  # a worker is still at it, and is killed
    for number in range(1, 9):
        write_video(tmp_path / f"{number}.mkv", 2, rate=1)
    noise = [rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(4)]
    write_video(tmp_path / "9.mkv", noise, codec="ffv1", rate=1)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), to], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "File too large; raise the limit on the size of a file (ulimit -f) and give" in done.stderr
    assert not list((tmp_path / "out").rglob(f"{atomic.TEMPORARY}*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_room_is_asked_for_where_it_helps(tmp_path, monkeypatch, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    path = write_video(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DatasetError, match="what is finished is kept") as caught:
        export({"a": path}, tmp_path / "out", "frames", progress=False)
    assert ("make room" in str(caught.value)) == (number != errno.EIO)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["prepared.json"]


def test_two_machines_on_one_disk(tmp_path, monkeypatch):
    """Each writes beside the other; who comes second finds the work done."""
    path = write_video(tmp_path / "a.mp4", 5)
    whole = Image.Image.save

    def overtaken(*arguments, **options):
        monkeypatch.setattr(Image.Image, "save", whole)
        monkeypatch.setattr("platform.node", lambda: "another")
        assert export({"a": path}, tmp_path / "out", "frames", progress=False).written == 1
        whole(*arguments, **options)

    monkeypatch.setattr(Image.Image, "save", overtaken)
    report = export({"a": path}, tmp_path / "out", "frames", progress=False)
    assert report.failed == {}
    assert len(video.read_frames(tmp_path / "out" / "a").frames) == 3
    monkeypatch.undo()
    assert not list((tmp_path / "out").glob(f"{atomic.TEMPORARY}*"))
