"""Maps of every head in one shape, and the study on planted attention whose scores are known."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from xclip_lab import attention_plots, attention_study, attention_study_plots, study, text
from xclip_lab.attention import replaced
from xclip_lab.attention_maps import BASELINES, clip_pair, each_pair, pair_maps, patch_attention
from xclip_lab.model import evaluating
from xclip_lab.runs import prepare_data

CLIPS = 12
HEADS = {
    "quickstart": {"frame_softmax", "word_softmax", "video_to_word_softmax", "aosm", "agg_module"},
    "quickstart-clip2video": {"centers", "agg_module"},
    "quickstart-glscl": {"queries", "query_words", "query_frames", "frame_softmax", "agg_module"},
    "quickstart-maxsim": {"interaction"},
    "quickstart-ti": {"interaction"},
    "quickstart-wti": {"interaction", "word_softmax", "frame_softmax"},
    "quickstart-meanP": set(),
    "quickstart-seqLSTM": set(),
    "quickstart-tightTransf": {"cross"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict:
    torch.set_num_threads(1)
    root = str(tmp_path_factory.mktemp("attention") / "clips")
    return {"data.root": root, "max_frames": 8, "temporal.layers": 2}


def opened(preset: str, place: dict):
    """Config, model and clips; the clips are the same for all."""
    config = study.configure(preset, place, smoke=True)
    prepare_data(config, progress=False)
    return config, study.new_model(config).eval(), study.open_clips(study.open_split(config, "test"), config)


@pytest.mark.parametrize("preset", HEADS)
def test_maps_of_every_head(preset, place):
    config, model, clips = opened(preset, place)
    seen = next(pair_maps(model, clips.dataset, config, clips.store))
    maps = seen.maps
    assert HEADS[preset] | {*BASELINES, "text_tower"} <= maps.keys()
    tokens, frames = seen.batch.text_mask, seen.batch.video_mask
    for name, found in maps.items():
        rows, columns = found.values.shape[1:]
        assert found.axes == {(1, 8): "frames", (24, 1): "words", (24, 8): "words x frames"}[rows, columns]
        assert found.values.isfinite().all(), name
        if found.over and name not in ("uniform", "centers", "cross"):
            axes = {"frames": (2,), "words": (1,), "both": (1, 2)}[found.over]
            torch.testing.assert_close(found.values.sum(axes), torch.ones_like(found.values.sum(axes)))
    assert not maps["text_tower"].values[tokens == 0].any()
    assert torch.equal(maps["uniform"].values[:, 0], frames.float())


@pytest.mark.parametrize("preset", ["quickstart-maxsim", "quickstart-ti", "quickstart-wti"])
def test_an_interaction_is_what_the_score_is_made_of(preset, place):
    config, model, clips = opened(preset, place)
    seen = next(pair_maps(model, clips.dataset, config, clips.store))
    with evaluating(model):
        video = model.encode_video(seen.features, seen.batch.video_mask)
        logits = model.similarity(seen.text, video).diagonal() / model.logit_scale.exp()
    summed = (seen.maps["interaction"].values * seen.maps["similarity"].values).sum((1, 2))
    torch.testing.assert_close(summed, logits, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_that_of_the_own_pair(place):
    """Halving a frame's vector changes the logit by the map's value, to first order."""
    config, model, clips = opened("quickstart-meanP", place)
    seen = next(pair_maps(model, clips.dataset, config, clips.store))
    step = 1e-3
    with evaluating(model):
        for frame in (0, 5):
            moved = seen.features.clone()
            moved[:, frame] *= 1 + step
            before, after = (
                model.similarity(seen.text, model.encode_video(features, seen.batch.video_mask)).diagonal()
                for features in (seen.features.double().float(), moved)
            )
            expected = seen.maps["gradient"].values[:, 0, frame]
            torch.testing.assert_close((after - before) / step, expected, atol=0.02, rtol=0.05)


def planted(setting, look) -> pd.DataFrame:
    """The study of a model whose attention over frames looks where `look` says, given each token's frames."""
    config, model, clips = setting
    truth = study.find_truth(config, "test")
    maps = []
    for clip in map(clips.__getitem__, range(len(clips))):
        about = truth[clip.video_id]
        own = attention_study.word_frames(about.classes, about.at(clip.timestamps.numpy()))
        words = text.token_words(clip.caption, config.max_words)
        rows = np.array([own[word] if word >= 0 else np.zeros_like(own[0]) for word in words])
        weights = look(rows).astype(np.float32) + 1e-9
        maps.append(weights / weights.sum(1, keepdims=True))
    left = itertools.cycle(maps)

    def plant(weights: torch.Tensor) -> torch.Tensor:
        batch = np.stack([next(left) for _ in range(weights.shape[0])])
        return torch.from_numpy(batch)[:, None].expand_as(weights)

    with replaced(model, {"head.frame_softmax": plant}):
        batches = list(pair_maps(model, clips.dataset, config, clips.store, baselines=False))
    rows = [
        row for pair in each_pair(batches, clips.dataset) for row in attention_study._truth_rows(pair, truth)
    ]
    clusters = {video: number for number, video in enumerate(clips.dataset.videos)}
    table = attention_study._summary(rows, clusters)
    return table[table["map"] == "frame_softmax"].set_index(["measure", "word_class"])


