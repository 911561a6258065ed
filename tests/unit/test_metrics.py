"""Metrics against a slow definition, and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xclip_lab import metrics
from xclip_lab.errors import DatasetError, UserError
from xclip_lab.metrics import (
    BlockedRanks,
    MetricError,
    metrics_of,
    rank_entries,
    ranks,
    retrieval_metrics,
)

TIES = ("pessimistic", "optimistic", "mean", "official")


def problem(seed: int, texts: int, videos: int, levels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Few distinct scores, so that ties are everywhere; videos with no caption, one and several."""
    generator = np.random.default_rng(seed)
    return generator.integers(levels, size=(texts, videos)) / 4, generator.integers(videos, size=texts)


problems = st.builds(
    problem, st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 7), st.integers(1, 6)
)


def place(own: float, others: list[float], ties: str) -> float:
    """One rank, by sorting."""
    if ties == "mean":
        return (place(own, others, "pessimistic") + place(own, others, "optimistic")) / 2
    behind = 1 if ties == "optimistic" else -1
    field = sorted([(-other, behind) for other in others] + [(-own, 0)])
    return 1 + field.index((-own, 0))


def slow_ranks(scores: np.ndarray, index: np.ndarray, ties: str) -> tuple[list[float], list[float]]:
    t2v = [
        place(row[video], [score for v, score in enumerate(row) if v != video], ties)
        for row, video in zip(scores, index, strict=True)
    ]
    captions = {
        video: [t for t, v in enumerate(index) if v == video] for video in sorted(set(index.tolist()))
    }
    best = {v: {w: max(scores[t, w] for t in rows) for w in captions} for v, rows in captions.items()}
    v2t = [place(best[w][w], [best[v][w] for v in captions if v != w], ties) for w in captions]
    return t2v, v2t


@given(problems, st.sampled_from(TIES[:3]))
def test_ranks_are_those_of_the_definition(case, ties):
    found = ranks(*case, ties=ties)
    t2v, v2t = slow_ranks(*case, ties)
    assert found["t2v"].tolist() == t2v
    assert found["v2t"].tolist() == v2t


