"""The readers of public datasets: real files where these are at hand, broken files, finding videos."""

import functools
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest

from tests.shared import golden_path, needs_golden, needs_shared, shared
from xclip_lab.datasets import DATASETS, load_dataset
from xclip_lab.datasets import files as files_module
from xclip_lab.datasets.base import PROTOCOLS, Sample, Source, VideoTextDataset, one_caption_each
from xclip_lab.datasets.files import LISTS, find_all, find_videos, listing
from xclip_lab.errors import AbsentError, DatasetError

REAL = [
    (name, protocol, split)
    for name, protocols in PROTOCOLS.items()
    for protocol, each in protocols.items()
    for split in each.splits
]


@functools.cache
def real(name, split, protocol=None):
    """A split of the real annotations; skips where a file of it is absent."""
    root = shared("annotations", name)
    for file in PROTOCOLS[name][protocol or next(iter(PROTOCOLS[name]))].files[split]:
        if not (root / file).exists():
            pytest.skip(f"{name}: {file} is not among the reference data")
    return load_dataset(name, split, root, protocol)


def fields(sample):
    return sample.video_id, sample.caption, sample.start, sample.end


# --- the real files


@needs_shared("annotations")
@pytest.mark.parametrize(("name", "protocol", "split"), REAL)
def test_counts_of_the_real_files(name, protocol, split):
    dataset = real(name, split, protocol)
    known = PROTOCOLS[name][protocol].splits[split]
    assert (len(dataset.videos), len(dataset)) == (known.videos, known.captions)
    assert (dataset.name, dataset.split, dataset.protocol) == (name, split, protocol)
    assert len(dataset.text_to_video) == len(dataset)
    assert all(sample.path is None for sample in dataset.samples)
    per_video = np.bincount(dataset.text_to_video)
    assert per_video.min() > 0
    if name == "msrvtt":
        assert set(per_video) == ({1} if len(dataset) == 1000 else {20})


def test_counts_that_the_papers_tell():
    def known(name, protocol=None):
        protocol = protocol or next(iter(PROTOCOLS[name]))
        splits = PROTOCOLS[name][protocol].splits
        return protocol, {split: (each.videos, each.captions) for split, each in splits.items()}

    assert known("msrvtt") == ("9k", {"train": (9000, 180_000), "test": (1000, 1000)})
    assert known("msrvtt", "7k")[1] == {"train": (7010, 140_200), "test": (1000, 1000)}
    assert known("msrvtt", "full")[1] == {
        "train": (6513, 130_260),
        "val": (497, 9940),
        "test": (2990, 59_800),
    }
    assert known("msvd")[1] == {"train": (1200, 48_774), "val": (100, 4290), "test": (670, 27_763)}
    assert known("lsmdc")[1]["test"] == (1000, 1000)
    assert known("didemo")[1] == {"train": (8392, 8392), "val": (1065, 1065), "test": (1004, 1004)}
    assert known("activitynet")[1] == {"train": (10_009, 10_009), "test": (4917, 4917)}
    hgr = {"train": (25_991, 259_910), "val": (1500, 15_000), "test": (1500, 15_000)}
    assert known("vatex") == ("hgr", hgr)
    assert known("vatex", "random-1k5")[1] == {split: hgr[split] for split in ("train", "test")}


IN_ORDER = """
msrvtt train 9k 0 | video2960 | a cartoon animals runs through an ice cave in a video game
msrvtt train 9k 179999 | video8600 | a person is speaking about something in a live program in cnbc
msrvtt test 9k 0 | video9770 | a person is connecting something to system
msrvtt test 7k 999 | video9871 | bearded guy in grey tshirt talking to the camera
msrvtt test full 20 | video7310 | a groom dancing with his wife
msvd train standard 0 | -4wsuPCjDBc_5_15 | a squirrel is eating a peanut in it s shell
msvd test standard 27762 | zzit5b_-ukg_5_20 | the boy is exercising
didemo test standard 695 | 10052357@N03_7585070382_5762149bfc. | swimmers dive into the water. | 0.0 | 31.0
activitynet test standard 4916 | t0ZuC58UIOM | People are chasing a brown bull.  The bull collides and \
locks horns with black bull.  The bulls fight, while people look on. | 0.0 | 100.0
"""


