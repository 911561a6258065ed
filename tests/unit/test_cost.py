"""Multiply-accumulates against counts made by hand."""

from __future__ import annotations

import pytest

from tests.unit.tiny import tiny
from xclip_lab.cost import scoring_cost

D, W, F = 32, 8, 4  # of the tiny model


def test_xclip_counts_its_four_contrasts_and_no_four_axis_mixing():
    cost = scoring_cost(tiny(**{"temporal.agg_module": "meanP"}))
    contrasts = D + W * D + F * D + W * F * D
    mixing = W * W + F * F + F * W * W + W * F * F + F * F + W * W
    assert cost.pair == pytest.approx(contrasts + mixing)
    assert cost.text == pytest.approx(D * D + W * D * D)  # the two matrices, once a text
    assert cost.video == pytest.approx(0, abs=1e-6)


def test_what_a_video_costs_is_not_paid_a_pair():
    cost = scoring_cost(tiny(**{"head": {"name": "clip4clip"}, "temporal.agg_module": "seqTransf"}))
    block = 12 * F * D * D + 2 * F * F * D  # projections and feed-forward, then the attention itself
    assert cost.video == pytest.approx(block)
    assert cost.pair == pytest.approx(D)


def test_glscl_never_multiplies_by_weight_fc():
    cost = scoring_cost(tiny(**{"head": {"name": "glscl", "feed_forward": 16}}))
    assert cost.pair == pytest.approx(8 * D + F * D + F * F)  # queries, weights, length of the weighted sum
    assert cost.gmac(1000, 1000) < 1e6 * (2 * D * 4 * D) / 1e9  # less than weight_fc's first layer alone
