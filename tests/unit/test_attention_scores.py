"""The measures on planted maps, whose scores are known, and against oracles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from xclip_lab import attention_scores as scores

OWN = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1]], dtype=bool)
MEASURES = [scores.pointing, scores.mass, scores.precision_recall]


@pytest.mark.parametrize("measure", MEASURES)
def test_planted_maps(measure):
    """The truth itself scores 1, its inverse 0, a uniform map what a random order scores on average."""
    np.testing.assert_allclose(measure(OWN.astype(float), OWN), 1)
    np.testing.assert_allclose(measure(1.0 - OWN, OWN), 0, atol=1e-12)
    generator = np.random.default_rng(0)
    random = np.mean([measure(generator.random(OWN.shape), OWN) for _ in range(3000)], axis=0)
    np.testing.assert_allclose(measure(np.ones(OWN.shape), OWN), random, atol=0.02)


def test_chance_of_pointing_and_of_mass_is_the_share_of_own_frames():
    for measure in (scores.pointing, scores.mass):
        np.testing.assert_allclose(measure(np.ones(OWN.shape), OWN), OWN.mean(1))


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_ties_count_as_the_mean_over_their_orders(seed, frames):
    generator = np.random.default_rng(seed)
    row, own = generator.integers(0, 3, frames), generator.random(frames) < 0.5
    own[0], own[-1] = True, False

    def area(order: tuple[int, ...]) -> float:
        hits = own[list(order)]
        return float((np.cumsum(hits) / np.arange(1, frames + 1))[hits].mean())

    allowed = [
        order for order in itertools.permutations(range(frames)) if (np.diff(row[list(order)]) <= 0).all()
    ]
    every = [area(order) for order in itertools.permutations(range(frames))]
    expected = (np.mean([area(order) for order in allowed]) - min(every)) / (1 - min(every))
    assert scores.precision_recall(row[None], own[None]).item() == pytest.approx(expected)


def test_what_cannot_be_told_apart_has_no_area():
    assert np.isnan(scores.precision_recall(np.ones((2, 3)), np.array([[1, 1, 1], [0, 0, 0]], bool))).all()


def test_padding_shares():
    weights = np.zeros((4, 3))
    weights[:2] = [0.5, 0.25, 0.25]
    assert scores.padding_share(weights, words=2, frames=2, over="frames") == pytest.approx(0.25)
    assert scores.padding_share(weights.T, words=2, frames=2, over="words") == pytest.approx(0.25)
    assert scores.padding_share(np.ones((4, 3)), words=2, frames=2, over="both") == pytest.approx(1 - 4 / 12)
    weights[3] = 1  # a padded word's row is nobody's attention over frames
    assert scores.padding_share(weights, words=2, frames=2, over="frames") == pytest.approx(0.25)


@given(st.integers(0, 2**32 - 1))
def test_rank_correlation_is_scipys(seed):
    first, second = np.random.default_rng(seed).integers(0, 4, (2, 5, 7))
    first[:, 0], second[:, 1] = 9, -9  # no row is constant
    found = scores.rank_correlation(first, second)
    np.testing.assert_allclose(
        found, [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)], atol=1e-12
    )
    np.testing.assert_allclose(scores.rank_correlation(first, -first), -1)
    assert np.isnan(scores.rank_correlation(np.ones((1, 7)), second[:1])).all()


VALUES = np.array([5.0, 3.0, 2.0, -1.0, 0.5, 1.0])


def additive(kept: np.ndarray) -> np.ndarray:
    """A logit to which each frame adds its value."""
    assert kept.any(1).all()
    return kept @ VALUES


def test_removal_finds_the_best_and_the_worst_order():
    best = np.argsort(-VALUES)
    generator = np.random.default_rng(0)
    random = [generator.permutation(6) for _ in range(2000)]
    found = scores.removal(additive, [best, best[::-1], *random])
    for values in (found.insertion, found.deletion):
        assert values[:2] == pytest.approx([1, 0])
        assert values.min() >= 0
        assert values.max() <= 1
        assert values[2:].mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(found.kept[0], np.cumsum(VALUES[best]))
    np.testing.assert_allclose(found.removed[0], VALUES.sum() - np.r_[0, np.cumsum(VALUES[best])[:-1]])


def test_greedy_orders_set_the_scale():
    """A single order in between does not become best and worst of itself."""
    found = scores.removal(additive, [np.array([0, 3, 1, 4, 2, 5])])
    assert 0.5 < found.insertion[0] < 0.9


def test_removal_asks_for_each_set_of_frames_once():
    asked: list[bytes] = []

    def counted(kept: np.ndarray) -> np.ndarray:
        asked.extend(row.tobytes() for row in kept)
        return additive(kept)

    scores.removal(counted, [np.arange(6), np.arange(6)[::-1], np.arange(6)])
    assert len(asked) == len(set(asked)) < 2**6


def test_frames_that_do_not_matter_have_no_order():
    found = scores.removal(lambda kept: np.ones(len(kept)), [np.arange(3)])
    assert np.isnan([*found.insertion, *found.deletion]).all()
    assert np.isnan(scores.removal(lambda kept: np.ones(len(kept)), [np.arange(1)]).insertion).all()


def test_ties_are_ordered_at_random():
    generator = np.random.default_rng(0)
    orders = [scores.order_of(np.array([1.0, 1.0, 2.0]), generator).tolist() for _ in range(200)]
    assert {order[0] for order in orders} == {2}
    assert 60 < sum(order[1] == 0 for order in orders) < 140
