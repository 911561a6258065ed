"""Own videos: folder, CSV and captions.json."""

import json
import os

import pytest

from tests.shared import needs_shared, shared
from xclip_lab.datasets import Sample, load_dataset
from xclip_lab.errors import DatasetError
from xclip_lab.provenance import dataset_fingerprint


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def load(root, split="test"):
    return load_dataset("folder", split, root)


def refusal(root, split="test"):
    with pytest.raises(DatasetError) as caught:
        load(root, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(tmp_path, content, *videos, encoding="utf-8"):
    touch(tmp_path, *videos)
    path = tmp_path / "clips.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def test_a_folder_of_videos(tmp_path):
    touch(tmp_path, "b_red-car.mp4", "a.mkv", "sub/c.webm", "notes.md")
    (tmp_path / "a.txt").write_text("a dog\n\nthe same dog\n")
    data = load(tmp_path)
    assert [(s.video_id, s.caption) for s in data.samples] == [
        ("a.mkv", "a dog"),
        ("a.mkv", "the same dog"),
        ("b_red-car.mp4", "b red car"),
        ("sub/c.webm", "c"),
    ]
    assert data.videos == ["a.mkv", "b_red-car.mp4", "sub/c.webm"]
    assert data.text_to_video.tolist() == [0, 0, 1, 2]
    assert data.samples[3].path == tmp_path / "sub" / "c.webm"
    assert load(tmp_path, "train").samples == data.samples


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv(tmp_path, encoding):
    rows = 'video,caption\na.mp4,null\na.mp4,NA\nb.mp4,None\nb.mp4,"red, ünd 视频"\n'
    path = table(tmp_path, rows, "a.mp4", "b.mp4", encoding=encoding)
    for root in (path, tmp_path):
        data = load(root)
        assert [s.caption for s in data.samples] == ["null", "NA", "None", "red, ünd 视频"]
        assert data.text_to_video.tolist() == [0, 0, 1, 1]
        assert data.samples[0].path == tmp_path / "a.mp4"


def test_segments_of_one_file_are_videos_of_their_own(tmp_path):
    rows = ["video,caption,start,end", "a.mp4,one,0,2.5", "a.mp4,two,2.5,4", "a.mp4,also one,0,2.5"]
    rows += ["a.mp4,all,,", "a.mp4,rest,3,"]
    data = load(table(tmp_path, "\n".join(rows), "a.mp4"))
    assert len(set(data.videos)) == 4
    assert data.text_to_video.tolist() == [0, 1, 0, 2, 3]
    assert [(s.start, s.end) for s in data.samples] == [
        (0.0, 2.5),
        (2.5, 4.0),
        (0.0, 2.5),
        (None, None),
        (3.0, None),
    ]


def test_a_column_split(tmp_path):
    rows = "split,video,caption\ntrain,a.mp4,one\ntest,b.mp4,two\n"
    path = table(tmp_path, rows, "a.mp4", "b.mp4")
    assert [s.caption for s in load(path, "train").samples] == ["one"]
    assert [s.caption for s in load(path, "test").samples] == ["two"]
    assert "no sample of split 'val'" in refusal(path, "val")


def test_only_line_ends_end_a_line(tmp_path):
    odd = "a\u2028b\x85c\x0bd\x0ce\x1cf\u2029g"
    data = load(table(tmp_path, f"video,caption\r\na.mp4,{odd}\r\n\r\na.mp4,two\r\n", "a.mp4"))
    assert [s.caption for s in data.samples] == [odd, "two"]
    (tmp_path / "clips.csv").unlink()
    (tmp_path / "a.txt").write_text(f"{odd}\ntwo\n", encoding="utf-8")
    assert [s.caption for s in load(tmp_path).samples] == [odd, "two"]


def test_quotes(tmp_path):
    rows = 'video,caption\na.mp4,"two\nlines, and a ""word"""\n"a.mp4",5" wide\n'
    data = load(table(tmp_path, rows, "a.mp4"))
    assert [s.caption for s in data.samples] == ['two\nlines, and a "word"', '5" wide']


def test_equal_rows_are_captions_of_their_own(tmp_path):
    data = load(table(tmp_path, "video,caption\na.mp4,x\na.mp4,x\nb.mp4,x\n", "a.mp4", "b.mp4"))
    assert data.text_to_video.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("file,text\na.mp4,x\n", ["'file', 'text'", "expected video,caption", "'video'", "'caption'"]),
        ("", ["found nothing"]),
        ("video;caption\na.mp4;x\n", ["'video;caption'", "separated by ';', save it with commas"]),
        ("video\tcaption\na.mp4\tx\n", ["separated by '\\t', save it with commas"]),
        ("video,caption,Caption\na.mp4,x,y\n", ["two columns 'caption'"]),
        ('video,caption\na.mp4,"never closed\na.mp4,x\n', ["line 3", "not valid CSV", "quote"]),
        ('video,caption\na.mp4,"said" he\n', ["line 2", "not valid CSV"]),
        ("video,caption\na.mp4,  \n", ["line 2", "caption is empty"]),
        ("video,caption\n", ["no sample"]),
        (f"video,caption\na.mp4,{'x' * 140_000}\n", ["line 2", "longer than 131072", "never closed"]),
        ("video,caption\na.mp4,one, two\n", ["line 2", "quotes"]),
        ("video,caption\na.mp4\n", ["line 2"]),
        ("video,caption\na.mp4,\n", ["line 2", "caption is empty"]),
        ("video,caption,start,end\na.mp4,x,1,2\na.mp4,x,soon,2\n", ["line 3", "start 'soon'"]),
        ("video,caption,start,end\na.mp4,x,-1,2\n", ["line 2", "start '-1'"]),
        ("video,caption,start,end\na.mp4,x,nan,2\n", ["line 2", "start 'nan'"]),
        ("video,caption,start,end\na.mp4,x,3,2\n", ["line 2", "end 2 s is not after start 3 s"]),
        ("video,caption,split\na.mp4,x,training\n", ["line 2", "training", "train, val, test"]),
        ("video,caption\na.mp4,x\nb.mp4,x\nc.mp4,x\n", ["2 of 3", "b.mp4", "c.mp4"]),
    ],
)
def test_faulty_tables(tmp_path, rows, words):
    message = refusal(table(tmp_path, rows, "a.mp4"))
    for word in words:
        assert word in message


