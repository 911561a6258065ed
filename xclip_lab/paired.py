"""Two models on the same queries: how far apart, how sure of it, and how small a difference could be seen.

Queries of one cluster (captions of a video, the two videos of a pair) rise and fall together: whole clusters
are drawn anew, flipped and counted. `paired_test` speaks of other queries put to the same trained models,
`seed_test` of other trainings put to the same queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from xclip_lab.metrics import MetricError
from xclip_lab.stats import Interval, cluster_mean_interval

LEVEL, POWER = 0.05, 0.8
_Z, _Z_POWER = NormalDist().inv_cdf(1 - LEVEL / 2), NormalDist().inv_cdf(POWER)


class PairedTest(NamedTuple):
    """The difference of two recalls on the same queries.

    Attributes:
        difference: in points, with its 95% interval, bootstrapped over clusters. error: its standard error.
        p: exact sign-flip test, two-sided: had the two models nothing to tell them apart, each cluster might
            as well have gone the other way; the share of all 2^clusters ways at least as far from 0.
        p_mcnemar: exact McNemar test: a cluster counts for the model that answers more of its queries. NaN
            where hits are averaged over seeds.
        queries: how many independent queries would be as sure (N over the design effect of the clusters).
        discordance: percent of queries that one of the two finds and the other does not; with several seeds
            the mean square of the difference of a query's hit rates, which takes its place in the formula.
        detectable: as `detectable_paired` of the two numbers above.
    """

    difference: Interval
    error: float
    p: float
    p_mcnemar: float
    queries: float
    discordance: float
    detectable: float


class SeedTest(NamedTuple):
    """What the seeds say about a difference; NaN where a side has one training only.

    Attributes:
        sd_a, sd_b: standard deviation of a model's recall over its trainings, in points.
        share: of the variance of the difference, what comes from the seeds; the rest is from the queries.
        p: Welch's t-test over the trainings, two-sided; NaN also where neither side's recalls differ.
    """

    sd_a: float
    sd_b: float
    share: float
    p: float


def paired_test(hits_a: Any, hits_b: Any, clusters: Any) -> PairedTest:
    """Compare what two models find of the same queries.

    Args:
        hits_a, hits_b: bool `[N]`, or `[seeds, N]` of several trainings, whose hits are averaged.
        clusters: `[N]`, what each query belongs to.

    Raises:
        MetricError: shapes that do not fit, or fewer than two clusters.

    >>> a, b = [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0]
    >>> test = paired_test(a, b, range(8))
    >>> test.difference.value, test.p, test.p_mcnemar, test.discordance
    (50.0, 0.21875, 0.21875, 75.0)
    """
    a, b = (np.atleast_2d(np.asarray(hits, dtype=np.int64)) for hits in (hits_a, hits_b))
    clusters = np.asarray(clusters)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1:] != b.shape[1:]:
        raise MetricError(
            f"paired test: hits {list(a.shape)} and {list(b.shape)} are not of the same queries"
        )
    net = a.sum(0) * len(b) - b.sum(0) * len(a)  # whole numbers, so that the tests are exact
    values = 100.0 * net / (len(a) * len(b))
    difference = cluster_mean_interval(values, clusters)
    members = np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(members, net).astype(np.int64)
    spread = np.bincount(members, values - values.mean())
    single, together = ((values - values.mean()) ** 2).sum(), (spread**2).sum()
    queries = float(len(values) * single / together if together else len(values))
    discordance = float((values**2).mean()) / 100
    return PairedTest(
        difference=difference,
        error=math.sqrt(together * len(sums) / (len(sums) - 1)) / len(values),
        p=_sign_flip(sums),
        p_mcnemar=_sign_flip(np.sign(sums)) if len(a) == len(b) == 1 else math.nan,
        queries=queries,
        discordance=discordance,
        detectable=detectable_paired(queries, discordance),
    )


def _sign_flip(sums: np.ndarray) -> float:
    """P(|sum of +-sums| >= |sum of sums|), every sign a fair coin, by adding up whole numbers one by one."""
    sizes = np.abs(sums[sums != 0])
    chances = np.ones(1)  # [t]: that those with a plus sign add up to t
    for size in sizes:
        chances = (np.pad(chances, (0, size)) + np.pad(chances, (size, 0))) / 2
    totals = 2 * np.arange(len(chances)) - sizes.sum()
    return min(1.0, float(chances[np.abs(totals) >= abs(sums.sum())].sum()))


def seed_test(recalls_a: Sequence[float], recalls_b: Sequence[float], error: float) -> SeedTest:
    """Would other trainings of the same two models differ the same way, on the same queries?

    Two trainings a side can hardly say: with one or two degrees of freedom a difference must be 4 to 13
    times its standard error to pass the 5% level, and a standard deviation of two numbers is a guess.

    Args:
        recalls_a, recalls_b: of each training, in percent. error: that of `paired_test`.

    >>> seed_test([46.75, 53.25], [46.25, 41.5], 2.3).p < 0.3
    True
    """
    a, b = np.asarray(recalls_a, dtype=np.float64), np.asarray(recalls_b, dtype=np.float64)
    sd_a, sd_b = (float(side.std(ddof=1)) if len(side) > 1 else math.nan for side in (a, b))
    parts = sd_a**2 / len(a), sd_b**2 / len(b)
    variance = sum(parts)
    total = variance + error**2
    share = variance / total if total else math.nan
    if not variance > 0:  # NaN too
        return SeedTest(sd_a, sd_b, share, math.nan)
    freedom = variance**2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    return SeedTest(sd_a, sd_b, share, _student_tail(abs(a.mean() - b.mean()) / math.sqrt(variance), freedom))


def _student_tail(t: float, freedom: float) -> float:
    """P(|T| > t): where T is sqrt(freedom) tan(angle), the angle's density is cos(angle)^(freedom - 1)."""
    start = math.atan(t / math.sqrt(freedom))
    steps = (np.arange(20_000) + 0.5) / 20_000
    tail, whole = (np.cos(low + (math.pi / 2 - low) * steps) ** (freedom - 1) for low in (start, 0.0))
    return float(tail.mean() * (1 - 2 * start / math.pi) / whole.mean())