@given(problems, st.sampled_from(TIES[:3]), st.randoms(use_true_random=False))
def test_the_order_of_captions_and_gallery_does_not_matter(case, ties, random):
    scores, index = case
    rows, columns = list(range(len(index))), list(range(scores.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    shuffled = retrieval_metrics(scores[rows][:, columns], np.argsort(columns)[index[rows]], ties)
    assert shuffled == retrieval_metrics(scores, index, ties)


@given(problems, st.sampled_from(TIES))
def test_blocks_do_not_change_a_rank(case, ties):
    whole = rank_entries(*case, ties)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK", 3)
        blocked = rank_entries(*case, ties)
    for name in whole:
        np.testing.assert_array_equal(whole[name].ranks, blocked[name].ranks)
        np.testing.assert_array_equal(whole[name].queries, blocked[name].queries)


@given(problems)
def test_policies_are_ordered(case):
    found = {ties: ranks(*case, ties=ties) for ties in TIES}
    for name in ("t2v", "v2t"):
        low, high = found["optimistic"][name], found["pessimistic"][name]
        assert (low <= high).all()
        np.testing.assert_array_equal(found["mean"][name], (low + high) / 2)


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_official_counts_every_place_of_a_tie(seed, size):
    scores, _ = problem(seed, size, size)
    index = np.arange(size)
    low, high = (ranks(scores, index, ties=ties)["t2v"] for ties in ("optimistic", "pessimistic"))
    entries = rank_entries(scores, index, "official")["t2v"]
    places = [place for first, last in zip(low, high, strict=True) for place in range(first, last + 1)]
    assert entries.ranks.tolist() == places
    np.testing.assert_array_equal(entries.queries, np.repeat(index, high - low + 1))


def test_official_t2v_with_several_captions_goes_by_the_gallery_and_takes_the_lower_median():
    scores = np.array([[1.0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    index = np.array([1, 1, 2, 3])
    assert ranks(scores, index, ties="official")["t2v"].tolist() == [2, 1, 3, 1]
    assert retrieval_metrics(scores, index, "official")["t2v"]["MdR"] == 1.0
    assert metrics_of([2, 1, 3, 1])["MdR"] == 1.5


def test_without_ties_all_policies_agree():
    generator = np.random.default_rng(0)
    scores, index = generator.normal(size=(60, 60)), generator.permutation(60)
    found = [retrieval_metrics(scores, index, ties) for ties in TIES]
    assert found[0] == found[1] == found[2] == found[3]


def test_constant_scores_are_chance_or_worse_but_never_better_unless_asked():
    scores, index = np.zeros((10, 10)), np.arange(10)
    assert retrieval_metrics(scores, index)["t2v"]["R@1"] == 0.0
    assert retrieval_metrics(scores, index, "optimistic")["t2v"]["R@1"] == 100.0
    assert retrieval_metrics(scores, index, "mean")["t2v"]["MnR"] == 5.5
    assert retrieval_metrics(scores, index, "official")["t2v"]["R@1"] == 10.0


def test_video_to_text_takes_the_best_caption_of_each_video():
    scores = np.array([[0.1, 0.0], [0.9, 0.8], [0.2, 0.7]])
    assert ranks(scores, [0, 0, 1])["v2t"].tolist() == [
        1,
        2,
    ]  # video 1: video 0's best caption, 0.8, beats 0.7


def test_a_video_without_caption_only_distracts():
    scores = np.array([[0.5, 0.9, 0.1], [0.2, 0.3, 0.4]])
    found = ranks(scores, [0, 2])
    assert found["t2v"].tolist() == [2, 1]
    assert found["v2t"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_taken(dtype):
    scores = torch.tensor([[0.5, 0.25], [1.0, 0.75]], dtype=dtype, requires_grad=True)
    found = retrieval_metrics(scores, torch.tensor([0, 1]))
    assert found["t2v"]["R@1"] == 50.0
    assert list(found["t2v"]) == ["R@1", "R@5", "R@10", "R@50", "MdR", "MnR", "Rsum"]
    assert {type(value) for side in found.values() for value in side.values()} == {float}


def test_infinite_scores_are_numbers():
    scores = np.array([[-np.inf, 0.0], [np.inf, np.inf]])
    assert ranks(scores, [0, 1])["t2v"].tolist() == [2, 2]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("place", [(2, 2), (3, 1), (5, 0)])
def test_a_nan_is_an_error_that_names_its_place(ties, place):
    scores = np.random.default_rng(0).normal(size=(6, 4))
    scores[place] = np.nan
    with pytest.raises(MetricError, match=f"row {place[0]}, column {place[1]}") as caught:
        retrieval_metrics(scores, np.array([0, 1, 2, 3, 0, 1]), ties)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, ValueError)


def test_a_nan_of_a_later_block_is_named_by_its_row_in_the_matrix(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 8)
    scores = np.zeros((9, 4))
    scores[7, 3] = np.nan
    with pytest.raises(MetricError, match="row 7, column 3"):
        retrieval_metrics(scores, np.zeros(9, dtype=int))


@pytest.mark.parametrize(
    ("scores", "index", "message"),
    [
        (np.zeros(3), [0], "T, V"),
        ([[0.1, 0.2], [0.3]], [0, 1], "similarity: expected a plain array, rows of one length"),
        (torch.eye(2).to_sparse(), [0, 1], "similarity: expected a plain array"),
        (np.eye(2), [[0], [0, 1]], "text_to_video: expected a plain array, rows of one length"),
        (np.zeros((2, 3, 4)), [0, 0], "T, V"),
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "T, V"),
        (np.zeros((2, 3)), [0], "1 entries, similarity 2 rows"),
        (np.zeros((2, 3)), [0, 3], r"text_to_video\[1\] is 3"),
        (np.zeros((2, 3)), [-1, 0], r"text_to_video\[0\] is -1"),
        (np.zeros((2, 3)), [0.0, 1.0], "whole numbers"),
        (np.zeros((2, 3)), [[0], [1]], "whole numbers"),
        (np.array([["a", "b"]]), [0], "real numbers"),
        (np.zeros((1, 2), dtype=complex), [0], "real numbers"),
    ],
)
def test_what_does_not_fit_is_refused(scores, index, message):
    with pytest.raises(MetricError, match=message):
        retrieval_metrics(scores, index)


def test_an_unknown_policy_is_refused_with_a_suggestion():
    with pytest.raises(MetricError, match=r"'pesimistic'.*pessimistic"):
        retrieval_metrics(np.zeros((1, 1)), [0], ties="pesimistic")


def test_no_ranks_no_metrics():
    with pytest.raises(MetricError, match="no ranks"):
        metrics_of([])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_rsum_and_recalls(values):
    found = metrics_of(values)
    assert found["Rsum"] == found["R@1"] + found["R@5"] + found["R@10"]
    assert found["R@1"] <= found["R@5"] <= found["R@10"] <= found["R@50"] <= 100
    assert found["R@5"] == pytest.approx(100 * np.mean(np.array(values) <= 5))


@pytest.mark.parametrize("ties", ["pessimistic", "optimistic", "mean", "official"])
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8])
def test_ranks_of_blocks_are_those_of_the_whole(ties, rows, kind, monkeypatch):
    generator = np.random.default_rng(0)
    similarity = generator.integers(0, 6, (60, 25)).astype(kind)  # many ties
    if kind == np.float64:
        similarity += 1e-12 * generator.integers(0, 2, (60, 25))  # which float32 does not tell apart
    index = generator.integers(0, 20, 60)
    found = BlockedRanks(index, 25, ties, keep=3)
    for start in reversed(range(0, 60, rows)):
        found.add(similarity[start : start + rows], start)
    monkeypatch.setattr("xclip_lab.metrics._BLOCK", 10**9)
    for side, expected in ranks(similarity, index, ties).items():
        assert np.array_equal(found.ranks()[side], expected)
    assert np.array_equal(found.top, np.argsort(-similarity.astype(float), axis=1, kind="stable")[:, :3])


@pytest.mark.parametrize("ties", TIES)
def test_what_is_kept_of_pairs_of_videos_goes_to_the_disk_where_memory_is_small(ties, monkeypatch):
    similarity, index = problem(1, 40, 30)
    expected = rank_entries(similarity, index, ties)
    monkeypatch.setattr("xclip_lab.memory.available_memory", lambda: 1000)
    monkeypatch.setattr(metrics, "_BLOCK", 50)
    found = BlockedRanks(index, 30, ties, keep=30)
    assert isinstance(found.best, np.memmap)
    found.add(similarity.astype(np.float32), 0)
    np.testing.assert_equal(found.entries(), expected)
    assert np.array_equal(found.top, np.argsort(-similarity, axis=1, kind="stable"))
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(DatasetError, match=r"^/nowhere.*; choose another place \(TMPDIR\) for .* of scores$"):
        BlockedRanks(index, 30, ties)


def test_ranks_of_blocks_name_what_is_wrong():
    found = BlockedRanks([0, 1, 0], 2)
    found.add([[0.1, 0.2]], 0)
    with pytest.raises(MetricError, match="2 of 3 rows were not added"):
        found.ranks()
    with pytest.raises(MetricError, match="NaN at row 2, column 0"):
        found.add([[0.1, 0.2], [np.nan, 0.1]], 1)
    with pytest.raises(MetricError, match="rows 2 to 3 with 2 columns do not fit: there are 3 captions"):
        found.add([[0.1, 0.2], [0.3, 0.1]], 2)
    with pytest.raises(MetricError, match=r"text_to_video\[3\] is 2: similarity has the columns 0 to 1"):
        BlockedRanks([0, 1, 0, 2], 2)
    with pytest.raises(MetricError, match="expected whole numbers"):
        BlockedRanks([0.5, 1.0], 2)
    with pytest.raises(MetricError, match="pesimistic"):
        BlockedRanks([0, 1], 2, "pesimistic")