def test_faulty_folders(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "no video in it" in refusal(tmp_path)
    (tmp_path / "a.docx").touch()
    assert "not a folder and not a CSV" in refusal(tmp_path / "a.docx")
    assert "no split 'tset'" in refusal(tmp_path, "tset")
    table(tmp_path, "video,caption\n")
    (tmp_path / "clips.csv").write_bytes("video,caption\na.mp4,caf\xe9\n".encode("latin-1"))
    assert "not UTF-8" in refusal(tmp_path)
    (tmp_path / "other.csv").touch()
    assert "several CSV files" in refusal(tmp_path)


def test_hidden_files_are_no_videos(tmp_path):
    touch(tmp_path, "a.mp4", "._a.mp4", ".hidden.mp4", ".trash/b.mp4")
    assert load(tmp_path).videos == ["a.mp4"]


def test_a_hidden_folder_may_be_the_root(tmp_path):
    touch(tmp_path, ".videos/a.mp4")
    assert load(tmp_path / ".videos").videos == ["a.mp4"]


def test_two_spellings_of_a_path_are_one_video(tmp_path):
    rows = "video,caption\na.mp4,one\n./a.mp4,two\nsub//b.mp4,three\nsub/./b.mp4,four\n"
    data = load(table(tmp_path, rows, "a.mp4", "sub/b.mp4"))
    assert data.videos == ["a.mp4", "sub/b.mp4"]
    (tmp_path / "clips.csv").unlink()
    entries = [{"file": "a.mp4", "captions": ["one"]}, {"file": "./a.mp4", "captions": ["two"]}]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    assert load(tmp_path).videos == ["a.mp4"]


def test_blank_lines_are_skipped(tmp_path):
    data = load(table(tmp_path, "  \nvideo,caption\n   \na.mp4,one\n\t\n , \na.mp4,two\n", "a.mp4"))
    assert [s.caption for s in data.samples] == ["one", "two"]


def test_a_path_may_be_a_string(tmp_path):
    assert Sample("a", "one", path=str(tmp_path / "a.mp4")).path == tmp_path / "a.mp4"
    assert Sample("a", "one").path is None


def test_captions_json(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    entries = [{"file": "a.mp4", "captions": ["one", "two"]}, {"file": "b.mp4", "captions": ["three"]}]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    assert load(tmp_path).text_to_video.tolist() == [0, 0, 1]
    (tmp_path / "captions.json").write_text(json.dumps([*entries, {"file": "c.mp4"}]))
    assert "entry 2" in refusal(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps([{"file": "a.mp4", "captions": ["one", " "]}]))
    assert "entry 0" in refusal(tmp_path)
    (tmp_path / "captions.json").write_text("[")
    assert "not valid JSON" in refusal(tmp_path)
    for broken in ("[" * 100_000, f"[{'9' * 6000}]"):  # Python's own limits
        (tmp_path / "captions.json").write_text(broken)
        assert "not valid JSON" in refusal(tmp_path)
    (tmp_path / "captions.json").write_text('[{"file": "a.mp4", "captions": ["half \\ud800"]}]')
    assert "'half \\ud800': its id or caption holds '\\ud800', which is no text" in refusal(tmp_path)
    (tmp_path / "captions.json").write_text('[{"file": "\\udcff.mp4", "captions": ["one"]}]')
    assert "missing: " in refusal(tmp_path)


def test_names_too_long_for_a_file(tmp_path):
    """As where the columns are swapped."""
    touch(tmp_path, "a.mp4")
    for name in ("n" * 256, "n/" * 3000):
        table(tmp_path, f"caption,video\na.mp4,{name}\n")
        assert "1 of 1 video files are missing" in refusal(tmp_path)
        (tmp_path / "clips.csv").unlink()
        (tmp_path / "captions.json").write_text(json.dumps([{"file": name, "captions": ["one"]}]))
        assert "1 of 1 video files are missing" in refusal(tmp_path)
        (tmp_path / "captions.json").unlink()
        assert "does not exist" in refusal(tmp_path / name)
    touch(tmp_path, f"{'f' * 255}/1.jpg")  # no room for the suffix of its text
    assert len(load(tmp_path).videos) == 2


def test_names_that_are_no_text_or_more_than_a_line(tmp_path):
    """Their ids and captions are text in one line, and can be written; the path is the file's own."""
    for name in (b"b\xff.mp4", b"two\nlines.mp4"):
        os.close(os.open(os.path.join(os.fsencode(tmp_path), name), os.O_CREAT))
    data = load(tmp_path)
    assert [(s.video_id, s.caption) for s in data.samples] == [
        ("b\\udcff.mp4", "b\\udcff"),
        ("two\\nlines.mp4", "two lines"),
    ]
    assert all(s.path.is_file() for s in data.samples)
    assert len(dataset_fingerprint(data)) == 64
    table(tmp_path / "missing", 'video,caption\n"two\nlines.mp4",x\n')
    assert refusal(tmp_path / "missing").endswith("missing/two\\nlines.mp4")


@needs_shared("clips", "captions.json")
def test_the_shared_clips():
    data = load(shared("clips"))
    assert len(data.videos) == 24
    assert len(data) > 24
