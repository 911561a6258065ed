"""Dual softmax and QB-Norm: the functions, and the re-ranked result beside the raw one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xclip_lab import create_model, encoding, evaluate, study
from xclip_lab.encoding import encode
from xclip_lab.errors import ConfigError, DatasetError
from xclip_lab.evaluation import score
from xclip_lab.metrics import MetricError, ranks, retrieval_metrics
from xclip_lab.rerank import dual_softmax, qb_norm
from xclip_lab.result import Result, ResultError
from xclip_lab.runs import prepare_data
from xclip_lab.stats import recall_intervals

METHODS = ("dual_softmax", "qb_norm")


def cosines(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 0.5, (rows, columns))


seeds, sizes = st.integers(0, 1000), st.integers(1, 9)


@given(seeds, sizes, sizes)
def test_dual_softmax_is_the_papers_formula(seed, queries, gallery):
    similarity = cosines(seed, queries, gallery)
    expected = np.array(
        [
            [
                similarity[q, g]
                * np.exp(similarity[q, g] / 0.1)
                / np.exp(similarity[:, g] / 0.1).sum()
                * queries
                for g in range(gallery)
            ]
            for q in range(queries)
        ]
    )
    np.testing.assert_allclose(dual_softmax(similarity, 0.1), expected)


@given(seeds, sizes, sizes, st.floats(0.1, 100))
def test_the_softmax_of_dual_softmax_does_not_see_a_constant(seed, queries, gallery, constant):
    """The product does: similarity itself is a factor of it."""
    similarity = cosines(seed, queries, gallery)
    raised = dual_softmax(similarity + constant, 0.1) / (similarity + constant)
    np.testing.assert_allclose(raised, dual_softmax(similarity, 0.1) / similarity)


@given(seeds, sizes, sizes)
def test_dual_softmax_of_one_query_or_great_temperature_is_the_similarity(seed, queries, gallery):
    similarity = cosines(seed, queries, gallery)
    np.testing.assert_allclose(dual_softmax(similarity[:1], 0.01), similarity[:1])
    np.testing.assert_allclose(dual_softmax(similarity, 1e9), similarity)


@given(seeds, st.integers(2, 9), st.integers(2, 9))
def test_the_order_of_queries_and_gallery_does_not_matter(seed, queries, gallery):
    similarity, bank = cosines(seed, queries, gallery), cosines(seed + 1, 12, gallery)
    generator = np.random.default_rng(seed)
    rows, columns = generator.permutation(queries), generator.permutation(gallery)
    mixed = similarity[rows][:, columns]
    np.testing.assert_allclose(dual_softmax(mixed), dual_softmax(similarity)[rows][:, columns])
    np.testing.assert_allclose(
        qb_norm(mixed, bank[:, columns], 20, 2, 3), qb_norm(similarity, bank, 20, 2, 3)[rows][:, columns]
    )


@given(seeds, sizes, sizes)
def test_qb_norm_that_activates_nothing_changes_nothing(seed, queries, gallery):
    similarity, bank = cosines(seed, queries, gallery), cosines(seed + 1, 5, gallery)
    np.testing.assert_array_equal(qb_norm(similarity, bank, theta=6), similarity)


@given(seeds, sizes, sizes, st.floats(-0.4, 100))
def test_qb_norm_that_activates_all_does_not_see_a_constant(seed, queries, gallery, constant):
    similarity, bank = cosines(seed, queries, gallery), cosines(seed + 1, 5, gallery)
    found = qb_norm(similarity, bank, k=gallery)
    np.testing.assert_allclose(qb_norm(similarity + constant, bank + constant, k=gallery), found, rtol=1e-9)


def test_qb_norm_sends_a_hub_behind():
    """Every caption of the bank finds video 0, which then stands behind the caption's own."""
    similarity = np.array([[0.50, 0.48, 0.1], [0.52, 0.2, 0.49], [0.6, 0.1, 0.1]])
    bank = np.array([[0.5, 0.1, 0.1]] * 4)
    assert similarity.argmax(1).tolist() == [0, 0, 0]
    assert qb_norm(similarity, bank).argmax(1).tolist() == [1, 2, 0]


def test_a_bank_in_blocks(monkeypatch):
    similarity, bank = cosines(0, 4, 5), cosines(1, 23, 5)
    whole = qb_norm(similarity, bank, theta=3)
    monkeypatch.setattr("xclip_lab.rerank._BLOCK", 10)
    np.testing.assert_allclose(qb_norm(similarity, bank, theta=3), whole)


@pytest.mark.parametrize(
    ("similarity", "bank", "line"),
    [
        ([[0.1, np.nan]], [[0.1, 0.2]], "similarity is nan at row 0, column 1"),
        ([[0.1, 0.2]], [[0.1, 0.2], [np.inf, 0]], "bank_similarity is inf at row 1, column 0"),
        ([0.1, 0.2], [[0.1, 0.2]], r"similarity: expected numbers, .* of shape \[2\]"),
        ([[0.1, 0.2]], [[0.1, 0.2, 0.3]], "bank_similarity has 3 columns and similarity 2"),
        ([["a", "b"]], [[0.1, 0.2]], "similarity: expected numbers"),
        (np.empty((0, 2)), [[0.1, 0.2]], r"of shape \[0, 2\]"),
        ([[0.0, 900.0]], [[0.0, 1.0]], "beta 20 is too large"),
    ],
)
def test_bad_input_is_one_clear_error(similarity, bank, line):
    with pytest.raises(MetricError, match=line):
        qb_norm(similarity, bank)


