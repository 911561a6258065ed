"""The pointing statistic, on attention whose answer is known, over clips that were really generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from xclip_lab import study, text
from xclip_lab.attention import replaced
from xclip_lab.errors import DatasetError
from xclip_lab.pointing import Pointing, point_at_truth
from xclip_lab.runs import prepare_data

TAP = "head.frame_softmax"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Config, model, clips and truth. Half of the captions come in pairs."""
    torch.set_num_threads(1)
    overrides = {"data.root": str(tmp_path_factory.mktemp("pointing") / "clips"), "max_frames": 8}
    overrides["data.generate"] = {"train_clips": 1, "test_clips": 30, "size": 32, "frames": 16}
    config = study.configure("quickstart", overrides, smoke=True)
    prepare_data(config, progress=False)
    clips = study.open_clips(study.open_split(config, "test"), config)
    return config, study.new_model(config), clips, study.find_truth(config, "test")


def planted(setting, look: Callable[[np.ndarray], np.ndarray], **options) -> Pointing:
    """The score of an attention that looks where `look` says, given the frames of each token's word."""
    config, model, clips, truth = setting
    maps = []
    for clip in map(clips.__getitem__, range(len(clips))):
        own = truth[clip.video_id].at(clip.timestamps.numpy())
        words = text.token_words(clip.caption, config.max_words)
        rows = np.array([own[word] if word >= 0 else np.ones_like(own[0]) for word in words])
        weights = look(rows).astype(np.float32)
        maps.append(weights / np.maximum(weights.sum(1, keepdims=True), 1))
    left = iter(maps)

    def plant(weights: torch.Tensor) -> torch.Tensor:
        """All pairs of a batch get their text's map: scored is only the pair of text and own video."""
        batch = np.stack([next(left) for _ in weights])
        return torch.from_numpy(batch)[:, None].expand_as(weights)

    with replaced(model, {TAP: plant}):
        score = point_at_truth(model, clips.dataset, truth, config, clips.store, **options)
    assert next(left, None) is None
    return score


def test_attention_that_is_the_truth_points(setting):
    score = planted(setting, lambda own: own)
    np.testing.assert_allclose(score.words["inside"], 1, atol=1e-6)
    assert score.excess.value == pytest.approx(1 - score.words["uniform"].mean())
    assert score.ratio == pytest.approx(1 / score.words["uniform"].mean())
    assert score.points
    assert "points at the truth" in str(score)


def test_uniform_attention_does_not(setting):
    score = planted(setting, np.ones_like)
    np.testing.assert_allclose(score.words["inside"], score.words["uniform"], atol=1e-6)
    assert score.excess.value == pytest.approx(0, abs=1e-6)
    assert score.ratio == pytest.approx(1)
    assert not score.points
    assert "does not point" in str(score)


def test_attention_beside_the_truth_does_not(setting):
    score = planted(setting, np.logical_not)
    np.testing.assert_allclose(score.words["inside"], 0, atol=1e-6)
    assert score.excess.high < 0
    assert not score.points


def test_the_truth_does_not_point_at_a_shuffled_one(setting):
    score = planted(setting, lambda own: own, shuffle_truth=True)
    assert 0.7 < score.ratio < 1.3
    assert not score.points


def test_a_map_that_points_a_little_does_not_count(setting):
    """Its interval lies above 0, but the mean is less than 1.5 times uniform."""
    score = planted(setting, lambda own: 1 + 0.3 * own)
    assert score.excess.low > 0
    assert 1 < score.ratio < 1.5
    assert not score.points


def test_only_content_words_are_scored_and_pairs_are_drawn_together(setting):
    config, model, clips, truth = setting
    score = point_at_truth(model, clips.dataset, truth, config, clips.store)
    words = score.words
    assert set(words["word_class"]) == {"colour", "shape", "motion"}
    expected = sum(kind in ("colour", "shape", "motion") for clip in truth.values() for kind in clip.classes)
    assert len(words) == expected
    groups = [truth[video].group for video in words["video_id"]]
    assert words["cluster"].tolist() == groups
    assert words["cluster"].nunique() < words["video_id"].nunique()


def test_the_models_own_lengths_are_used(setting):
    config, model, clips, truth = setting
    settings = dataclasses.replace(config, max_frames=5, max_words=7)
    again = point_at_truth(model, clips.dataset, truth, settings, clips.store)
    first = point_at_truth(model, clips.dataset, truth, config, clips.store)
    assert again.words.equals(first.words)


def test_nothing_to_point_at_is_said(setting):
    config, model, clips, truth = setting
    blank = {
        video: dataclasses.replace(clip, classes=["function"] * len(clip.classes))
        for video, clip in truth.items()
    }
    with pytest.raises(DatasetError, match="no colour, shape, motion word"):
        point_at_truth(model, clips.dataset, blank, config, clips.store)
