"""Percentile bootstrap (Efron & Tibshirani 1993, ch. 13) of 95% intervals, clustered.

Captions of one video, words of one caption, and the two videos of a pair rise and fall together: what is
drawn anew is clusters, each with everything that belongs to it. Queries are drawn, the gallery that they were
ranked in is held fixed: an interval tells what other queries would give, not what another gallery would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from xclip_lab.metrics import CUTOFFS, METRICS, MetricError

_BLOCK = 2_000_000  # counts held at once: memory stays at some tens of MB whatever the number of draws


class Interval(NamedTuple):
    """An estimate and the interval around it, in the estimate's unit."""

    value: float
    low: float
    high: float


def recall_intervals(
    ranks: Any,
    clusters: Any,
    draws: int = 1000,
    seed: int = 0,
    lower_median: bool = False,
) -> dict[str, tuple[float, float]]:
    """An interval for every metric of `metrics_of(ranks)`.

    Args:
        ranks: `[N]`, counted from 1. clusters: `[N]`, what each belongs to.
        draws: bootstrap samples. seed: the same seed gives the same intervals.
        lower_median: as in `metrics_of`.

    Returns:
        `{"R@1": (low, high), ...}`, recalls in percent.

    Raises:
        MetricError: shapes that do not fit, or fewer than two clusters.

    >>> recall_intervals([1, 1, 7, 2, 1, 12], [0, 0, 1, 1, 2, 3], seed=0)["R@5"]
    (25.0, 100.0)
    """
    ranks, members, count = _clustered(ranks, clusters, draws)
    order = np.argsort(ranks, kind="stable")
    ordered, members = ranks[order], members[order]
    columns = [np.ones(len(ordered)), ordered, *(100.0 * (ordered <= k) for k in CUTOFFS)]
    sums = _cluster_sums(columns, members, count)
    found: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for weights in _resamples(count, len(ordered), draws, seed):
        total, rank_sum, *hits = (weights @ sums).T
        recalls = {k: hit / total for k, hit in zip(CUTOFFS, hits, strict=True)}
        for k, recall in recalls.items():
            found[f"R@{k}"].append(recall)
        found["MnR"].append(rank_sum / total)
        found["Rsum"].append(recalls[1] + recalls[5] + recalls[10])
        found["MdR"].append(_medians(ordered, weights[:, members], lower_median))
    return {name: _percentiles(np.concatenate(parts)) for name, parts in found.items()}


def cluster_mean_interval(values: Any, clusters: Any, draws: int = 1000, seed: int = 0) -> Interval:
    """The mean of `values [N]` (one a word, say) with an interval; whole `clusters [N]` are drawn anew.

    Raises:
        MetricError: shapes that do not fit, a value that is not finite, or fewer than two clusters.

    >>> interval = cluster_mean_interval([0.2, 0.4, 0.3, 0.9], ["a", "a", "b", "c"])
    >>> round(interval.value, 2), interval.low < interval.value < interval.high
    (0.45, True)
    """
    values, members, count = _clustered(values, clusters, draws)
    sums = _cluster_sums([np.ones(len(values)), values], members, count)
    means = []
    for weights in _resamples(count, count, draws, seed):
        total, summed = (weights @ sums).T
        means.append(summed / total)
    return Interval(float(values.mean()), *_percentiles(np.concatenate(means)))


def _clustered(values: Any, clusters: Any, draws: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The values as float64, the cluster of each as a number from 0, and the number of clusters."""
    values, clusters = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if values.ndim != 1 or values.shape != clusters.shape:
        raise MetricError(
            f"bootstrap: values {list(values.shape)} and clusters {list(clusters.shape)} must both be [N]"
        )
    if draws < 1:
        raise MetricError(f"bootstrap: draws {draws} must be above 0")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise MetricError(f"bootstrap: value {bad[0]} is {values[bad[0]]}, not a finite number")
    names, members = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        raise MetricError(f"bootstrap: {len(names)} cluster(s); an interval needs at least two")
    return values, members, len(names)


def _cluster_sums(columns: list[np.ndarray], members: np.ndarray, count: int) -> np.ndarray:
    """`[count, columns]`: what each cluster adds to each sum."""
    return np.stack([np.bincount(members, column, minlength=count) for column in columns], axis=1)


def _resamples(count: int, width: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks `[draws of the block, count]` of how often each cluster was drawn."""
    generator = np.random.default_rng(seed)
    size = max(1, _BLOCK // max(count, width))
    for start in range(0, draws, size):
        rows = min(size, draws - start)
        drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _medians(ordered: np.ndarray, weights: np.ndarray, lower: bool) -> np.ndarray:
    """Median of each row's multiset, in which `ordered[n]` stands `weights[row, n]` times."""
    cumulated = np.cumsum(weights, axis=1)
    total = cumulated[:, -1:]
    low = ordered[np.count_nonzero(cumulated <= (total - 1) // 2, axis=1)]
    if lower:
        return low
    high = ordered[np.count_nonzero(cumulated <= total // 2, axis=1)]
    return (low + high) / 2


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
