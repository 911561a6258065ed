"""Runs beside each other: what is tested, what is refused, and what one finds that the other does not."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from xclip_lab import compare, method_plots
from xclip_lab.clips import Clip
from xclip_lab.config import load_config, save_config
from xclip_lab.datasets import Sample
from xclip_lab.entries import choose, folder_of, open_clips, open_entries, rows_of
from xclip_lab.errors import DatasetError, UserError
from xclip_lab.grid import cells, load_grid
from xclip_lab.paired import paired_test
from xclip_lab.result import Result, ResultError
from xclip_lab.runs import RunError

CAPTIONS = 60


def result(recall: float, seed: int = 0, **stamp) -> Result:
    """Of 60 captions, two a video and four a cluster, about `recall` are answered; others miss by a few."""
    generator = np.random.default_rng(seed)
    own = np.arange(CAPTIONS) // 2
    similarity = generator.random((CAPTIONS, CAPTIONS // 2))
    right = generator.random(CAPTIONS) < recall
    similarity[np.arange(CAPTIONS), own] = np.where(right, 2.0, 0.9)
    similarity[0, :3] = 2.0  # a tie, which counts against the model whatever the stamp says
    usual = {"dataset": "toy", "protocol": None, "split": "test", "dataset_fingerprint": "f"}
    usual |= {"ties": "official", "seed": 0, "post_processing": "none", "intervals": {"draws": 50}}
    gallery = {
        "captions": [f"caption {row}" for row in range(CAPTIONS)],
        "videos": [f"v{column}" for column in range(CAPTIONS // 2)],
        "rows": np.arange(CAPTIONS),
    }
    clusters = np.arange(CAPTIONS // 2) // 2
    return Result.rank(similarity, own, clusters, usual | stamp, **gallery)


def test_every_pair_is_tested_by_captions_and_clusters_and_corrected_for_their_number():
    models = {"good": result(0.95, 1), "fair": result(0.5, 2), "other": result(0.45, 3)}
    tests = compare.pairwise(models).set_index(["a", "b"])
    assert list(tests.index) == [("good", "fair"), ("good", "other"), ("fair", "other")]
    own = np.arange(CAPTIONS) // 2
    for (a, b), row in tests.iterrows():
        hits = [
            (models[name].similarity > models[name].similarity[np.arange(60), own][:, None]).any(1)
            for name in (a, b)
        ]
        hits = [~missed for missed in hits]
        for hit in hits:
            hit[0] = False  # the tie
        expected = paired_test(*hits, np.arange(CAPTIONS) // 4)
        assert row["p"] == expected.p
        assert (row["difference"], row["low"], row["high"]) == expected.difference
        assert row["R@1 a"] == pytest.approx(100 * hits[0].mean())
    assert tests["p_holm"].iloc[0] == pytest.approx(min(1, tests["p"].iloc[0] * 3), rel=0.6)
    assert (tests["p_holm"] >= tests["p"]).all()
    assert tests["verdict"].iloc[0].startswith("good finds more, as trained here; one training a side")
    assert tests["verdict"].iloc[2].startswith("no difference shown; one below ")
    assert tests["p_seeds"].isna().all()


def test_seeds_speak_of_other_trainings():
    steady = [result(0.9, seed) for seed in range(3)], [result(0.3, seed) for seed in range(5, 8)]
    row = compare.pairwise(dict(zip("ab", steady, strict=True))).iloc[0]
    assert "a finds more, over the seeds too (3 + 3 trainings)" in row["verdict"]
    assert 0 < row["share"] < 1
    assert np.isnan(row["p_mcnemar"])
    loose = [result(0.95, 1), result(0.5, 2)], [result(0.4, 3), result(0.2, 4)]
    row = compare.pairwise(dict(zip("ab", loose, strict=True))).iloc[0]
    assert row["p_holm"] < 0.05 < row["p_seeds"]
    assert "2 + 2 trainings do not show that others would" in row["verdict"]
    assert row["share"] > 0.5


def test_a_reader_gets_dashes_not_nans():
    html = compare.shown(compare.pairwise({"one": result(0.9, 1), "two": result(0.2, 2)})).to_html()
    assert "one − two" in html
    assert "&lt; 0.001" in html
    assert "McNemar" in html
    assert "nan" not in html
    assert "seeds" not in html


def test_unlike_protocols_are_refused_everywhere(tmp_path):
    one, other = result(0.9), result(0.9, dataset_fingerprint="g")
    other.save(tmp_path / "other")
    one.save(tmp_path / "one")
    folders = [str(tmp_path / "one"), str(tmp_path / "other")]
    for call in (
        lambda: compare.pairwise({"one": one, "other": other}),
        lambda: compare.pairwise({"one": one, "other": [one, other]}),
        lambda: compare.disagreements(one, other),
        lambda: open_entries(folders),
    ):
        with pytest.raises(DatasetError, match="never stand beside each other"):
            call()


def test_what_exactly_one_finds_the_most_telling_first():
    a, b = result(0.7, 1), result(0.4, 2)
    found = compare.disagreements(a, b)
    right = {"a": found["rank_a"], "b": found["rank_b"]}
    wrong = {"a": found["rank_b"], "b": found["rank_a"]}
    for side in "ab":
        assert (right[side][found["right"] == side] == 1).all()
        assert (wrong[side][found["right"] == side] > 1).all()
    assert found[["rank_a", "rank_b"]].max(axis=1).is_monotonic_decreasing
    first = {
        name: (model.similarity.argmax(1) == model.text_to_video) for name, model in (("a", a), ("b", b))
    }
    first["a"][0] = first["b"][0] = False
    assert set(found.index) == set(np.flatnonzero(first["a"] != first["b"]))
    for row, line in found.iterrows():
        missed = b if line["right"] == "a" else a
        assert line["instead"] == missed.videos[missed.similarity[row].argmax()] != line["video"]
        assert line["caption"] == f"caption {row}"
    assert compare.disagreements(a, a).empty


def test_the_figure_shows_what_one_finds_and_what_the_other_puts_first(monkeypatch):
    """Frames are as bright as their video's number; the first caption of a video stands for it."""
    samples = [Sample(f"v{row // 2}", f"caption {row}") for row in range(CAPTIONS)]
    monkeypatch.setattr(
        method_plots,
        "read_clip",
        lambda clips, row: Clip(
            row, f"v{row // 2}", f"caption {row}", torch.full((2, 3, 4, 4), row // 2), torch.arange(2.0)
        ),
    )
    clips = SimpleNamespace(dataset=SimpleNamespace(samples=samples))
    two = {"one": result(0.7, 1), "other": result(0.4, 2)}
    found = compare.disagreements(*two.values())
    for who, side in zip(two, "ab", strict=True):
        first = found[found["right"] == side].iloc[0]
        drawn = method_plots.only_one_finds(clips, two, who)
        shades = [int(axis.images[0].get_array().max()) for axis in drawn.axes if axis.images]
        assert [f"v{shade}" for shade in shades[::2]] == [first["video"], first["instead"]]
        told = " ".join(text.get_text() for axis in drawn.axes for text in axis.texts)
        told += " ".join(text.get_text() for text in drawn.texts)
        missed = max(first["rank_a"], first["rank_b"])
        assert first["caption"] in told
        assert f"rank 1 in {who}, rank {missed} in {next(name for name in two if name != who)}" in told
        assert method_plots.only_one_finds(None, two, who) is None
    assert method_plots.only_one_finds(clips, {"a": two["one"], "b": two["one"]}, "a") is None


def test_a_tie_is_a_miss_and_what_ties_stands_instead():
    one = result(0.7, 1)
    similarity, other = one.similarity.copy(), CAPTIONS // 2 - 1
    row = 1 + int(np.flatnonzero(similarity[1:].argmax(1) == one.text_to_video[1:])[0])
    own = one.text_to_video[row]
    similarity[row, other] = similarity[row, own]
    tied = dataclasses.replace(one, scores=similarity)
    [line] = compare.disagreements(one, tied).to_dict("records")
    assert (line["right"], line["rank_b"], line["instead"]) == ("a", 2, one.videos[other])


def test_ranks_without_scores_are_compared_too(tmp_path):
    whole = {"one": result(0.9, 1, ties="pessimistic"), "two": result(0.5, 2, ties="pessimistic")}
    bare = {}
    for name, one in whole.items():
        top = np.argsort(-one.similarity, axis=1, kind="stable")[:, :10]
        bare[name] = Result.load(dataclasses.replace(one, scores=None, top=top).save(tmp_path / name))
    pd.testing.assert_frame_equal(compare.pairwise(bare), compare.pairwise(whole))
    pd.testing.assert_frame_equal(
        compare.disagreements(*bare.values()), compare.disagreements(*whole.values())
    )
    other = dataclasses.replace(bare["one"], stamp=bare["one"].stamp | {"ties": "mean"})
    with pytest.raises(ResultError, match="no scores"):
        compare.pairwise({"one": other, "two": bare["two"]})


def test_what_the_gallery_could_show():
    tests = compare.pairwise({"one": result(0.9, 1), "two": result(0.5, 2)})
    found = compare.sensitivity(tests)
    assert found.loc["MSR-VTT 1k-A", "margin"] == pytest.approx(3.1, abs=0.05)
    assert (found.loc["this gallery"] > found.loc["MSR-VTT 1k-A"]).drop(["queries", "R@1"]).all()
    assert found.loc["this gallery", "queries"] == tests["queries"].iloc[0]


@pytest.fixture
def runs(tmp_path):
    """Four runs of two methods and two seeds, evaluated, and a result that lies in no run."""
    for preset, recall in (("quickstart", 0.8), ("quickstart-wti", 0.5)):
        for seed in (0, 1):
            run = tmp_path / f"{preset}_s{seed}"
            (run / "evaluation").mkdir(parents=True)
            save_config(load_config(preset, {"seed": seed}), run / "config.yaml")
            result(recall, seed).save(run / "evaluation" / "test")
    result(0.3, 9).save(tmp_path / "elsewhere")
    return tmp_path


def test_runs_are_named_by_method_else_by_folder_else_as_written(runs):
    entries = open_entries([f"{runs}/quickstart_s*", f"{runs}/quickstart-wti_s*"])
    assert {name: len(entry.results) for name, entry in entries.items()} == {"X-CLIP": 2, "WTI": 2}
    alike = open_entries([f"{runs}/quickstart_s0", f"{runs}/quickstart_s1/evaluation/test"])
    assert list(alike) == ["quickstart_s0", "quickstart_s1"]
    same_run = [f"{runs}/quickstart_s0", f"{runs}/quickstart_s0/evaluation/test"]
    assert list(open_entries(same_run)) == same_run
    mixed = open_entries([[f"{runs}/quickstart_s0", f"{runs}/quickstart_s1"], f"{runs}/elsewhere"])
    assert list(mixed) == ["X-CLIP", f"{runs}/elsewhere"]
    named = open_entries({"mine": f"{runs}/quickstart_s*", "theirs": f"{runs}/elsewhere"})
    assert list(named) == ["mine", "theirs"]
    assert named["theirs"].run_dir is None
    assert list(choose(named, [])) == ["mine", "theirs"]
    assert list(choose(named, ["theirs", "mine"])) == ["theirs", "mine"]


def test_the_table_needs_neither_data_nor_checkpoints(runs, capsys):
    entries = open_entries({"a": f"{runs}/quickstart_s*", "b": f"{runs}/elsewhere"})
    table = compare.table(entries, None)
    assert list(table["level"]) == ["all", "all"]
    assert table["gmac"].isna().all()
    assert table["gain"].iloc[1] == pytest.approx(table["R@1"].iloc[1] - table["R@1"].iloc[0])
    assert method_plots.recall_against_cost(table) is None
    assert (
        open_clips(
            open_entries([f"{runs}/elsewhere", f"{runs}/quickstart_s0"][::-1]), {"data.root": str(runs)}
        )
        is None
    )
    assert "no frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ([], "two or more"),
        (["{}/quickstart_s*"], "two or more"),
        (["{}/quickstart_s0", "{}/nothing_*"], "no folder .*nothing"),
        (["{}/quickstart_s0", "{}/quickstart_s0"], "named twice"),
        (["{}/quickstart_s0", "{}"], "no result in .*xclip-lab evaluate"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(runs, checkpoints, message):
    with pytest.raises(UserError, match=message) as caught:
        open_entries([one.format(runs) for one in checkpoints])
    assert "\n" not in str(caught.value)


def test_a_pair_is_two_of_the_names(runs):
    entries = open_entries([f"{runs}/quickstart_s*", f"{runs}/quickstart-wti_s*"])
    for pair, message in ((["X-CLIP"], "name two"), (["X-CLIP", "WTl"], "no 'WTl'; did you mean 'WTI'")):
        with pytest.raises(RunError, match=message):
            choose(entries, pair)


def test_other_runs_another_folder():
    assert folder_of(["a", "b"]) == folder_of(["a", "b"]) != folder_of(["a", "c"])


def test_the_grid_of_methods_is_that_of_the_presets(tmp_path):
    grid = load_grid("methods")
    presets = ("meanP", "seqTransf", "tightTransf", "", "clip2video", "glscl", "maxsim", "ti", "wti")
    every = cells(grid, tmp_path)
    for preset, cell in zip(presets * 2, every, strict=True):
        wanted = load_config(f"quickstart-{preset}".rstrip("-"), {**grid.overrides, "seed": cell.config.seed})
        assert dataclasses.replace(wanted, preset="quickstart") == cell.config
    assert [len(folders) for folders in rows_of(every).values()] == [2] * 9
    contrasts = rows_of(cells(load_grid("xclip-contrasts"), tmp_path))
    assert [len(folders) for folders in contrasts.values()] == [2] * 18  # trained towers are another model
    assert "SV, towers trained" in contrasts


def every_pair_of(count: int) -> pd.DataFrame:
    return compare.pairwise({f"model {k}": result(0.2 + 0.15 * k, k) for k in range(count)})


def test_few_differences_are_drawn_with_intervals_many_as_a_matrix():
    forest = method_plots.differences(every_pair_of(3)).axes[0]
    assert forest.get_yticklabels()[0].get_text() == "model 0 − model 1"
    assert len(forest.texts) == 3
    many = every_pair_of(6)
    matrix = method_plots.differences(many).axes[0]
    assert len(matrix.texts) == 6 * 5
    best = matrix.get_yticklabels()[0].get_text()
    assert best.startswith("model 5")
    written = {text.get_position(): text.get_text() for text in matrix.texts}
    row = many[(many["a"] == "model 0") & (many["b"] == "model 5")].iloc[0]
    names = [label.get_text() for label in matrix.get_xticklabels()]
    assert written[(names.index("model 0") + 0.5, 0.5)] == f"{-row['difference']:+.1f}"