def holm(p_values: Any) -> np.ndarray:
    """Holm's (1979) correction for many comparisons; NaN, a test that was not made, stays and does not count.

    That any of the true null hypotheses is rejected has a chance of at most 5% where corrected values below
    0.05 are, however the tests hang together.

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    corrected = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: np.count_nonzero(~np.isnan(p_values))]  # NaN is sorted last
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return corrected


def recall_margin(recall: float, queries: float) -> float:
    """Half of a recall's 95% interval, in points: `1.96 sqrt(p (1 - p) / N)`, N independent queries.

    The 1,000 queries of MSR-VTT 1k-A leave X-CLIP's published 46.1 open by 3 points to either side:

    >>> round(recall_margin(46.1, 1000), 1)
    3.1
    """
    return _Z * math.sqrt(recall * (100 - recall) / queries)


def detectable_paired(queries: float, discordance: float) -> float:
    """The least difference of recalls, in points, that a test on the same queries finds 8 times out of 10.

    McNemar's test at the 5% level (Connor 1987): of N queries a share psi is found by exactly one of the two
    models, and `sqrt(N) delta = z(0.975) sqrt(psi) + z(0.8) sqrt(psi - delta^2)`, here solved for delta, near
    `2.8 sqrt(psi / N)`. No difference exceeds psi: where delta would, it is the least at which psi = delta.

    Args:
        queries: N; of clustered ones N over the design effect. discordance: psi, percent.

    Two models of which each finds on MSR-VTT 1k-A 10% of the 1,000 queries that the other misses:

    >>> round(detectable_paired(1000, 20), 1)
    4.0
    """
    unit = _Z * math.sqrt(queries) + _Z_POWER * math.sqrt(max(0.0, queries + _Z_POWER**2 - _Z**2))
    unit /= queries + _Z_POWER**2
    return 100 * unit * max(math.sqrt(discordance / 100), unit)


def detectable_unpaired(queries: float, recall: float) -> float:
    """As `detectable_paired` where only the two recalls are known, as of papers: N queries each, both near p.

    `delta = (z(0.975) + z(0.8)) sqrt(2 p (1 - p) / N)`.

    >>> round(detectable_unpaired(1000, 46.1), 1)
    6.2
    """
    return (_Z + _Z_POWER) * math.sqrt(2 * recall * (100 - recall) / queries)