@needs_shared("annotations")
@pytest.mark.parametrize("line", IN_ORDER.strip().split("\n"))
def test_order_of_the_real_files(line):
    where, *expected = line.split(" | ")
    name, split, protocol, row = where.split()
    start_and_end = expected[2:] or ["None", "None"]
    video, caption, *times = fields(real(name, split, protocol).samples[int(row)])
    assert ([video, caption], [str(time) for time in times]) == (expected[:2], start_and_end)


@needs_shared("annotations")
def test_what_the_captions_share():
    assert len({sample.caption for sample in real("msrvtt", "test").samples}) == 995
    videos_of = {}
    for sample in real("msvd", "test").samples:
        videos_of.setdefault(sample.caption, set()).add(sample.video_id)
    assert sum(len(videos) > 1 for videos in videos_of.values()) == 961
    assert max(len(sample.caption.split()) for sample in real("activitynet", "train").samples) == 504


@needs_shared("annotations")
def test_what_the_splits_share():
    assert len(set(real("msrvtt", "train", "9k").videos) & set(real("msrvtt", "test", "full").videos)) == 1990
    assert not set(real("msrvtt", "train", "9k").videos) & set(real("msrvtt", "test", "9k").videos)
    vatex = PROTOCOLS["vatex"]
    ids = {
        (protocol, split): set(shared("annotations", "vatex", each.files[split][0]).read_text().split())
        for protocol, each in vatex.items()
        for split in each.splits
    }
    assert len(ids["random-1k5", "test"] & ids["hgr", "val"]) == 776
    assert len(ids["random-1k5", "test"] & ids["hgr", "test"]) == 724


@needs_shared("annotations")
def test_several_sentences_of_a_video():
    dataset = real("msvd", "test")
    assert dataset.videos[:2] == ["eyhzdC936uk_15_27", "f-24IxG9ijw_25_40"]
    assert dataset.text_to_video[:38].tolist() == [0] * 37 + [1]
    assert len(real("activitynet", "train").without_text) == 15


@needs_shared("annotations", "msrvtt")
def test_msrvtt_full_needs_no_tables(tmp_path):
    """The JSON itself says which split a video is in."""
    (tmp_path / "MSRVTT_data.json").symlink_to(shared("annotations", "msrvtt", "MSRVTT_data.json"))
    for split in ("train", "val", "test"):
        assert load_dataset("msrvtt", split, tmp_path, "full").videos == real("msrvtt", split, "full").videos


@needs_shared("annotations", "vatex", "vatex_data.sample5.json")
def test_vatex_reads_the_real_records(tmp_path):
    shutil.copyfile(shared("annotations", "vatex", "vatex_data.sample5.json"), tmp_path / "vatex_data.json")
    records = json.loads((tmp_path / "vatex_data.json").read_text())
    (tmp_path / "test_list.txt").write_text("\n".join(reversed(records)))
    dataset = load_dataset("vatex", "test", tmp_path)
    assert dataset.videos == list(reversed(records))
    assert [sample.caption for sample in dataset.samples[:10]] == records[dataset.videos[0]]["enCap"]
    assert dataset.text_to_video.tolist() == sorted(list(range(5)) * 10)


# --- protocols and splits


@needs_golden("datasets")
@pytest.mark.parametrize(
    ("name", "asked", "protocol"),
    [
        ("msrvtt", None, "9k"),
        ("msrvtt", "1K_A", "9k"),
        ("msrvtt", "9k / 1k-A", "9k"),
        ("msrvtt", "7k/1k-A", "7k"),
        ("msrvtt", "FULL", "full"),
        ("vatex", "HGR", "hgr"),
    ],
)
def test_protocols_by_any_spelling(name, asked, protocol):
    assert load_dataset(name, "test", golden_path("datasets", name), asked).protocol == protocol


