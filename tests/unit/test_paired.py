"""Tests between two models: against SciPy's, by their size under the null, their coverage and their power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from xclip_lab.metrics import MetricError
from xclip_lab.paired import (
    detectable_paired,
    detectable_unpaired,
    holm,
    paired_test,
    recall_margin,
    seed_test,
)


def hits(generator, clusters, rates=(0.5, 0.5), tie=0.8):
    """Hits `[2, N]` of two models; a cluster's queries mostly share their fate within each model."""
    shared = generator.random((2, clusters.max() + 1)) < np.array(rates)[:, None]
    own = generator.random((2, len(clusters))) < np.array(rates)[:, None]
    return np.where(generator.random((2, len(clusters))) < tie, shared[:, clusters], own)


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_is_scipys_binomial_test(seed):
    a, b = hits(np.random.default_rng(seed), np.arange(150), (0.5, 0.6))
    found = paired_test(a, b, np.arange(150))
    expected = scipy_stats.binomtest(int((a & ~b).sum()), int((a != b).sum())).pvalue
    assert found.p_mcnemar == pytest.approx(expected, rel=1e-9)
    assert found.p == pytest.approx(expected, rel=1e-9)  # one query a cluster: the same test
    assert found.discordance == pytest.approx(100 * (a != b).mean())


@pytest.mark.parametrize("seeds", [1, 3])
def test_sign_flip_is_scipys_permutation_test_of_whole_clusters(seeds):
    generator = np.random.default_rng(seeds)
    clusters = generator.integers(10, size=60)
    a, b = generator.random((2, seeds, 60)) < np.array([0.6, 0.45])[:, None, None]
    b = b[:1]  # another number of seeds
    sums = np.bincount(clusters, a.mean(0) - b.mean(0), minlength=10)
    expected = scipy_stats.permutation_test(
        (sums, np.zeros(10)), lambda x, y: (x - y).sum(), permutation_type="samples", n_resamples=np.inf
    )
    assert paired_test(a, b, clusters).p == pytest.approx(expected.pvalue, rel=1e-9)


def test_the_interval_is_scipys_paired_bootstrap():
    a, b = hits(np.random.default_rng(0), np.arange(300), (0.5, 0.6))
    reference = scipy_stats.bootstrap(
        (a, b),
        lambda x, y, axis: 100 * (x.mean(axis) - y.mean(axis)),
        paired=True,
        n_resamples=3000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    found = paired_test(a, b, np.arange(300))
    interval = found.difference
    assert interval.value == pytest.approx(100 * (a.mean() - b.mean()))
    spread = reference.standard_error
    np.testing.assert_allclose(interval[1:], reference.confidence_interval, atol=0.25 * spread)
    assert found.error == pytest.approx(spread, rel=0.06)


def test_size_coverage_and_power_with_clusters():
    """Clusters of 1 to 6 captions. Under the null at most 5% are rejected; blind to clusters, many more."""
    generator = np.random.default_rng(7)
    clusters = np.repeat(np.arange(60), generator.integers(1, 7, size=60))
    trials = 400
    rejected = mcnemar = covered = blind = 0
    for _ in range(trials):
        a, b = hits(generator, clusters)
        test = paired_test(a, b, clusters)
        rejected += test.p < 0.05
        mcnemar += test.p_mcnemar < 0.05
        covered += test.difference.low <= 0 <= test.difference.high
        blind += scipy_stats.binomtest(int((a & ~b).sum()), max(1, int((a != b).sum()))).pvalue < 0.05
    assert 0.02 <= rejected / trials <= 0.08
    assert mcnemar / trials <= 0.07
    assert 0.91 <= covered / trials <= 0.98
    assert blind / trials > 0.15


@pytest.mark.parametrize(("queries", "discordance"), [(400, 30.0), (1000, 20.0)])
def test_the_detectable_difference_is_found_8_times_out_of_10(queries, discordance):
    delta = detectable_paired(queries, discordance)
    shares = np.array([discordance + delta, discordance - delta]) / 200
    drawn = np.random.default_rng(0).multinomial(queries, [*shares, 1 - shares.sum()], size=3000)
    p_values = scipy_stats.binom.cdf(drawn[:, 1], drawn[:, 0] + drawn[:, 1], 0.5) * 2
    assert 0.75 <= (p_values < 0.05).mean() <= 0.83


def test_a_difference_never_exceeds_the_discordance():
    delta = detectable_paired(100, 1.0)
    assert delta == pytest.approx(detectable_paired(100, delta), rel=1e-6)
    assert detectable_paired(4, 0.0) <= 100


def test_the_pairing_is_what_helps():
    assert detectable_paired(1000, 15) < detectable_unpaired(1000, 46.1)
    assert detectable_unpaired(1000, 46.1) > recall_margin(46.1, 1000)


def test_clusters_that_share_their_fate_count_as_one_query_each():
    a, b = np.repeat(hits(np.random.default_rng(0), np.arange(50)), 4, axis=1)
    found = paired_test(a, b, np.repeat(np.arange(50), 4))
    assert found.queries == pytest.approx(50)
    assert found.detectable == pytest.approx(detectable_paired(50, 100 * (a != b).mean()))


def test_equal_models_do_not_differ():
    a = np.random.default_rng(0).random(40) < 0.5
    found = paired_test(a, a, np.arange(40) // 2)
    assert (found.p, found.p_mcnemar, found.discordance) == (1.0, 1.0, 0.0)
    assert found.difference == (0.0, 0.0, 0.0)


def test_hits_of_seeds_are_averaged():
    a, b = np.array([[1, 1, 0, 0], [1, 0, 0, 0]]), np.array([1, 0, 0, 1])
    found = paired_test(a, b, np.arange(4))
    assert found.difference.value == pytest.approx(-12.5)
    assert found.discordance == pytest.approx(100 * (0.5**2 + 1) / 4)


@pytest.mark.parametrize(
    ("a", "b"), [([50, 53.5], [46, 41.5]), ([50, 51, 47], [40, 49]), ([60.0, 60.5, 61, 60], [20.0, 20, 25])]
)
def test_seeds_by_scipys_welch_test(a, b):
    found = seed_test(a, b, error=2.0)
    assert found.p == pytest.approx(scipy_stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-5)
    variance = np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)
    assert found.share == pytest.approx(variance / (variance + 4))


def test_what_seeds_cannot_say_is_nan():
    assert np.isnan(seed_test([50.0], [40.0, 41.0], 1.0)[2:]).all()
    same = seed_test([50.0, 50.0], [40.0, 40.0], 1.0)
    assert np.isnan(same.p)
    assert (same.sd_a, same.share) == (0.0, 0.0)


def test_holm_against_one_rejection_after_the_other():
    generator = np.random.default_rng(0)
    for _ in range(50):
        p_values = generator.random(8) ** 4
        p_values[generator.integers(8)] = np.nan
        corrected = holm(p_values)
        rejected: set[int] = set()
        for index in np.argsort(p_values)[:7]:
            if p_values[index] * (7 - len(rejected)) >= 0.05:
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(corrected < 0.05)) == rejected
        assert (np.isnan(corrected) == np.isnan(p_values)).all()


@pytest.mark.parametrize(
    ("a", "b", "clusters", "message"),
    [
        ([1, 0, 1], [1, 0], [0, 1, 2], "same queries"),
        ([1, 0, 1], [1, 0, 0], [0, 1], "must both be"),
        ([1, 0], [1, 0], [3, 3], "at least two"),
    ],
)
def test_what_does_not_fit_is_refused(a, b, clusters, message):
    with pytest.raises(MetricError, match=message):
        paired_test(a, b, clusters)
