"""The explorer without a browser: its numbers are the package's, and what goes wrong is told, not raised."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from xclip_lab import create_model, evaluate, study
from xclip_lab.attention import explain
from xclip_lab.checkpoint import save_model
from xclip_lab.config import save_config
from xclip_lab.errors import ConfigError, DatasetError
from xclip_lab.explorer import Explorer, Settings, open_gallery, rescored, trained_settings, view
from xclip_lab.explorer.gallery import Film, Gallery
from xclip_lab.features import embed
from xclip_lab.heads.xclip import CONTRASTS
from xclip_lab.runs import prepare_data


def noisy_model(config, seed: int = 0):
    """A model whose head has nothing left of its identity matrices, so that every setting matters."""
    model = create_model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.head.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    config = study.configure(
        "quickstart", {"data.root": str(tmp_path_factory.mktemp("explorer") / "clips")}, smoke=True
    )
    prepare_data(config, progress=False)
    return config


@pytest.fixture(scope="module")
def dataset(config):
    return study.open_split(config, "test")


@pytest.fixture(scope="module")
def gallery(config, dataset):
    torch.manual_seed(0)
    return open_gallery("run", noisy_model(config), dataset, config)


@pytest.fixture(scope="module")
def root(config, tmp_path_factory):
    """Two runs in a folder, as `fit` leaves them."""
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("one", "two")):
        (root / name / "checkpoints" / "last").mkdir(parents=True)
        torch.manual_seed(seed)
        save_model(noisy_model(config, seed), root / name / "checkpoints" / "last")
        save_config(config, root / name / "config.yaml")
    return root


@pytest.fixture
def explorer(root, tmp_path):
    return Explorer(root / "one", root=root, out=tmp_path / "out")


def told(explorer) -> str:
    """All messages on the screen."""
    return "".join(panel.message.value for panel in explorer.panels) + explorer.message.value


QUERY = "a red circle moves right"


@pytest.mark.parametrize("contrasts", [CONTRASTS, ("frame-word",), ("video-word", "sentence-frame")])
def test_scores_are_those_of_a_model_built_with_the_settings(config, dataset, gallery, contrasts):
    head = dataclasses.replace(config.head, temperature=0.7, contrasts=contrasts)
    built = create_model(dataclasses.replace(config.model, head=head)).eval()
    built.load_state_dict(gallery.model.state_dict())
    settings = Settings(0.7, {name: float(name in contrasts) for name in CONTRASTS})
    expected = open_gallery("built", built, dataset, config).scores(QUERY, trained_settings(built))
    np.testing.assert_array_equal(gallery.scores(QUERY, settings), expected)
    assert not np.array_equal(expected, gallery.scores(QUERY, trained_settings(gallery.model)))


def test_weights_are_a_weighted_mean_of_the_contrasts(gallery):
    weights = dict(zip(CONTRASTS, (0.2, 1.0, 0.0, 0.6), strict=True))
    alone = [gallery.scores(QUERY, Settings(0.1, {name: 1.0})) for name in CONTRASTS]
    expected = np.average(alone, axis=0, weights=list(weights.values()))
    np.testing.assert_allclose(gallery.scores(QUERY, Settings(0.1, weights)), expected, rtol=1e-5)


def test_the_model_is_as_before_also_after_an_error(gallery):
    model, before = gallery.model, gallery.model.config
    scores = gallery.scores(QUERY, trained_settings(model))
    with pytest.raises(RuntimeError, match="stop"), rescored(model, Settings(1.0, {"frame-word": 0.5})):
        raise RuntimeError("stop")
    with pytest.raises(ConfigError, match="weight 0"), rescored(model, Settings(1.0, {"frame-word": 0.0})):
        pass
    assert model.config is before
    assert model.head.config is before.head
    np.testing.assert_array_equal(gallery.scores(QUERY, trained_settings(model)), scores)


def test_the_ranking_is_that_of_evaluate(config, dataset, gallery):
    result = evaluate(gallery.model, dataset, config, progress=False)
    settings = trained_settings(gallery.model)
    for row, caption in enumerate(result.captions):
        scores = gallery.scores(caption, settings)
        np.testing.assert_allclose(scores, result.similarity[row], rtol=1e-4, atol=1e-4)
        assert gallery.rank(scores, gallery.own_video[caption]) == result.ranks["t2v"][row]
    missed = {result.captions[row] for row in np.flatnonzero(result.ranks["t2v"] > 1)}
    assert gallery.missed == missed


def test_contributions_of_any_settings_add_up_to_the_score(gallery):
    video = gallery.dataset.videos[3]
    for settings in (
        trained_settings(gallery.model),
        Settings(0.4, dict.fromkeys(CONTRASTS, 0.3) | {"frame-word": 1}),
    ):
        found = gallery.detail(QUERY, video, settings)
        assert sum(found.parts.values()) == pytest.approx(found.logit, rel=1e-5)
        assert found.logit == pytest.approx(float(gallery.scores(QUERY, settings)[3]), rel=1e-5)


def test_the_explanation_of_cached_features_is_that_of_the_clip(config, dataset, gallery):
    clip = study.read_clip(study.open_clips(dataset, config), 2)
    one = explain(gallery.model, clip)
    other = gallery.explain(clip.caption, clip.video_id, trained_settings(gallery.model))
    for name in ("similarity", "over_words", "over_frames", "frame_weights", "word_weights", "timestamps"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=1e-4, atol=1e-5)
    assert other.tokens == one.tokens
    assert other.pixels.shape == one.pixels.shape
    assert np.abs(other.pixels.astype(int) - one.pixels).mean() < 8  # a JPEG


@pytest.mark.parametrize(
    ("preset", "matrix"),
    [("quickstart-wti", True), ("quickstart-seqTransf", False), ("quickstart-glscl", False)],
)
def test_a_head_without_aosm_shows_what_it_has(config, dataset, preset, matrix):
    other = study.configure(preset, {"data.root": config.data.root}, smoke=True)
    gallery = open_gallery("other", create_model(other).eval(), dataset, other)
    settings, video = trained_settings(gallery.model), dataset.videos[1]
    found = gallery.detail(QUERY, video, settings)
    assert found.explanation is None
    assert (found.matrix is not None) == matrix
    assert "has no AOSM" in found.note
    assert found.logit == pytest.approx(float(gallery.scores(QUERY, settings)[1]), rel=1e-4, abs=1e-5)
    assert "(d)" in view.detail("its caption", found, gallery.film(video))


def test_stored_features_give_the_same_and_a_file_that_is_gone_is_told(config, dataset, gallery, tmp_path):
    embed(gallery.model, dataset, config, tmp_path / "features", progress=False)
    root = tmp_path / "clips"
    shutil.copytree(config.data.root, root)
    gone = dataset.videos[4]
    (root / "videos" / f"{gone}.mp4").unlink()
    data = dataclasses.replace(config.data, root=str(root), features=str(tmp_path / "features"))
    moved = dataclasses.replace(config, data=data)
    stored = open_gallery("stored", gallery.model, study.open_split(moved, "test"), moved)
    settings = trained_settings(gallery.model)
    np.testing.assert_allclose(stored.scores(QUERY, settings), gallery.scores(QUERY, settings), rtol=1e-4)
    assert "xl-none" in view.result_row(stored, gone, 1, 0.0, False, False)
    shown = view.detail("", stored.detail(QUERY, gone, settings), stored.film(gone))
    assert "its frames are not shown" in shown
    assert list(stored.films) == [gone]  # nothing is decoded before it is shown
    other = dataset.videos[2]
    np.testing.assert_array_equal(stored.film(other).pixels(), gallery.film(other).pixels())
    assert stored.missed == gallery.missed
    (root / "videos" / f"{dataset.videos[3]}.mp4").write_bytes(b"no video")
    assert f"{dataset.videos[3]}.mp4: PyAV" in stored.film(dataset.videos[3]).reason

    decoded = dataclasses.replace(moved, data=dataclasses.replace(data, features=None))
    left = open_gallery("left", gallery.model, study.open_split(decoded, "test"), decoded)
    assert gone not in left.column
    assert list(left.broken) == [dataset.videos[3], gone]
    shutil.rmtree(root / "videos")
    with pytest.raises(DatasetError, match="no video can be read"):
        open_gallery("none", gallery.model, study.open_split(decoded, "test"), decoded)


def test_a_matrix_shows_its_values_where_they_stand(gallery):
    video = gallery.dataset.videos[0]
    found = gallery.detail("a <b>red</b> circle", video, trained_settings(gallery.model))
    film = gallery.film(video)
    shown = view.detail('"quoted" & <i>', found, film)
    first, *others = shown.split('<div class="xl-map"')[1:]
    values = [float(value) for value in re.findall(r's: (-?[\d.]+)"></td>', first)]
    np.testing.assert_allclose(values, found.matrix.ravel(), atol=6e-5)
    assert len(others) == 2
    for table in (first, *others):
        assert f"<th colspan={found.matrix.shape[1]}><img" in table
    assert film.pixels().shape[0] == found.matrix.shape[1]
    assert "<i>" not in shown.replace("<i style", "")
    assert "&quot;quoted&quot;" in shown
    assert "<b>red" not in shown


def test_large_frames_become_small(config, dataset):
    larger = study.configure(
        "quickstart", {"data.root": config.data.root, "towers.architecture.image_size": 160}, smoke=True
    )
    gallery = open_gallery("larger", create_model(larger).eval(), dataset, larger)
    assert gallery.film(dataset.videos[0]).pixels().shape[1:] == (3, 112, 112)
    assert Film(b"", b"", np.array([np.nan]), "gone").pixels().shape == (1, 3, 112, 112)


def test_asking_choosing_and_setting(explorer, gallery):
    panel = explorer.panels[0]
    model = panel.gallery.model
    assert explorer.asked == explorer.dataset.samples[0].caption
    explorer.query.value = QUERY
    expected = panel.gallery.scores(QUERY, trained_settings(model))
    assert panel.order[0] == explorer.chosen == panel.gallery.dataset.videos[expected.argmax()]
    assert f"{expected.max():.3f}" in panel.rows[0].value
    assert "typed query" in panel.head.value
    before = panel.detail.value
    panel.picks[2].click()
    assert explorer.chosen == panel.order[2]
    assert panel.detail.value != before
    panel.temperature.value = 1.0
    assert (
        panel.scores.tolist()
        == panel.gallery.scores(QUERY, Settings(1.0, dict.fromkeys(CONTRASTS, 1.0))).tolist()
    )
    assert panel.scores.tolist() != expected.tolist()
    panel.weights["frame-word"].value = 0
    assert "no AOSM" in panel.detail.value
    panel.reset.click()
    np.testing.assert_array_equal(panel.scores, expected)
    explorer.captions.value = explorer.dataset.samples[5].caption
    assert "own video at rank" in panel.head.value
    assert sum('class="xl-tag"' in row.value for row in panel.rows[: len(panel.shown)]) == 1
    assert not told(explorer)


def test_a_query_that_cannot_be_answered_is_told(explorer):
    panel = explorer.panels[0]
    for query in ("   ", "?! ..."):
        explorer.query.value = query
        assert "the query has no words" in told(explorer)
        assert not panel.shown
        assert not panel.detail.value
        assert all(line.layout.display == "none" for line in panel.lines)
    explorer.query.value = "a red circle " * 30
    assert "is not read" in told(explorer)
    assert panel.shown
    for slider in panel.weights.values():
        slider.value = 0
    assert "all contrasts have weight 0" in told(explorer)
    assert not panel.shown
    panel.reset.click()
    assert panel.shown
    explorer.query.value = QUERY
    assert not told(explorer)


def test_filters_offer_what_evaluate_says(root, config, dataset):
    explorer = Explorer(root / "one", root / "two", root=root)
    ranks = [panel.gallery.missed for panel in explorer.panels]
    captions = {sample.caption for sample in dataset.samples}
    explorer.failures.value = True
    assert set(explorer.captions.options) == ranks[0] | ranks[1]
    explorer.disagreements.value = True
    assert set(explorer.captions.options) == ranks[0] ^ ranks[1]
    assert explorer.query.value in explorer.captions.options
    explorer.failures.value = False
    for panel in explorer.panels:
        panel.gallery.__dict__["missed"] = set()
    explorer.failures.value = True
    assert "no caption passes the filters" in told(explorer)
    assert not explorer.panels[0].shown
    explorer.failures.value = explorer.disagreements.value = False
    assert set(explorer.captions.options) == captions
    assert explorer.panels[1].shown
    assert not told(explorer)


def break_checkpoint(run):
    (run / "checkpoints/last/model.safetensors").write_bytes(b"no model")


def break_config(run):
    (run / "config.yaml").write_text("{ preset: [")


def remove_checkpoint(run):
    shutil.rmtree(run / "checkpoints")


def plant_nan(run):
    from xclip_lab import load_model

    model = load_model(run)
    torch.nn.init.constant_(model.head.global_mat_weight, torch.nan)
    save_model(model, run / "checkpoints/last")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_checkpoint, "is damaged or not a checkpoint"),
        (break_config, "config.yaml"),
        (remove_checkpoint, "no checkpoint in"),
        (plant_nan, "the similarity is not a number for 12 videos"),
    ],
)
def test_a_broken_run_is_told_beside_one_that_works(root, tmp_path, damage, message):
    runs = tmp_path / "runs"
    shutil.copytree(root, runs)
    damage(runs / "two")
    explorer = Explorer(runs / "one", runs / "two", root=runs)
    assert message in explorer.panels[1].message.value
    assert "Traceback" not in told(explorer)
    assert explorer.panels[0].shown
    assert not explorer.panels[1].shown
    explorer.beside_box.value = "(none)"
    assert not told(explorer)
    alone = Explorer(runs / "two", root=runs)
    assert message in told(alone)
    assert alone.export_figures() == []
    assert "nothing on the screen to save" in told(alone)
    alone.run_box.value = str(runs / "one")
    assert alone.panels[0].shown
    assert not told(alone)


def test_a_run_whose_data_are_gone_is_told(root, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(root, runs)
    config = study.load_config(runs / "one" / "config.yaml", {"data.root": str(tmp_path / "nowhere")})
    save_config(config, runs / "one" / "config.yaml")
    assert "nowhere" in told(Explorer(runs / "one", root=runs))
    assert "needs a config" in told(Explorer(root=runs))


def test_a_fault_of_the_explorers_own_is_told_and_not_hidden(explorer, monkeypatch):
    monkeypatch.setattr(Gallery, "scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explorer.query.value = QUERY
    assert "please report it: ZeroDivisionError" in told(explorer)


def test_two_columns_of_one_name_are_saved_apart(explorer):
    explorer.beside_box.value = explorer.run_box.value
    assert len(explorer.figures()) == 4


def test_figures_and_settings_are_saved_and_it_says_where(explorer, tmp_path):
    panel = explorer.panels[0]
    chosen = panel.order[1]
    explorer.choose(chosen)
    panel.temperature.value = 0.5
    explorer.save_figures.click()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == 4
    assert {name.rsplit(".")[-1] for name in names} == {"pdf", "png"}
    assert all(name.rsplit(".")[0] in told(explorer) for name in names)
    explorer.save_settings.click()
    [path] = (tmp_path / "out").glob("*.json")
    assert str(path) in told(explorer)
    saved = json.loads(path.read_text())
    assert saved["query"] == explorer.asked
    assert saved["video"] == chosen
    assert saved["runs"][0]["temperature"] == 0.5
    assert saved["runs"][0]["weights"] == dict.fromkeys(CONTRASTS, 1.0)
    explorer.out = tmp_path / "out" / path.name / "below a file"
    explorer.save_settings.click()
    assert "choose another place" in told(explorer)
