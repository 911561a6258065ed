"""Test videos in training, and numbers of unlike protocols, are found before a number is made."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from tests.shared import needs_shared, shared
from tests.unit.training import film, frames_of, tiny_config, tiny_dataset, train_tiny
from tests.videos import write_video
from xclip_lab import Sample, VideoTextDataset, evaluate, fit, guards, load_dataset, load_model
from xclip_lab.errors import CheckpointError, DatasetError
from xclip_lab.guards import check_comparable, check_evaluation, check_training
from xclip_lab.model import RetrievalModel
from xclip_lab.result import Result


def split_of(name, *videos, **details):
    samples = [Sample(video, f"caption of {video}") for video in videos]
    return VideoTextDataset("toy", name, ".", samples, **details)


def test_shared_videos_stop_a_training_unless_their_number_is_named(capsys):
    train, test = split_of("train", "a", "b", "c"), split_of("test", "c", "d", "b")
    with pytest.raises(
        DatasetError, match=r"2 of the 3 videos of 'test' are in 'train' too: c, b.*overlap=2"
    ):
        check_training(train, [test])
    with pytest.raises(DatasetError, match="2 of the 3"):
        check_training(train, [test], allowed=1)
    check_training(train, [test], allowed=2)
    check_training(train, [split_of("test", "a", undivided=True)])
    assert capsys.readouterr().out.count("attention") == 2
    check_training(train, [split_of("test", "d")])
    assert capsys.readouterr().out == ""


def test_the_same_file_under_another_name(tmp_path):
    write_video(tmp_path / "a.mp4", 10)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    write_video(tmp_path / "other.mp4", 12)
    train = VideoTextDataset("toy", "train", tmp_path, [Sample("a", "x", path=tmp_path / "a.mp4")])
    names = ("copy", "other")
    samples = [Sample(name, "y", path=tmp_path / f"{name}.mp4") for name in names]
    with pytest.raises(DatasetError, match=r"1 of the 2 videos .*: copy \(the file of a\)"):
        check_training(train, [VideoTextDataset("toy", "test", tmp_path, samples)])
    parts = [Sample("one", "x", 0, 5, tmp_path / "a.mp4"), Sample("two", "y", 5, 9, tmp_path / "a.mp4")]
    first, second = (VideoTextDataset("toy", "s", tmp_path, [part]) for part in parts)
    check_training(first, [second])  # stretches that do not meet


def test_fit_looks_at_validation(tmp_path):
    config, train = tiny_config(), tiny_dataset(8)
    with pytest.raises(DatasetError, match="4 of the 4 videos of 'val' are in 'train' too"):
        fit(RetrievalModel(config.model), config, train, tmp_path, val=tiny_dataset(4, "val"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_result_knows_what_its_model_was_trained_on(tmp_path):
    train_tiny(tmp_path / "run", {"train.max_steps": 1})
    model, config = load_model(tmp_path / "run"), tiny_config({"evaluation.bootstrap": 0})
    for folder in ("seen", "unseen"):
        (tmp_path / folder).mkdir()
    seen = film(tiny_dataset(3, "test"), tmp_path / "seen")
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


def test_a_start_from_a_run_keeps_what_that_run_saw(tmp_path):
    train_tiny(tmp_path / "first", {"train.max_steps": 1})
    first = guards.read_training(tmp_path / "first")
    (tmp_path / "second").mkdir()
    guards.record_training(tmp_path / "second", split_of("train", "a", "b"), first)
    both = guards.read_training(tmp_path / "second")
    assert set(both) == {"tiny", "toy"}
    assert check_evaluation(both, split_of("test", "c")) == 0
    with pytest.raises(DatasetError, match="1 of the 2"):
        check_evaluation(both, split_of("test", "c", "a"))
    (tmp_path / "second" / guards.TRAINED_ON).write_text("[1")
    with pytest.raises(CheckpointError, match="damaged"):
        guards.read_training(tmp_path / "second")


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
        check_training(train, [test])
    check_training(train, [load_dataset("msrvtt", "test", root, "9k")])
    for protocol in ("7k", "full"):
        check_training(
            load_dataset("msrvtt", "train", root, protocol), [load_dataset("msrvtt", "test", root, protocol)]
        )


@needs_shared("annotations", "msvd")
def test_msvd_shares_none():
    root = shared("annotations", "msvd")
    train = load_dataset("msvd", "train", root)
    check_training(train, [load_dataset("msvd", split, root) for split in ("val", "test")])


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
    assert set(guards.read_training(tmp_path / "second")) == {"tiny", "another"}
