"""The bootstrap against SciPy's, against a slow clustered one, and by its coverage."""

from __future__ import annotations

import time

import numpy as np
import pytest

from xclip_lab import stats
from xclip_lab.metrics import METRICS, MetricError, metrics_of
from xclip_lab.stats import cluster_mean_interval, recall_intervals


@pytest.mark.parametrize("metric", METRICS)
def test_agrees_with_scipy_where_every_video_has_one_caption(metric):
    scipy_stats = pytest.importorskip("scipy.stats", reason="SciPy is needed to compare with its bootstrap")
    ranks = np.random.default_rng(3).geometric(0.1, size=201)

    def statistic(sample, axis):
        return np.apply_along_axis(lambda row: metrics_of(row)[metric], axis, sample)

    reference = scipy_stats.bootstrap(
        (ranks,), statistic, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)
    )
    found = recall_intervals(ranks, np.arange(len(ranks)), draws=4000, seed=2)[metric]
    spread = reference.standard_error
    np.testing.assert_allclose(found, reference.confidence_interval, atol=max(0.25 * spread, 0.51))


@pytest.mark.parametrize("lower", [False, True])
def test_every_draw_takes_whole_videos(lower):
    """The draws of a slow bootstrap that concatenates captions, from the same stream of random numbers."""
    generator = np.random.default_rng(0)
    clusters = np.sort(generator.integers(7, size=40))
    ranks = generator.integers(1, 60, size=40)
    drawn = np.random.default_rng(5).integers(7, size=(300, 7))
    slow = [
        metrics_of(np.concatenate([ranks[clusters == video] for video in videos]), lower) for videos in drawn
    ]
    found = recall_intervals(ranks, clusters, draws=300, seed=5, lower_median=lower)
    for name in METRICS:
        expected = np.quantile([draw[name] for draw in slow], [0.025, 0.975])
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, err_msg=name)


def test_the_order_of_captions_and_the_names_of_videos_do_not_matter():
    generator = np.random.default_rng(0)
    clusters, ranks = generator.integers(9, size=50), generator.integers(1, 60, size=50)
    names = np.array([f"video{number}" for number in range(9)])
    order = generator.permutation(50)
    assert recall_intervals(ranks, clusters) == recall_intervals(ranks[order], names[clusters[order]])


def test_same_seed_same_interval_other_seed_another():
    ranks, clusters = np.random.default_rng(0).integers(1, 60, size=80), np.arange(80)
    assert recall_intervals(ranks, clusters, seed=1) == recall_intervals(ranks, clusters, seed=1)
    assert recall_intervals(ranks, clusters, seed=1) != recall_intervals(ranks, clusters, seed=2)


def test_blocks_do_not_change_the_interval(monkeypatch):
    ranks, clusters = np.random.default_rng(0).integers(1, 60, size=80), np.arange(80) // 2
    whole = recall_intervals(ranks, clusters)
    monkeypatch.setattr(stats, "_BLOCK", 500)
    blocked = recall_intervals(ranks, clusters)
    for name in METRICS:
        np.testing.assert_allclose(blocked[name], whole[name], rtol=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Words of one video share an offset: an interval that forgot it would cover far less than 95%."""
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    clustered = blind = 0
    for trial in range(300):
        values = generator.normal(size=40)[clusters] + 0.3 * generator.normal(size=200)
        interval = cluster_mean_interval(values, clusters, draws=300, seed=trial)
        clustered += interval.low <= 0 <= interval.high
        interval = cluster_mean_interval(values, np.arange(200), draws=300, seed=trial)
        blind += interval.low <= 0 <= interval.high
    assert 0.90 <= clustered / 300 <= 0.98
    assert blind / 300 < 0.75


def test_recall_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    truth = 100 * (1 - 0.8**5)  # R@5 of geometric ranks
    covered = 0
    for trial in range(200):
        low, high = recall_intervals(generator.geometric(0.2, size=100), np.arange(100), 300, trial)["R@5"]
        covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_mean_is_over_values_not_over_clusters():
    interval = cluster_mean_interval([1.0, 1.0, 1.0, 5.0], [0, 0, 0, 1])
    assert interval.value == 2.0
    assert (interval.low, interval.high) == (1.0, 5.0)


def test_a_thousand_draws_of_a_thousand_queries_take_well_under_a_second():
    ranks, clusters = np.random.default_rng(0).integers(1, 1000, size=1000), np.arange(1000)
    start = time.process_time()
    recall_intervals(ranks, clusters)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([1, 2, 3], [0, 1], "must both be"),
        ([[1, 2]], [[0, 1]], "must both be"),
        ([1.0, np.nan], [0, 1], "value 1 is nan"),
        ([1.0, 2.0], [4, 4], "at least two"),
        ([], [], "at least two"),
    ],
)
@pytest.mark.parametrize("function", [recall_intervals, cluster_mean_interval])
def test_what_does_not_fit_is_refused(function, values, clusters, message):
    with pytest.raises(MetricError, match=message):
        function(values, clusters)


def test_no_draws_are_refused():
    with pytest.raises(MetricError, match="draws"):
        recall_intervals([1, 2], [0, 1], draws=0)