@pytest.mark.parametrize(
    ("look", "expected"), [(lambda own: own, 1.0), (np.ones_like, None), (np.logical_not, 0.0)]
)
def test_planted_attention(place, look, expected):
    """The truth itself scores 1 on every measure and class, uniform is chance, inverted near 0."""
    setting = opened("quickstart", place)
    table = planted(setting, look)
    assert {"colour", "shape", "motion", "order", "function", "content"} <= set(table.loc["mass"].index)
    values = table["value"]
    if expected is None:
        np.testing.assert_allclose(values["pointing"], values["mass"], atol=1e-5)
        assert values["mass", "content"] == pytest.approx(0.5, abs=0.15)
        assert values["precision_recall", "content"] == pytest.approx(0.42, abs=0.12)
    else:
        np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.fixture(scope="module")
def studied(place):
    config, model, clips = opened("quickstart", place)
    models = attention_study.models_to_compare(model, config)
    truth = study.find_truth(config, "test")
    args = (models, clips.dataset, truth, config, clips.store)
    return models, attention_study.attention_study(*args, progress=False)


def test_the_study_is_tidy(studied):
    models, table = studied
    assert list(models) == ["this model", "padding masked", "untrained"]
    assert list(table.columns) == attention_study.COLUMNS
    assert not table.duplicated(["model", "map", "measure", "word_class", "removed"]).any()
    assert ((table["low"] <= table["value"] + 1e-9) & (table["value"] <= table["high"] + 1e-9)).all()
    assert (table["n"] > 0).all()
    values = table.set_index(["model", "map", "measure", "word_class", "removed"])["value"]
    # An untrained model is its own control.
    assert values["untrained", "aosm", "stability", "all", 0] == pytest.approx(1)
    assert values["padding masked", "word_softmax", "padding", "all", 0] == 0
    assert values["this model", "word_softmax", "padding", "all", 0] > 0.2
    assert values["this model", "frame_softmax", "deletion_curve", "all", 0] == 0
    # n/a: frames are no matter of weights over words, and scores are no weights.
    measures = table.groupby("map")["measure"].unique()
    assert set(measures["text_tower"]) == {"padding", "emphasis", "stability"}
    assert "mass" not in measures["similarity"]


def test_the_study_says_that_nothing_points(studied):
    _, table = studied
    verdicts = attention_study.verdicts(table)
    assert not verdicts["points"].any()
    assert "this model: points at the truth: none" in attention_study.report(table)
    assert "this model, shuffled truth: does not point: " in attention_study.report(table)


def test_the_best_map_is_held_against_the_baselines():
    """Above uniform, not told apart from the raw similarity: so the report says."""
    rows = [
        ("m", name, measure, kind, 0, value, value - 0.05, value + 0.05, 9)
        for measure, kind in (("pointing", "content"), ("deletion", "all"))
        for name, value in (("uniform", 0.4), ("similarity", 0.92), ("aosm", 0.9), ("agg_module", 0.5))
    ]
    lines = attention_study.report(pd.DataFrame(rows, columns=attention_study.COLUMNS)).splitlines()
    assert lines[0] == "m: points at the truth: similarity 0.92, aosm 0.90"
    assert lines[1] == "m: does not point: agg_module 0.50 (chance 0.40)"
    expected = "aosm 0.90 is above 0.40 of uniform, is not told apart from 0.92 of similarity"
    assert lines[2:] == [f"pointing: {expected}", f"deletion: {expected}"]