@pytest.mark.parametrize(
    ("name", "split", "protocol", "message"),
    [
        ("msrvtt", "train", "8k", "no protocol '8k'.*there are 9k or 1k-A or 9k/1k-A, 7k or 7k/1k-A, full"),
        ("msrvtt", "dev", "full", "no split 'dev' .there are train, val, test"),
        ("msrvtt", "train", "1kb", "no protocol '1kb'; did you mean '1k-A'. .there are 9k or 1k-A"),
        ("vatex", "val", "1k5", "no split 'val' .there are train, test.; 776 videos"),
        ("lsmdc", "test", "9k", "no protocol '9k' .there are standard"),
        ("vatex", "val", "random 1k5", "protocol .random-1k5.: no split .val."),
        ("msrvtt", "train", 9, "no protocol 9; did you mean '9k'"),
    ],
)
def test_what_a_dataset_does_not_have(name, split, protocol, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        load_dataset(name, split, tmp_path, protocol)


def test_every_protocol_names_the_files_of_its_splits():
    assert set(PROTOCOLS) == set(LISTS) == set(DATASETS.names()) - {"folder", "synthetic"}
    for protocols in PROTOCOLS.values():
        for protocol in protocols.values():
            assert list(protocol.files) == list(protocol.splits)


# --- broken files


def plain_pickle(protocol=2):
    return pickle.dumps({"fff.x_3_6": [["a", "truck"]], "ddd_2_8": [["ü"]], "eee_7_11": [["b"]]}, protocol)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


_MSRVTT, _LSMDC = "MSRVTT_JSFUSION_test.csv", "LSMDC16_challenge_1000_publictect.csv"
BROKEN = [
    ("msrvtt", _MSRVTT, b"", "no column 'video_id' and no column 'sentence'"),
    ("msrvtt", _MSRVTT, b"video_id,sentence\nvideo1,a,b", "line 2: 3 columns, not 2"),
    ("msrvtt", _MSRVTT, b"video_id,sentence\nvideo1, ", "line 2: .* is empty"),
    ("msrvtt", _MSRVTT, b'video_id,sentence\nvideo1,"a', "not valid CSV"),
    ("msrvtt", _MSRVTT, b"video_id,sentence\n", "none of the videos .* has a caption"),
    ("msvd", "test_list.txt", b" \n", "no id in it"),
    ("msvd", "test_list.txt", b"gone_1_2", "'gone_1_2': not in it, though test_list.txt lists it"),
    ("msvd", "raw-captions.pkl", b"", "not a pickle"),
    ("msvd", "raw-captions.pkl", pickle.dumps([1]), "where a dictionary is expected"),
    ("msvd", "raw-captions.pkl", pickle.dumps({"fff.x_3_6": [["a", 3]]}), "'fff.x_3_6': .* list of texts"),
    ("msvd", "raw-captions.pkl", pickle.dumps({"fff.x_3_6": "ab"}), "'fff.x_3_6': 'ab' where a list is"),
    ("msvd", "raw-captions.pkl", pickle.dumps({"fff.x_3_6": [[np.str_("b")]]}), "it asks for numpy"),
    ("lsmdc", _LSMDC, b"a\tb\tc\td\te\tx\na\tb\tc", "line 2: not the six"),
    ("lsmdc", _LSMDC, b"a\tb\tc\td\te", "line 1: not the six"),
    ("lsmdc", _LSMDC, b"\ta\tb\tc\td\te", "line 1: not the six"),
    ("didemo", "test_list.txt", b"other", "none of the videos"),
    ("didemo", "test_data.json", b'[{"video": "no_caption_video"}]', "entry 0: no text at 'description'"),
    ("didemo", "test_data.json", b'[{"video": 3}]', "entry 0: no text at 'video'"),
    ("didemo", "test_data.json", b'["x"]', "entry 0: no text at 'video'"),
    ("didemo", "test_data.json", b"{}", "where a list is expected"),
    ("didemo", "test_data.json", b"[" * 100_000, "not valid JSON"),
    ("activitynet", "val_1.json", b'{"v_ddddddddddd": {"duration": 3}}', "ddddd': None where a list"),
    ("activitynet", "val_1.json", b'{"v_ddddddddddd": []}', "where a dictionary is expected"),
    ("activitynet", "val_1.json", b'{"v_ddddddddddd": {"sentences": ["a"], "duration": -1}}', "on -1"),
    ("activitynet", "val_ids.json", b'["v_other"]', "a caption in val_1.json, val_ids.json; data/README.md"),
    ("activitynet", "val_1.json", b'{"v_ddddddddddd": {"sentences": ["a"], "duration": NaN}}', "on nan"),
    ("activitynet", "val_1.json", b'{"v_ddddddddddd": {"sentences": ["a"], "duration": "3"}}', "on '3'"),
    ("activitynet", "val_ids.json", b"[1]", "list of texts"),
    ("vatex", "vatex_data.json", b'{"Ghi_000003_000013": {"chCap": ["x"]}}', "_000013', 'enCap': None"),
    ("vatex", "vatex_data.json", b'[{"videoID": "a", "enCap": ["x"]}, 3]', "entry 1: no text at 'videoID'"),
    ("vatex", "vatex_data.json", b'{"a": {"enCap": ["x"]}}', "'Ghi_000003_000013': not in it"),
]


@needs_golden("datasets")
@pytest.mark.parametrize(("name", "file", "content", "message"), BROKEN)
def test_broken_files(name, file, content, message, tmp_path):
    root = copied(name, tmp_path)
    (root / file).write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        load_dataset(name, "test", root)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_golden("datasets")
@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_any_file_missing_cut_short_or_not_text(name, tmp_path):
    files = next(iter(PROTOCOLS[name].values())).files["test"]
    for number, file in enumerate(files):
        root = copied(name, tmp_path / str(number))
        whole = (root / file).read_bytes()
        if not file.endswith((".txt", ".csv")):
            (root / file).write_bytes(whole[: len(whole) // 2])
            with pytest.raises(DatasetError, match=file):
                load_dataset(name, "test", root)
        if not file.endswith(".pkl"):
            (root / file).write_bytes(b"\xef\xbb\xbf" + whole)  # the mark that some editors write
            assert len(load_dataset(name, "test", root)) > 0
            (root / file).write_bytes(whole + b"\xff")
            with pytest.raises(DatasetError, match=f"{file}: not UTF-8"):
                load_dataset(name, "test", root)
        (root / file).unlink()
        with pytest.raises(AbsentError, match=f"{file}: no such file; data/README.md"):
            load_dataset(name, "test", root)


_WORDS = {"fff.x_3_6": [[], ["a"]], "ddd_2_8": [], "eee_7_11": [["", "b"]]}
_LINES = b"a\t1\t2\t3\t4\t \nb\t1\t2\t3\t4\t\r\nc\t1\t2\t3\t4\t x "
_ENTRY = b'{"video": "no_caption_video", "description": " "}'
_ZERO = b'{"v_ddddddddddd": {"sentences": ["a", "", "b"], "duration": 0}}'
_NONE = b'{"ddddddddddd": {"sentences": [], "duration": 2}}'
BLANK = [
    ("msvd", "raw-captions.pkl", pickle.dumps(_WORDS), {"fff.x_3_6": ["", "a"], "eee_7_11": [" b"]}),
    ("lsmdc", _LSMDC, _LINES, {"a": [""], "b": [""], "c": [" x"]}),
    ("didemo", "test_data.json", b"[" + _ENTRY + b"," + _ENTRY + b"]", {"no_caption_video": ["   "]}),
    ("activitynet", "val_1.json", _ZERO, {"ddddddddddd": ["a  b"]}),
    ("activitynet", "val_1.json", _NONE, {"ddddddddddd": [""]}),
]


@needs_golden("datasets")
@pytest.mark.parametrize(("name", "file", "content", "captions"), BLANK)
def test_blank_captions_are_kept_as_the_official_loaders_keep_them(name, file, content, captions, tmp_path):
    root = copied(name, tmp_path)
    (root / file).write_bytes(content)
    dataset = load_dataset(name, "test", root)
    told = {video: [s.caption for s in dataset.samples if s.video_id == video] for video in dataset.videos}
    assert told == captions
    if name == "msvd":
        assert dataset.without_text == ("ddd_2_8",)
    if content is _ZERO:
        assert fields(dataset.samples[0])[2:] == (0.0, 0.0)


@needs_golden("datasets")
def test_vatex_as_its_makers_publish_it(tmp_path):
    """A list of records, whose blank captions stay."""
    root = copied("vatex", tmp_path)
    videos = (root / "test_list.txt").read_text().split()
    records = [{"videoID": video, "enCap": [video, ""], "chCap": ["x"]} for video in reversed(videos)]
    (root / "vatex_data.json").write_text(json.dumps(records))
    dataset = load_dataset("vatex", "test", root)
    assert dataset.videos == videos
    assert [sample.caption for sample in dataset.samples[:2]] == [videos[0], ""]


@needs_golden("datasets")
@pytest.mark.parametrize("file", ["val_ids.json", "val_1.json"])
def test_activitynet_without_its_prefix(file, tmp_path):
    """In the list or in the captions: the same dataset."""
    root = copied("activitynet", tmp_path)
    expected = load_dataset("activitynet", "test", root).samples
    (root / file).write_text((root / file).read_text().replace('"v_', '"'))
    assert load_dataset("activitynet", "test", root).samples == expected


@needs_golden("datasets")
@pytest.mark.parametrize(("name", "protocol", "split"), REAL)
def test_what_a_split_lists_is_known_without_its_captions(name, protocol, split, tmp_path):
    """The same videos and files as with them; LSMDC's tables of sentences are its only list."""
    root = copied(name, tmp_path)
    if (name, protocol, split) == ("vatex", "random-1k5", "test"):
        (root / "test_list.txt").rename(root / "test1k5_sec_list.txt")
    source = Source(root, split, protocol, golden_path("datasets", name))
    dataset = DATASETS[name](source)
    (root / "MSRVTT_data.json").unlink(missing_ok=True)
    (root / "raw-captions.pkl").unlink(missing_ok=True)
    for path in (*root.glob("*_data.json"), *root.glob("train.json"), *root.glob("val_1.json")):
        path.unlink()
    if name == "lsmdc":
        (root / f"{split}_clip_ids.txt").write_text("\n".join(dataset.videos))
        (root / PROTOCOLS[name][protocol].files[split][0]).unlink()
    listed = listing(name, source)
    assert set(listed.videos) == {*dataset.videos, *dataset.without_text}
    assert len(listed) == len(listed.videos)
    found = {sample.video_id: sample.path for sample in listed.samples}
    assert [found[s.video_id] for s in dataset.video_samples()] == [s.path for s in dataset.video_samples()]


@needs_golden("datasets")
def test_a_pickle_that_would_do_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = copied("msvd", tmp_path)
    (root / "raw-captions.pkl").write_bytes(pickle.dumps({"fff.x_3_6": Harm()}))
    with pytest.raises(DatasetError, match=r"raw-captions\.pkl: .* .it asks for \w+\.mkdir"):
        load_dataset("msvd", "test", root)
    assert not (tmp_path / "harm").exists()


@needs_golden("datasets")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_any_protocol(protocol, tmp_path):
    root = copied("msvd", tmp_path)
    (root / "raw-captions.pkl").write_bytes(plain_pickle(protocol))
    assert [sample.caption for sample in load_dataset("msvd", "test", root).samples] == ["a truck", "ü", "b"]


def copied(name, tmp_path):
    root = tmp_path / name
    root.mkdir(parents=True)
    for path in golden_path("datasets", name).iterdir():
        if path.is_file():
            (root / path.name).write_bytes(path.read_bytes())
    return root


# --- finding videos


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root, *wanted, family=None, **options):
    places = find_videos(Source(root, "train", family=family), wanted, **options)
    return {video: path.relative_to(root).as_posix() for video, path in places.items()}


def test_files_at_any_depth_by_the_name_before_the_last_dot(tmp_path):
    touch(tmp_path, "-4ws_5_15.avi", "deep/er/fff.x_3_6.MP4", "deep/other.webm", "a/twice.mp4", "b/twice.avi")
    assert found(tmp_path, "-4ws_5_15", "fff.x_3_6", "twice", "gone") == {
        "-4ws_5_15": "-4ws_5_15.avi",
        "fff.x_3_6": "deep/er/fff.x_3_6.MP4",
        "twice": "a/twice.mp4",
    }


def test_what_is_no_video(tmp_path):
    touch(tmp_path, "v.json", "v.txt", "v.npy", "v.jpg", "v.wav", "._v.mp4", ".hidden/v.mp4", "sub/v.mp4")
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "nowhere")
    assert found(tmp_path, "v", "broken") == {"v": "sub/v.mp4"}


def test_folders_of_frames_and_files(tmp_path):
    """`v` holds a video, so its images are not taken for frames."""
    for number in range(8):
        touch(tmp_path, f"many.x/{number}.jpg", f"deep/er/{number}.png", f"v/{number}.jpg", "v/inside.mp4")
    touch(tmp_path, *(f"few/{number}.jpg" for number in range(5)))
    touch(tmp_path, "a/many.x.mp4", "only.mp4")
    wanted = ("many.x", "er", "few", "only", "v", "inside")
    folders = {"many.x": "many.x", "er": "deep/er"}
    files = {"many.x": "a/many.x.mp4", "only": "only.mp4", "inside": "v/inside.mp4"}
    assert found(tmp_path, *wanted) == folders | files | {"few": "few"}
    assert found(tmp_path, *wanted, family="xclip") == folders | files | {"few": "few"}
    assert found(tmp_path, *wanted, family="clip2video") == files | folders


def test_frames_are_not_listed(tmp_path, monkeypatch):
    touch(tmp_path, *(f"v/{number:06d}.jpg" for number in range(500)))
    seen = []
    monkeypatch.setattr(files_module, "_suffix", lambda name: seen.append(name) or os.path.splitext(name)[1])
    assert found(tmp_path, "v") == {"v": "v"}
    assert len(set(seen)) < 100


def test_links_to_folders_are_followed_and_may_go_in_circles(tmp_path):
    touch(tmp_path, "elsewhere/v.mp4")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "up").symlink_to(root)
    (root / "videos").symlink_to(tmp_path / "elsewhere")
    assert list(find_videos(Source(root, "train"), ["v"])) == ["v"]
    (root / "again").symlink_to(root / "videos")
    (root / "self").symlink_to(".")
    touch(root, "own.mp4", "deep/er/w.mp4", "deep/frames/1.jpg")
    (root / "deep" / "same_frames").symlink_to("frames")
    (root / "deep" / "er" / "all").symlink_to("../../..")
    assert [str(path.relative_to(root)) for path in find_all(root)] == [
        *("again/v.mp4", "deep/er/w.mp4", "deep/frames", "deep/same_frames", "own.mp4")
    ]


