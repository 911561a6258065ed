"""What the readers list: the items of the official loaders, from the same annotation files."""

import json
import random
import shutil

import numpy as np
import pytest

from tests.shared import golden_path, golden_paths, needs_golden
from xclip_lab.datasets import VideoTextDataset, load_dataset
from xclip_lab.datasets.base import one_caption_each
from xclip_lab.errors import DatasetError

pytestmark = needs_golden("datasets")

GOLDEN = {
    path.stem.removeprefix("datasets_"): json.loads(path.read_text())
    for path in golden_paths("datasets_*.json")
}
# GLSCL's `train_test` is left out: its training data once more, for LSMDC its validation data.
CASES = [
    (family, case)
    for family, cases in GOLDEN.items()
    for case in cases
    if not case.endswith(("train_test", "test_jsfusion_nan_captions"))
]
LISTS_MISSING_VIDEOS = {"msrvtt", "msvd"}
# Split and protocol of the cases whose names do not say them as we do.
ASKED = {
    "msrvtt/test_jsfusion": ("test", "9k"),
    "msrvtt/val": ("test", "9k"),  # GLSCL: the same table
    "msrvtt/train.9k": ("train", "9k"),
    "msrvtt/train.9k_known": ("train", "9k"),
    "msrvtt/train.7k": ("train", "7k"),
    "msrvtt/train.full": ("train", "full"),
    "msrvttfull/train": ("train", "full"),
    "msrvttfull/val": ("val", "full"),
    "msrvttfull/test": ("test", "full"),
    "msrvttfull/test_noncontiguous_json": ("test", "full"),
    "activitynet/videos_noprefix/val": ("test", None),  # val_1, on which the papers report
    "activitynet/videos_vprefix/val": ("test", None),
}
STANDS_FOR = {
    "msrvtt/train.9k_known": ("MSRVTT_train.9k_known.csv", "MSRVTT_train.9k.csv"),
    "msrvttfull/test_noncontiguous_json": ("MSRVTT_data_noncontiguous.json", "MSRVTT_data.json"),
}


def ask(family, case, tmp_path):
    """The dataset that answers a case of the golden files."""
    case = case.removesuffix("/expand").removesuffix("/no_expand_seed0")
    folder, *middle, last = case.split("/")
    name = folder.removesuffix("full")
    root = golden_path("datasets", name)
    videos = root / (middle[0] if middle else "frames" if family == "clip2video" else "videos")
    if case in STANDS_FOR:
        root = replaced(root, *STANDS_FOR[case], tmp_path)
    split, protocol = ASKED.get(case, (last, None))
    return load_dataset(name, split, root, protocol, videos=videos, family=family)


def replaced(annotations, file, name, tmp_path):
    """The same annotations, of which one file has taken the place of another."""
    root = tmp_path / "annotations"
    root.mkdir()
    for path in annotations.iterdir():
        if path.is_file():
            shutil.copyfile(path, root / path.name)
    (root / file).replace(root / name)
    return root


def items(samples):
    return [[sample.video_id, sample.caption, sample.start, sample.end] for sample in samples]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_lists_what_the_official_loader_lists(family, case, tmp_path):
    official = GOLDEN[family][case]
    if isinstance(official, str):
        # ActivityNet has no split test there, VATEX no val, and captions of one video have to stand together.
        # Here ActivityNet's test is val_1, VATEX has HGR's val, and the last is no condition.
        assert len(ask(family, case, tmp_path)) > 0
        return
    dataset = ask(family, case, tmp_path)
    kept = [
        sample
        for sample in dataset.samples
        if sample.path is not None or dataset.name in LISTS_MISSING_VIDEOS
    ]
    if "random_seed" in official:
        table = golden_path("datasets", "msrvtt", f"MSRVTT_{case.split('/')[1]}.csv")
        order = table.read_text().split()[1:]
        rows = one_caption_each(dataset, random.Random(official["random_seed"]).randrange, order)
        kept = [dataset.samples[row] for row in rows]
    assert items(kept) == official["items"]

    root = golden_path("datasets")
    for video, path in official.get("video_dict", {}).items():
        if video in dataset.videos and (root / path).exists():  # GLSCL names an .mp4 where there is a .webm
            (found,) = {sample.path for sample in kept if sample.video_id == video}
            assert found == root / path
    if "sentence_num" in official:
        gallery = VideoTextDataset(dataset.name, dataset.split, dataset.root, kept)
        ends = np.cumsum(np.bincount(gallery.text_to_video)) - (family == "glscl")  # GLSCL's are one less
        assert ends.tolist() == official["cut_off_points"]
        assert (len(gallery), len(gallery.videos)) == (official["sentence_num"], official["video_num"])