def test_a_part_of_the_captions_is_enough(place):
    config, model, clips = opened("quickstart-wti", place)
    table = attention_study.attention_study(
        {"m": model}, clips.dataset, {}, config, clips.store, most=3, progress=False
    )
    assert table["n"].max() == 3
    assert not {"pointing", "emphasis"} & set(table["measure"])
    assert attention_study.verdicts(table).empty
    assert attention_study.report(table).startswith("deletion: ")


def test_removed_frames_are_as_if_they_had_never_been(place):
    """The logit without the last two frames is that of a clip that ends before them."""
    _, model, clips = opened("quickstart", place)
    clip = study.read_clip(clips, 0)
    pair = clip_pair(model, clip)
    short = clip_pair(
        model, dataclasses.replace(clip, pixels=clip.pixels[:6], timestamps=clip.timestamps[:6])
    )
    logit = attention_study._Logit(model, pair)
    kept = np.arange(8) < 6
    with evaluating(model):
        seen = short.seen
        expected = model.similarity(
            seen.text, model.encode_video(seen.features, seen.batch.video_mask)
        ).item()
    assert logit(np.stack([kept, np.ones(8, bool)]))[0] == pytest.approx(expected, rel=1e-4)


def test_order_words_speak_of_the_clause_that_they_introduce():
    own = np.array([[0, 0], [1, 0], [0, 0], [0, 1], [0, 0]], bool)
    found = attention_study.word_frames(["function", "colour", "order", "motion", "order"], own)
    assert found.tolist() == [[True, False], [True, False], [False, True], [False, True], [False, False]]


def test_frames_stand_above_their_columns(place):
    _, model, clips = opened("quickstart", place)
    clip = study.read_clip(clips, 0)
    figure = attention_plots.maps_figure(clip_pair(model, clip), clip)
    pictures = [axis for axis in figure.axes if axis.images and axis.images[0].get_array().ndim == 3]
    shown = [axis for axis in figure.axes if axis.images and axis.images[0].get_array().shape[1:] == (8,)]
    matrices = [axis for axis in shown if axis.images[0].get_array().shape[0] > 1]
    assert len(pictures) == 8 * len(matrices)
    for number, axis in enumerate(matrices):
        box = axis.get_position()
        for column, picture in enumerate(pictures[8 * number : 8 * (number + 1)]):
            place_of = picture.get_position()
            assert place_of.y0 >= box.y1
            assert box.x0 + box.width * column / 8 <= place_of.x0 + 1e-6
            assert place_of.x1 <= box.x0 + box.width * (column + 1) / 8 + 1e-6


def test_patches_sum_to_what_the_class_token_does_not_keep(place):
    _, model, clips = opened("quickstart", place)
    clip = study.read_clip(clips, 0)
    patches = patch_attention(model, clip)
    assert patches.shape == (8, 2, 2)
    assert ((patches.sum((1, 2)) > 0.2) & (patches.sum((1, 2)) < 1)).all()
    assert len(attention_plots.patch_figure(clip, patches).axes) == 8 + 8 + 1


def test_figures_of_the_study(studied):
    _, table = studied
    panels = [axis for axis in attention_study_plots.measures_figure(table).axes if axis.get_xlabel()]
    assert [axis.get_xlabel() for axis in panels] == list(attention_study_plots.MEASURES.values())
    for axis in attention_study_plots.classes_figure(table, "this model").axes:
        assert [label.get_text() for label in axis.get_xticklabels()][-1] == "function"
    assert attention_study_plots.classes_figure(table[table["measure"] == "padding"], "this model") is None
    curves = attention_study_plots.removal_figure(table, "this model").axes[0].lines
    assert all(line.get_ydata()[0] == 0 for line in curves)