def test_names_in_didemo_and_activitynet(tmp_path):
    listed = ["a@N00_1.", "b@N00_2.mov", "c@N00_3.avi", "d@N00_4", "e@N00_5.null", "f@N00_6.mp4"]
    (tmp_path / "test_list.txt").write_text("\n".join(listed))
    records = [{"video": video, "description": "x"} for video in listed]
    (tmp_path / "test_data.json").write_text(json.dumps(records))
    touch(
        tmp_path, "a@N00_1.", "b@N00_2.mov.mp4", "c@N00_3.avi", "d@N00_4.3gp", "e@N00_5.null", "f@N00_6.mp4"
    )
    assert {s.path.name for s in load_dataset("didemo", "test", tmp_path).samples} == {
        *("a@N00_1.", "b@N00_2.mov.mp4", "c@N00_3.avi", "d@N00_4.3gp", "e@N00_5.null", "f@N00_6.mp4")
    }
    (tmp_path / "val_ids.json").write_text('["v_-a_1", "v_v_b", "v_c"]')
    entry = {"duration": 1.5, "sentences": ["x", " y "]}
    (tmp_path / "val_1.json").write_text(json.dumps(dict.fromkeys(["v_-a_1", "v_v_b", "v_c"], entry)))
    touch(tmp_path, "-a_1.mp4", "v_v_b.mkv", *(f"v_c/{number}.jpg" for number in range(6)))
    samples = load_dataset("activitynet", "test", tmp_path).samples
    assert [s.path.name for s in samples] == ["-a_1.mp4", "v_v_b.mkv", "v_c"]
    assert fields(samples[0]) == ("-a_1", "x  y ", 0.0, 2.0)