def test_captions_of_a_video_need_not_stand_together(tmp_path):
    """Where CLIP2Video's loader ends in an AssertionError."""
    dataset = ask("clip2video", "msrvttfull/test_noncontiguous_json", tmp_path)
    together = ask("clip2video", "msrvttfull/test", tmp_path)
    assert sorted(items(dataset.samples)) == sorted(items(together.samples))
    assert dataset.samples[0].video_id == dataset.videos[0]
    assert [dataset.videos[row] for row in dataset.text_to_video] == [s.video_id for s in dataset.samples]
    assert np.any(np.diff(dataset.text_to_video) < 0)


@pytest.mark.parametrize("family", ["clip4clip", "xclip"])
def test_words_that_pandas_takes_for_no_value_stay_words(family, tmp_path):
    """`null`, `NA` and `None` become NaN in the official loaders, and the tokenizer raises. An empty caption
    is an error here."""
    official = GOLDEN[family]["msrvtt/test_jsfusion_nan_captions"]["items"]
    root = replaced(
        golden_path("datasets", "msrvtt"),
        "MSRVTT_JSFUSION_test_nan.csv",
        "MSRVTT_JSFUSION_test.csv",
        tmp_path,
    )
    table = root / "MSRVTT_JSFUSION_test.csv"
    with pytest.raises(DatasetError, match=r"MSRVTT_JSFUSION_test\.csv, line 5: .* is empty"):
        load_dataset("msrvtt", "test", root, family=family)
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if not line.endswith(",")))
    samples = load_dataset("msrvtt", "test", root, family=family).samples
    assert [sample.caption for sample in samples] == ["null", "NA", "None", "none at all"]
    assert [sample.video_id for sample in samples] == [video for video, *_ in official[:3] + official[4:]]


@pytest.mark.parametrize("dataset", ["msrvtt", "msvd", "lsmdc", "didemo", "activitynet", "vatex"])
def test_without_a_family_every_name_of_a_file_is_accepted(dataset):
    """All that any official loader finds, and nothing left out."""
    root = golden_path("datasets", dataset)
    for split in ("train", "test"):
        ours = {s.video_id for s in load_dataset(dataset, split, root).samples if s.path is not None}
        for family in GOLDEN:
            theirs = load_dataset(dataset, split, root, family=family).samples
            assert {sample.video_id for sample in theirs if sample.path is not None} <= ours
    if dataset == "didemo":
        samples = load_dataset(dataset, "train", root).samples
        assert all(sample.path for sample in samples)
        assert load_dataset(dataset, "test", root).without_text == ("no_caption_video",)
    if dataset == "lsmdc":
        assert len(load_dataset(dataset, "train", root)) == 5
        assert len(load_dataset(dataset, "train", root, family="glscl")) == 4


def test_listed_videos_without_captions_are_counted():
    dataset = load_dataset("msrvtt", "train", golden_path("datasets", "msrvtt"))
    assert dataset.without_text == ("video9",)
    assert "video9" not in dataset.videos
    dataset = load_dataset("activitynet", "train", golden_path("datasets", "activitynet"))
    assert dataset.without_text == ("nocaption00",)
