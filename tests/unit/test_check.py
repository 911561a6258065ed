"""`data check`: what is there and what is missing, and whether a protocol can be run."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.shared import needs_shared, shared
from tests.videos import damage, picture, write_video
from xclip_lab.__main__ import main
from xclip_lab.check import check
from xclip_lab.data_plots import caption_lengths, durations, overlap_matrix
from xclip_lab.errors import ConfigError, DatasetError

TRAIN, TEST = ["video0", "video1", "video2"], ["video7", "video8"]


def write_annotations(root: Path, train: list[str], test: list[str]) -> None:
    """Two captions a training video, of which all have the first; one a test video."""
    sentences = [
        {"video_id": video, "caption": text} for video in train for text in ("a bar", f"bars of {video}")
    ]
    videos = [{"video_id": video, "split": "train"} for video in train]
    root.mkdir(exist_ok=True)
    (root / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    (root / "MSRVTT_train.9k.csv").write_text("\n".join(["video_id", *train, ""]))
    rows = [f"ret{i},msr{i},{video},{'long ' * 40 * i}bars" for i, video in enumerate(test)]
    (root / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(["key,vid_key,video_id,sentence", *rows, ""]))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Annotations with all their videos, each of another length."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "msrvtt"
    write_annotations(root, TRAIN, TEST)
    (root / "videos").mkdir()
    for number, video in enumerate(TRAIN + TEST):
        write_video(root / "videos" / f"{video}.mp4", frames=10 + 10 * number, rate=10)
    return root


def run(root: Path, *options: str, name: str = "msrvtt") -> int:
    return main(["data", "check", name, "--root", str(root), "--workers", "1", *options])


def look_at(root: Path, **settings):
    return check("msrvtt", root, workers=0, progress=False, **settings)


def test_all_there(root, capsys):
    assert run(root) == 0
    told = capsys.readouterr().out
    assert (
        "the last were read: damage between them is not told\n\nevaluation can run\ntraining can run\n"
        in told
    )
    assert "train: not the official number (2): 3 videos where 9,000 are known, 6 captions where" in told
    report = json.loads(Path("runs/data_check/msrvtt-9k.json").read_text())
    assert report["runnable"]
    assert report["verdicts"] == {"evaluation": [], "training": []}
    train, test = report["splits"]["train"], report["splits"]["test"]
    assert (train["videos"], train["captions"], test["videos"], test["captions"]) == (3, 6, 2, 2)
    assert (train["captions_repeated"], train["captions_of_several_videos"]) == (2, 1)
    assert train["known"] == {"videos": 9000, "captions": 180_000}
    assert train["words"] == {"min": 2, "median": 2.5, "max": 3}
    assert test["captions_longer_than"] == {"32": 1, "64": 0, "77": 0}
    assert train["codec"] == {"h264": 3}
    assert train["file_type"] == {".mp4": 3}
    assert train["seconds"] == pytest.approx({"min": 1, "median": 2, "max": 3, "total": 6})
    assert report["overlaps"] == {"train/test": {"ids": [], "twins": {}}}
    assert report["unlisted_files"] == 0


def test_missing_and_unreadable(root, capsys):
    (root / "videos/video0.mp4").unlink()
    (root / "videos/video7.mp4").unlink()
    (root / "videos/video8.mp4").write_bytes(b"")
    (root / "videos/more.mp4").write_bytes(b"")
    assert run(root, "--out", "report.json") == 2
    told, complaint = capsys.readouterr()
    assert "test: no file (1): video7\n" in told
    assert f"test: cannot be read (1):\n    {root}/videos/video8.mp4: the file is empty (0 bytes)\n" in told
    assert "\nvideos that are in no split: 1\n" in told
    assert complaint.splitlines()[-1].endswith(
        "xclip-lab: error: msrvtt / 9k: evaluation cannot run: 1 of 2 test videos are missing; "
        "1 of 2 test videos are unreadable. training cannot run: 1 of 3 train videos are missing"
    )
    report = json.loads(Path("report.json").read_text())
    assert report["splits"]["train"]["missing"] == ["video0"]
    assert list(report["splits"]["test"]["unreadable"]) == ["video8"]


def test_a_video_that_is_damaged_at_its_end_is_unreadable(root):
    for number, place in enumerate((0.9, 0.4)):
        path = root / f"videos/video{7 + number}.mp4"
        write_video(path, 60, container={"movflags": "faststart"}, options={"g": "10"})
        damage(path, place, place + 0.1, every=10)
    report = look_at(root, split="test")
    assert list(report.splits["test"].unreadable) == ["video7"]
    assert "1 of 2 test videos are unreadable" in report.closing
    assert "were read: damage between" in str(report)  # which the other has
    assert "were read" not in str(look_at(root, open_videos=False))


def test_names_that_are_no_text_can_be_told(root, tmp_path, capsys):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/own\xff"))
    place.mkdir()
    for name in ("b\udcff.mp4", "two\n lines.mp4"):
        (place / name).write_bytes(b"")
    assert run(place, name="folder") == 2
    told = capsys.readouterr().out
    told.encode()
    assert "own\\udcff/two\\n lines.mp4: the file is empty" in told
    report = json.loads(Path("runs/data_check/folder.json").read_text())
    assert list(report["splits"]["test"]["unreadable"]) == ["b\\udcff.mp4", "two\\n lines.mp4"]


def test_what_is_unlisted_is_found_as_the_reader_finds(root, tmp_path):
    """By links to folders as well, and a folder of frames is one video."""
    (tmp_path / "elsewhere").mkdir()
    write_video(tmp_path / "elsewhere/more.mp4")
    (root / "videos/link").symlink_to(tmp_path / "elsewhere")
    (root / "videos/frames").mkdir()
    for number in range(40):
        (root / f"videos/frames/{number}.jpg").touch()
    assert look_at(root, open_videos=False).unlisted == 2
    (root / "MSRVTT_JSFUSION_test.csv").unlink()
    assert look_at(root, open_videos=False).unlisted is None  # its videos are listed, nobody knows where


def test_captions_missing(root, capsys):
    """Videos are counted, opened and compared by the list alone."""
    write_annotations(root, [*TRAIN, "video7"], TEST)
    (root / "MSRVTT_data.json").unlink()
    (root / "videos/video0.mp4").unlink()
    (root / "videos/video1.mp4").write_bytes(b"")
    assert run(root, "--out", "report.json") == 2
    told, complaint = capsys.readouterr()
    assert "train: captions: file missing (1): MSRVTT_data.json\n" in told
    rows = dict(re.split(" {2,}", line)[:2] for line in told.splitlines() if "  " in line)
    assert rows["videos"] == "4 (known: 9,000)"
    assert rows["captions"] == rows["repeated captions"] == "-"
    assert rows["files missing"] == rows["unreadable"] == "1"
    assert "train and test: in both (1): video7" in told
    assert "MSRVTT_data.json: no such file" in complaint.splitlines()[-1]
    report = json.loads(Path("report.json").read_text())
    train = report["splits"]["train"]
    assert (train["videos"], train["captions"], train["words"]) == (4, None, None)
    assert report["splits"]["test"]["captions"] == 2
    assert [axis.get_title("left") for axis in caption_lengths(look_at(root)).axes] == ["test"]


def test_empty_captions_are_counted(root):
    data = json.loads((root / "MSRVTT_data.json").read_text())
    data["sentences"][0]["caption"] = " "
    (root / "MSRVTT_data.json").write_text(json.dumps(data))
    report = look_at(root, open_videos=False)
    assert "\ntrain: empty captions: 1\n" in str(report)
    assert "test: empty" not in str(report)
    assert report.to_dict()["splits"]["train"]["captions_empty"] == 1
    assert report.runnable


def test_other_protocols(root):
    """Those whose lists are there: by the table, else by the JSON; a test of the same file is the same."""
    data = json.loads((root / "MSRVTT_data.json").read_text())
    data["videos"] += [{"video_id": video, "split": "test"} for video in ("video7", "video9")]
    (root / "MSRVTT_data.json").write_text(json.dumps(data))
    report = look_at(root, open_videos=False)
    assert report.elsewhere == {"full test": (2, {"train": [], "test": ["video7"]})}
    (root / "MSRVTT_val.full.csv").write_text("video_id\nvideo1\nvideo2\nvideo6\n")
    (root / "MSRVTT_test.full.csv").write_text("video_id\nvideo0\n")
    report = look_at(root, open_videos=False)
    assert report.to_dict()["elsewhere"] == {
        "full val": {"videos": 3, "ids": {"train": ["video1", "video2"], "test": []}},
        "full test": {"videos": 1, "ids": {"train": ["video0"], "test": []}},
    }
    assert "shared with full val (3)                2" in str(report)
    axis = overlap_matrix(report).axes[0]
    assert [text.get_text() for text in axis.texts] == ["3", "0", "0", "2", "2", "0", "1", "0"]
    assert axis.get_yticklabels()[2].get_text() == "full val\n(3)"
    assert list(look_at(root, protocol="full", open_videos=False).elsewhere) == ["9k test"]
    assert look_at(root, split="test", open_videos=False).elsewhere == {}


@needs_shared("annotations", "vatex")
@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("hgr", {"random-1k5 test": {"train": 0, "val": 776, "test": 724}}),
        ("random-1k5", {"hgr val": {"train": 0, "test": 776}, "hgr test": {"train": 0, "test": 724}}),
    ],
)
def test_vatex_says_what_its_protocols_share_without_captions(protocol, expected, tmp_path):
    for path in shared("annotations", "vatex").glob("*_list.txt"):
        (tmp_path / path.name).symlink_to(path)
    report = check("vatex", tmp_path, protocol, open_videos=False, progress=False)
    assert {len(found.videos) for found in report.splits.values()} == {25_991, 1500}
    counts = {
        name: {split: len(ids) for split, ids in found.ids.items()}
        for name, found in report.elsewhere.items()
    }
    assert counts == expected


def test_without_opening(root):
    (root / "videos/video8.mp4").write_bytes(b"")
    report = look_at(root, open_videos=False)
    assert report.runnable
    assert not report.probed
    assert "unreadable" not in str(report)


def test_evaluation_needs_no_training_videos(root, capsys):
    (root / "videos/video0.mp4").unlink()
    assert run(root) == 2
    told, complaint = capsys.readouterr()
    assert "evaluation can run\ntraining cannot run: 1 of 3 train videos are missing\n" in told
    assert complaint.splitlines()[-1].endswith(
        "error: msrvtt / 9k: training cannot run: 1 of 3 train videos are missing"
    )
    assert run(root, "--split", "test") == 0
    assert "training" not in capsys.readouterr().out


def test_shared_videos(root):
    """By id, and under another id by content; equal size alone is none."""
    write_annotations(root, [*TRAIN, "video7", "video9"], [*TEST, "video5"])
    shutil.copy(root / "videos/video8.mp4", root / "videos/video9.mp4")
    data = bytearray((root / "videos/video1.mp4").read_bytes())
    data[-1] ^= 1
    (root / "videos/video5.mp4").write_bytes(data)
    report = look_at(root)
    assert report.overlaps == {("train", "test"): (["video7"], {"video8": "video9"})}
    assert report.verdicts == {
        "evaluation": [],
        "training": ["2 of 3 test videos are for training as well"],
    }
    assert "train and test: same content (1): video8 = video9" in str(report)


def test_stretches_of_one_file_that_do_not_meet_are_not_shared(tmp_path):
    write_video(tmp_path / "a.mp4")
    rows = ["video,caption,start,end,split", "a.mp4,one,0,0.5,train", "a.mp4,two,0.5,1,test"]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    assert check("folder", tmp_path, workers=0, progress=False).runnable
    (tmp_path / "a.csv").write_text("\n".join([*rows, "a.mp4,three,0.4,0.8,test"]))
    [shared_videos] = check("folder", tmp_path, workers=0, progress=False).overlaps.values()
    assert shared_videos == ([], {"a.mp4[0.4-0.8]": "a.mp4[0.0-0.5]"})


def test_which_decoder_reads(root):
    """decord cannot place the frames of an AVI file; a folder of frames needs no decoder."""
    (root / "videos/video7.mp4").unlink()
    write_video(root / "videos/video7.avi", codec="mpeg4")
    (root / "videos/video8.mp4").unlink()
    (root / "videos/video8").mkdir()
    for number in range(8):
        Image.fromarray(picture(number)).save(root / f"videos/video8/{number:04d}.jpg")
    test = look_at(root).splits["test"]
    assert test.count("decoder") == {"pyav": 1, "frames": 1}
    assert test.count("codec") == {"mpeg4": 1, "frames": 1}
    (root / "videos/video8/0000.jpg").write_text("no picture")
    assert list(look_at(root).splits["test"].unreadable) == ["video8"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("MSRVTT_JSFUSION_test.csv", None, "MSRVTT_JSFUSION_test.csv: no such file"),
        ("MSRVTT_JSFUSION_test.csv", b"a,b\n1,2\n", "no column 'video_id'"),
        ("MSRVTT_data.json", b'{"videos": [', "not valid JSON"),
        ("MSRVTT_data.json", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_annotations_missing_or_malformed(root, capsys, file, content, reason):
    (root / file).unlink() if content is None else (root / file).write_bytes(content)
    assert run(root) == 2
    told, complaint = capsys.readouterr()
    assert reason in complaint.splitlines()[-1]
    assert (f"annotation file missing (1): {file}" in told) == (content is None)
    assert "Traceback" not in complaint


def test_a_dataset_that_nobody_has_divided(tmp_path):
    write_video(tmp_path / "a_dog.mp4")
    report = check("folder", tmp_path, workers=0, progress=False)
    assert report.undivided
    assert report.verdicts == {"evaluation and training": []}
    assert "nobody has said what is for testing" in str(report)
    assert overlap_matrix(report) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--protocol", "8k"], "no protocol '8k'"),
        (["--split", "tset"], "no split 'tset'"),
        (["--family", "xlcip"], "did you mean 'xclip'?"),
        (["--videos", "nowhere"], "nowhere does not exist"),
        (["--out", "msrvtt"], "--out msrvtt is a folder; name the JSON file in it"),
        (["--workers=-1"], "workers: -1 is not allowed"),
    ],
)
def test_impossible_wishes(root, capsys, options, said):
    assert run(root, *options) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_unknown_dataset(root, capsys):
    assert run(root, name="mrsvtt") == 2
    assert "unknown dataset 'mrsvtt'; did you mean 'msrvtt'?" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        check("mrsvtt", root)
    with pytest.raises(DatasetError, match="does not exist"):
        check("msrvtt", root / "nowhere")


def test_figures(root):
    report = look_at(root)
    lengths = caption_lengths(report)
    for places in (32, 77):
        for axis in caption_lengths(report, places).axes:
            [line] = axis.lines
            assert line.get_xdata()[0] == places - 1.5 < axis.get_xlim()[1]
    assert [axis.get_title("left") for axis in lengths.axes] == ["train", "test"]
    for axis in (*lengths.axes, *durations(report).axes):
        [bars] = axis.patches
        assert bars.get_data().values.sum() == pytest.approx(100)
    texts = [text.get_text() for text in overlap_matrix(report).axes[0].texts]
    assert texts == ["3", "0", "0", "2"]
    assert durations(look_at(root, open_videos=False)) is None


@needs_shared("annotations", "msrvtt")
def test_real_annotations_and_three_videos(tmp_path):
    """All that is missing is named in seconds, and nothing loads torch."""
    for video in ("video7020", "video7021"):
        write_video(tmp_path / f"{video}.mp4", frames=10, rate=10)
    (tmp_path / "video0.mp4").write_bytes(b"")
    arguments = [f"--root={shared('annotations', 'msrvtt')}", f"--videos={tmp_path}", "--out=report.json"]
    code = (
        "import sys; from xclip_lab.__main__ import main\n"
        f"code = main(['data', 'check', 'msrvtt', *{arguments!r}])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert spent.ru_utime + spent.ru_stime - began.ru_utime - began.ru_stime < 10  # whatever else is running
    assert done.returncode == 2
    report = json.loads((tmp_path / "report.json").read_text())
    full = report["elsewhere"]["full test"]
    assert (full["videos"], len(full["ids"]["train"]), len(full["ids"]["test"])) == (2990, 1990, 1000)
    train, test = (report["splits"][split] for split in ("train", "test"))
    assert (train["videos"], train["captions"], len(train["missing"])) == (9000, 180_000, 8999)
    assert (test["videos"], test["captions"], len(test["missing"])) == (1000, 1000, 998)
    assert test["captions_repeated"] == 1000 - 995
    assert train["unreadable"] == {"video0": f"{tmp_path}/video0.mp4: the file is empty (0 bytes)"}
    assert np.isclose(test["seconds"]["total"], 2)
    assert done.stderr.splitlines()[-1].endswith(
        "evaluation cannot run: 998 of 1,000 test videos are missing. "
        "training cannot run: 8,999 of 9,000 train videos are missing; 1 of 9,000 train videos are unreadable"
    )


@needs_shared("annotations", "msvd")
def test_real_captions_that_several_videos_have():
    report = check("msvd", shared("annotations", "msvd"), split="test", open_videos=False, progress=False)
    assert report.splits["test"].repeated[1] == 961
