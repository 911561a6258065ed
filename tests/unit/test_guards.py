"""Test videos in training, and numbers of unlike protocols, are found before a number is made."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shared import golden_path, needs_shared, shared
from tests.unit.training import film, frames_of, tiny_config, tiny_dataset, train_tiny
from tests.videos import write_video
from xclip_lab import Sample, VideoTextDataset, evaluate, fit, load_dataset, load_model
from xclip_lab.errors import CheckpointError, ConfigError, DatasetError
from xclip_lab.guards import check_comparable, check_evaluation, check_training
from xclip_lab.model import RetrievalModel
from xclip_lab.result import Result
from xclip_lab.seen import read_seen, write_seen
from xclip_lab.study import open_training_splits


def split_of(name, *videos, **details):
    samples = [Sample(video, f"caption of {video}") for video in videos]
    return VideoTextDataset("toy", name, Path("."), samples, **details)


def test_shared_videos_stop_a_training_unless_their_number_is_named(capsys):
    train, test = split_of("train", "a", "b", "c"), split_of("test", "c", "d", "b")
    with pytest.raises(
        DatasetError, match=r"2 of the 3 videos of 'test' are in 'train' too: c, b.*overlap=2"
    ):
        check_training(train, test)
    with pytest.raises(DatasetError, match="2 of the 3"):
        check_training(train, test, allowed=1)
    check_training(train, test, allowed=2)
    check_training(train, split_of("test", "a", undivided=True))
    assert capsys.readouterr().out.count("attention") == 2
    check_training(train, split_of("test", "d"))
    assert capsys.readouterr().out == ""


def test_the_same_file_under_another_name(tmp_path):
    write_video(tmp_path / "a.mp4", 10)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    write_video(tmp_path / "other.mp4", 12)
    train = VideoTextDataset("toy", "train", tmp_path, [Sample("a", "x", path=tmp_path / "a.mp4")])
    names = ("copy", "other")
    samples = [Sample(name, "y", path=tmp_path / f"{name}.mp4") for name in names]
    with pytest.raises(DatasetError, match=r"1 of the 2 videos .*: copy \(the file of a\)"):
        check_training(train, VideoTextDataset("toy", "test", tmp_path, samples))
    parts = [Sample("one", "x", 0, 5, tmp_path / "a.mp4"), Sample("two", "y", 5, 9, tmp_path / "a.mp4")]
    first, second = (VideoTextDataset("toy", "s", tmp_path, [part]) for part in parts)
    check_training(first, second)  # stretches that do not meet


def test_fit_looks_at_validation(tmp_path):
    config, train = tiny_config(), tiny_dataset(8)
    with pytest.raises(DatasetError, match="4 of the 4 videos of 'val' are in 'train' too"):
        fit(RetrievalModel(config.model), config, train, tmp_path, val=tiny_dataset(4, "val"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_result_knows_what_its_model_was_trained_on(tmp_path):
    train_tiny(tmp_path / "run", {"train.max_steps": 1})
    model, config = load_model(tmp_path / "run"), tiny_config({"evaluation.bootstrap": 0})
    elsewhere = film(tiny_dataset(3, "test"), tmp_path)
    assert evaluate(model, elsewhere, config).stamp["trained_on"] is None  # the same names mean nothing there
    seen = dataclasses.replace(elsewhere, root=tiny_dataset().root)
    with pytest.raises(DatasetError, match="trained on 3 of the 3 videos of 'test': v0, v1, v2"):
        evaluate(model, seen, config)
    allowing = tiny_config({"evaluation.bootstrap": 0, "data.allow_overlap": 3})
    result = evaluate(model, seen, allowing)
    assert result.stamp["trained_on"] == 3
    assert "trained on 3 of these videos" in str(result)
    assert evaluate(model, dataclasses.replace(seen, split="train"), config).stamp["trained_on"] == 3
    fresh = evaluate(RetrievalModel(config.model), seen, config)
    assert fresh.stamp["trained_on"] is None
    assert "trained on" not in str(fresh)
    other = dataclasses.replace(
        seen, samples=[dataclasses.replace(s, video_id=f"w{s.video_id}") for s in seen.samples]
    )
    assert evaluate(model, other, config).stamp["trained_on"] == 0


def test_what_a_run_saw_is_kept_by_place_protocol_and_split(tmp_path):
    train_tiny(tmp_path / "first", {"train.max_steps": 1})
    val = split_of("val", "e", protocol="one")
    both = read_seen(tmp_path / "first").with_run(split_of("train", "a", "b", protocol="one"), val)
    (tmp_path / "second").mkdir()
    write_seen(tmp_path / "second", both)
    assert read_seen(tmp_path / "second") == both
    assert check_evaluation(both, split_of("test", "c")) == {"trained_on": 0, "selected_on": 0}
    with pytest.raises(DatasetError, match="trained on 1 of the 2"):
        check_evaluation(both, split_of("test", "c", "a"))
    with pytest.raises(DatasetError, match="selected by 1 of the 2"):
        check_evaluation(both, split_of("test", "c", "e"))
    assert check_evaluation(both, val) == {"trained_on": 0, "selected_on": 1}
    with pytest.raises(DatasetError, match="selected by"):
        check_evaluation(both, split_of("val", "e", protocol="two"))
    elsewhere = dataclasses.replace(split_of("test", "a"), root=tmp_path)
    assert check_evaluation(both, elsewhere) == {"trained_on": None, "selected_on": None}
    (tmp_path / "second" / "seen_videos.json").write_text("[1")
    with pytest.raises(CheckpointError, match="damaged"):
        read_seen(tmp_path / "second")


def result_of(**stamp):
    usual = {"dataset": "vatex", "protocol": "hgr", "split": "test", "dataset_fingerprint": "f"}
    usual |= {"ties": "pessimistic", "intervals": None, "seed": 0, "post_processing": "none"}
    gallery = {"captions": ["x", "y"], "videos": ["a", "b"], "rows": np.arange(2)}
    return Result.rank(np.eye(2), np.arange(2), np.arange(2), usual | stamp, **gallery)


def test_unlike_results_are_not_compared():
    check_comparable({"one": result_of(), "two": result_of()})
    with pytest.raises(DatasetError, match="one has protocol 'hgr', two has protocol 'random-1k5'"):
        check_comparable({"one": result_of(), "two": result_of(protocol="random-1k5")})
    with pytest.raises(DatasetError, match="split"):
        check_comparable({"one": result_of(), "two": result_of(split="val")})
    partial = dataclasses.replace(result_of(), videos=["a", "c"])
    with pytest.raises(DatasetError, match="different videos missing"):
        check_comparable({"one": result_of(), "two": partial})


@needs_shared("annotations", "msrvtt")
def test_msrvtt_9k_holds_1990_of_the_full_test():
    root = shared("annotations", "msrvtt")
    train, test = load_dataset("msrvtt", "train", root, "9k"), load_dataset("msrvtt", "test", root, "full")
    with pytest.raises(DatasetError, match=r"1990 of the 2990 videos of 'test' \(msrvtt, protocol full\)"):
        check_training(train, test)
    check_training(train, load_dataset("msrvtt", "test", root, "9k"))
    for protocol in ("7k", "full"):
        check_training(*(load_dataset("msrvtt", split, root, protocol) for split in ("train", "test")))


@needs_shared("annotations", "msvd")
def test_msvd_shares_none():
    root = shared("annotations", "msvd")
    train = load_dataset("msvd", "train", root)
    for split in ("val", "test"):
        check_training(train, load_dataset("msvd", split, root))


def test_towers_of_a_run_keep_what_that_run_saw(tmp_path):
    first = train_tiny(tmp_path / "first", {"train.max_steps": 1})
    towers = str(first.checkpoint / "model.safetensors")
    config = tiny_config({"towers.pretrained": towers, "train.max_steps": 1})
    model = RetrievalModel(config.model)
    loaded = load_model(tmp_path / "first").state_dict()
    assert all(torch.equal(loaded[f"clip.{name}"], value) for name, value in model.clip.state_dict().items())
    samples = [dataclasses.replace(s, video_id=f"w{s.video_id}") for s in tiny_dataset().samples]
    other = VideoTextDataset("another", "train", ".", samples)
    fit(model, config, other, tmp_path / "second", store=frames_of(other), progress=False)
    assert {place.split()[0] for place in read_seen(tmp_path / "second").trained} == {"tiny", "another"}


def test_folders_of_frames_are_compared_by_content(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = np.full((8, 8, 3), 40 * number + (name == "c"), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    train, twin, other = (
        VideoTextDataset("toy", split, tmp_path, [Sample(name, "x", path=tmp_path / name)])
        for split, name in (("train", "a"), ("test", "b"), ("test", "c"))
    )
    check_training(train, other)
    with pytest.raises(DatasetError, match="the file of a"):
        check_training(train, twin)


def test_training_on_the_test_split_by_another_name(tmp_path, capsys):
    root = golden_path("datasets", "msrvtt")
    settings = {"data.dataset": "msrvtt", "data.root": str(root), "data.val_split": None}
    with pytest.raises(ConfigError, match="'val' of msrvtt is its 'test'"):
        open_training_splits(tiny_config({**settings, "data.train_split": "val"}))
    open_training_splits(tiny_config(settings))
    shutil.copytree(root, tmp_path / "m")
    table = tmp_path / "m" / "MSRVTT_JSFUSION_test.csv"
    table.write_text(table.read_text().replace("video_id", "vidoe_id"))
    with pytest.raises(DatasetError, match="video_id"):
        open_training_splits(tiny_config({**settings, "data.root": str(tmp_path / "m")}))
    table.unlink()
    capsys.readouterr()
    open_training_splits(tiny_config({**settings, "data.root": str(tmp_path / "m")}))
    assert "not known" in capsys.readouterr().out


def test_a_gallery_of_another_size_says_so():
    result = result_of(known_videos=1000)
    assert "the protocol has 1,000 videos here, not 2" in str(
        dataclasses.replace(result, stamp=result.stamp | {"missing_videos": [], "selection_split": None})
    )