# --- one caption a video


def test_one_caption_each():
    samples = [Sample(f"v{row % 3}", str(row)) for row in range(30)]
    dataset = VideoTextDataset("x", "train", None, samples)
    generator = np.random.default_rng(0)
    draws = [one_caption_each(dataset, lambda n: int(generator.integers(n))) for _ in range(200)]
    for rows in draws:
        assert [samples[row].video_id for row in rows] == dataset.videos
    assert {row for rows in draws for row in rows} == set(range(30))
    in_order = one_caption_each(dataset, random.Random(1).randrange, ["v2", "v0"])
    assert [samples[row].video_id for row in in_order] == ["v2", "v0"]
    assert in_order == one_caption_each(dataset, random.Random(1).randrange, ["v2", "v0"])


# --- own videos: who has said what is for testing


def test_own_videos_are_undivided_without_a_column_split(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    assert load_dataset("folder", "train", tmp_path).undivided
    (tmp_path / "captions.json").write_text('[{"file": "a.mp4", "captions": ["x"]}]')
    assert load_dataset("folder", "test", tmp_path).undivided
    table = tmp_path / "clips.csv"
    table.write_text("video,caption\na.mp4,x\n")
    assert load_dataset("folder", "val", tmp_path).undivided
    table.write_text("video,caption,split\na.mp4,x,train\nb.mp4,y,test\n")
    assert not load_dataset("folder", "train", tmp_path).undivided


@pytest.mark.parametrize(("name", "protocol"), [("msrvtt", "9k"), ("msrvtt", "7k"), ("activitynet", None)])
def test_a_val_that_is_the_test_goes_by_that_name(name, protocol):
    root = golden_path("datasets", name)
    val, test = (load_dataset(name, split, root, protocol) for split in ("val", "test"))
    assert val.split == "test"
    assert val.samples == test.samples