@pytest.mark.parametrize("number", ["beta", "k", "theta"])
def test_numbers_that_must_be_above_zero(number):
    with pytest.raises(MetricError, match=f"{number}: 0 is not allowed"):
        qb_norm([[0.1, 0.2]], [[0.1, 0.2]], **{number: 0})


def test_bad_input_of_dual_softmax():
    with pytest.raises(MetricError, match="similarity is nan at row 1, column 0"):
        dual_softmax([[0.1, 0.2], [np.nan, 0.3]])
    with pytest.raises(MetricError, match="temperature: 0 is not allowed"):
        dual_softmax([[0.1, 0.2]], 0)
    with pytest.raises(MetricError, match=r"temperature 0\.01 is too small"):
        dual_softmax([[10.0], [99.0]])


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Generated clips: 24 to train on, the bank; 12 to test."""
    settings = {"data.root": str(tmp_path_factory.mktemp("rerank") / "clips"), "evaluation.qb_theta": 2}
    prepare_data(study.configure("quickstart", settings, smoke=True), progress=False)
    return settings


def configured(settings: dict, **evaluation):
    changes = {f"evaluation.{name}": value for name, value in evaluation.items()}
    return study.configure("quickstart", settings | changes, smoke=True)


@pytest.fixture(scope="module")
def model(settings):
    torch.manual_seed(1)
    return create_model(configured(settings)).eval()


@pytest.fixture(scope="module")
def results(model, settings) -> dict[str, Result]:
    """By method."""
    test = study.open_split(configured(settings), "test")
    return {
        method: evaluate(model, test, configured(settings, rerank=method), progress=False)
        for method in ("none", *METHODS)
    }


def by_hand(method: str, model, settings: dict, raw: Result) -> tuple[np.ndarray, np.ndarray]:
    scale = model.logit_scale.exp().item()
    similarity = raw.similarity / scale
    if method == "dual_softmax":
        return dual_softmax(similarity, 0.01), dual_softmax(similarity.T, 0.01).T
    config = configured(settings)
    test, bank = (encode(model, study.open_split(config, split), config) for split in ("test", "train"))
    t2v_bank, v2t_bank = score(model, bank.text, test.video), score(model, test.text, bank.video).T
    return (
        qb_norm(similarity, t2v_bank / scale, 20.0, 1, 2),
        qb_norm(similarity.T, v2t_bank / scale, 20.0, 1, 2).T,
    )


@pytest.mark.parametrize("method", METHODS)
def test_it_stands_beside_the_raw_result(method, model, settings, results):
    raw, alone = results[method], results["none"]
    np.testing.assert_array_equal(raw.similarity, alone.similarity)
    assert (raw.metrics, raw.intervals, raw.stamp) == (alone.metrics, alone.intervals, alone.stamp)
    assert raw.stamp["post_processing"] == "none"
    assert alone.reranked is None
    found = raw.reranked
    t2v, v2t = by_hand(method, model, settings, raw)
    np.testing.assert_allclose(found.similarity, t2v, rtol=1e-4)
    np.testing.assert_allclose(found.similarity_v2t, v2t, rtol=1e-4)
    assert not np.array_equal(found.ranks["t2v"], raw.ranks["t2v"])
    index = raw.text_to_video
    for side, matrix in (("t2v", t2v), ("v2t", v2t)):
        assert found.metrics[side] == retrieval_metrics(matrix, index)[side]
        np.testing.assert_array_equal(found.ranks[side], ranks(matrix, index)[side])
        clusters = raw.clusters[index] if side == "t2v" else raw.clusters
        assert found.intervals[side] == recall_intervals(found.ranks[side], clusters, 50, raw.stamp["seed"])
    everything = np.ones(len(index), dtype=bool)
    assert found.subset(everything) == (found.metrics["t2v"], found.intervals["t2v"])


@pytest.mark.parametrize(("free", "again"), [(None, 0), (10_000, 12)])
def test_the_captions_are_encoded_once_where_memory_keeps_them(model, settings, monkeypatch, free, again):
    test = study.open_split(configured(settings), "test")
    captions, real = [], encoding.tokenize
    monkeypatch.setattr(encoding, "tokenize", lambda some, *rest: captions.extend(some) or real(some, *rest))
    monkeypatch.setattr(encoding, "free_memory", lambda device: free)
    evaluate(model, test, configured(settings, rerank="qb_norm", batch_size=5), progress=False)
    assert len(captions) == 12 + 24 + again


def test_the_stamp_says_how_and_from_what(model, results):
    scale = pytest.approx(model.logit_scale.exp().item())
    stamp = results["dual_softmax"].reranked.stamp
    assert stamp["post_processing"] == {
        "method": "dual_softmax",
        "temperature": 0.01,
        "similarity_divided_by": scale,
        "statistics": "uses all test queries at once (transductive): 12 captions, 12 videos",
    }
    stamp = results["qb_norm"].reranked.stamp
    worded_alike = stamp["post_processing"].pop("captions_worded_as_in_bank")
    assert 0 <= worded_alike <= 12
    assert stamp["post_processing"] == {
        "method": "qb_norm",
        "beta": 20.0,
        "k": 1,
        "theta": 2,
        "similarity_divided_by": scale,
        "statistics": "24 captions and 24 videos of synthetic / train",
    }
    stamp["post_processing"]["captions_worded_as_in_bank"] = worded_alike
    assert len(stamp["bank_fingerprint"]) == 64
    assert stamp["checkpoint"] == results["none"].stamp["checkpoint"]


@pytest.mark.parametrize("method", METHODS)
def test_the_raw_numbers_are_printed_first(method, results):
    printed = str(results[method])
    raw, _, reranked = printed.partition("\n\n")
    assert raw == str(results["none"])
    assert "post-processing none" in raw
    assert reranked.startswith(f"re-ranked by {method} (")
    statistics = results[method].reranked.stamp["post_processing"]["statistics"]
    assert reranked.splitlines()[0].endswith(f"), statistics: {statistics}")
    low, high = results[method].reranked.intervals["v2t"]["R@5"]
    assert f"{results[method].reranked.metrics['v2t']['R@5']:.2f}  [{low:.2f}, {high:.2f}]" in reranked


def same(found: Result, expected: Result) -> bool:
    """All that JSON and arrays keep."""
    for name in ("similarity", "similarity_v2t", "text_to_video", "rows", "clusters"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for side in ("t2v", "v2t"):
        np.testing.assert_array_equal(found.ranks[side], expected.ranks[side])
    names = ("captions", "videos", "metrics", "intervals", "stamp")
    return all(getattr(found, name) == getattr(expected, name) for name in names)


@pytest.mark.parametrize("method", METHODS)
def test_both_are_saved_and_loaded(method, results, tmp_path):
    found = results[method]
    found.save(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == found.metrics
    again = Result.load(tmp_path)
    assert same(again, found)
    assert same(again.reranked, found.reranked)
    assert same(Result.load(tmp_path / "reranked"), found.reranked)
    assert str(again) == str(found)
    (tmp_path / "reranked" / "stamp.json").unlink()
    with pytest.raises(ResultError, match=r"reranked: stamp\.json is missing"):
        Result.load(tmp_path)


def test_a_raw_result_does_not_keep_the_reranked_one_of_before(results, tmp_path):
    results["qb_norm"].save(tmp_path)
    results["none"].save(tmp_path)
    assert Result.load(tmp_path).reranked is None
    assert not (tmp_path / "reranked").exists()
    results["qb_norm"].reranked.save(tmp_path)
    results["none"].save(tmp_path)
    assert Result.load(tmp_path).similarity_v2t is None


def test_several_captions_a_video_and_a_bank_of_ones_own(model, settings, results):
    """The bank may be any split that is given; official ties hold for both."""
    config = configured(settings, rerank="qb_norm", ties="official")
    test, bank = study.open_split(config, "test"), study.open_split(config, "train")
    doubled = [dataclasses.replace(sample, caption=f"{sample.caption} again") for sample in test.samples]
    several = dataclasses.replace(test, samples=test.samples + doubled, groups=None)
    few = dataclasses.replace(bank, samples=bank.samples[:5], groups=None, split="five")
    found = evaluate(model, several, config, bank=few, progress=False)
    assert found.reranked.similarity.shape == found.reranked.similarity_v2t.shape == (24, 12)
    assert (
        found.reranked.stamp["post_processing"]["statistics"] == "5 captions and 5 videos of synthetic / five"
    )
    assert found.reranked.stamp["ties"] == "official"


@pytest.mark.parametrize("split", ["test", "part"])
def test_a_bank_never_holds_what_is_evaluated(split, model, settings):
    config = configured(settings, rerank="qb_norm", query_bank="test")
    test = study.open_split(config, "test")
    bank = dataclasses.replace(test, samples=test.samples[:2], groups=None, split="part")
    with pytest.raises(
        DatasetError, match=rf"query_bank: '{split}' holds .* of 'test'; a query bank must never"
    ):
        evaluate(model, test, config, bank=bank if split == "part" else None, progress=False)


def test_a_dataset_without_a_name_needs_its_bank_given(model, settings):
    test = dataclasses.replace(study.open_split(configured(settings), "test"), name="mine")
    with pytest.raises(ConfigError, match=r"'mine' is no dataset .* give evaluate\(\.\.\., bank=\)"):
        evaluate(model, test, configured(settings, rerank="qb_norm"), progress=False)


def test_a_control_stays_raw(model, settings):
    config = configured(settings, rerank="qb_norm")
    test = study.open_split(config, "test")
    assert study.shuffled_frames(model, test, config).reranked is None
