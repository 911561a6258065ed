"""How good is an attention map? Pure measures of arrays, against a truth and against what a model does.

Ties count as a draw among them would on average: a uniform map scores what chance scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


def pointing(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Whether the largest weight of each row lies on one of its own frames, `[R]` of 0 to 1.

    Args:
        rows: `[R, F]`. own: bool `[R, F]`.

    >>> pointing(np.array([[0.1, 0.7, 0.2], [1, 1, 0]]), np.array([[0, 1, 0], [0, 1, 0]], bool)).tolist()
    [1.0, 0.5]
    """
    top = rows == rows.max(-1, keepdims=True)
    return (top & own).sum(-1) / top.sum(-1)


def mass(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The share of each row of weights `[R, F]` on its own frames, `[R]`; NaN for a row of zeros."""
    with np.errstate(invalid="ignore"):
        return (rows * own).sum(-1) / rows.sum(-1)


def precision_recall(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve of each row (average precision), `[R]`, between the least that is
    possible with so many own frames, 0, and 1 (Boyd et al. 2012).

    Without that scale a map that puts every own frame last still has an area: the more frames are own, the
    larger. NaN where all frames are own or none is.

    >>> own = np.array([[True, True, False, False]])
    >>> [precision_recall(np.array([row]), own).item() for row in ([4, 3, 2, 1], [1, 2, 3, 4])]
    [1.0, 0.0]
    """
    frames = rows.shape[-1]
    above = rows[:, None, :] > rows[:, :, None]  # [R, i, j]: j stands above i
    tied = rows[:, None, :] == rows[:, :, None]
    positives = own[:, None, :]
    first, own_first = above.sum(-1), (above & positives).sum(-1)
    ties, own_ties = tied.sum(-1), (tied & positives).sum(-1)
    place = np.arange(1, frames + 1)  # of i among its ties, each as likely
    found = (
        own_first[..., None] + 1 + (place - 1) * ((own_ties - 1) / np.maximum(ties - 1, 1))[..., None]
    ) / (first[..., None] + place)
    precision = (found * (place <= ties[..., None])).sum(-1) / ties
    count = own.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (precision * own).sum(-1) / count
        order = np.arange(1, frames + 1)
        worst = np.where(order <= count[:, None], order / (frames - count[:, None] + order), 0.0)
        least = worst.sum(-1) / count
        return (area - least) / (1 - least)


def padding_share(weights: np.ndarray, words: int, frames: int, over: str) -> float:
    """How much of the attention of one pair lies on padding.

    Args:
        weights: `[W, F]`, of which the first `words` and `frames` are real. over: what sums to 1: `frames`
            (each word's row), `words` (each frame's column) or `both` (all).
    """
    if over == "frames":
        weights = weights[:words]
    elif over == "words":
        weights = weights[:, :frames]
    return max(0.0, float(1 - weights[:words, :frames].sum() / weights.sum()))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of the rows of two maps `[R, F]`, `[R]`; NaN where a row is constant.

    >>> rank_correlation(np.array([[1, 2, 3]]), np.array([[10, 30, 20]])).tolist()
    [0.5]
    """
    ranks = [_ranks(rows) for rows in (first, second)]
    one, other = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


class Removal(NamedTuple):
    """What taking frames away does to one logit, of each of M orders.

    Attributes:
        insertion, deletion: `[M]`, 0 the worst order that was tried, 1 the best; NaN where none matters.
        kept, removed: `[M, F]`, the logit with the first 1 ... F frames of an order, and without its first
            0 ... F - 1.
    """

    insertion: np.ndarray
    deletion: np.ndarray
    kept: np.ndarray
    removed: np.ndarray


def removal(logit: Callable[[np.ndarray], np.ndarray], orders: Sequence[np.ndarray]) -> Removal:
    """Insertion and deletion curves (Petsiuk et al. 2018) and where their areas lie.

    An area is put on the scale from the worst to the best order that is known: those given, their reverses,
    and four greedy ones (the frame whose keeping, or whose loss, moves the logit most comes next).

    Args:
        logit: bool `[K, F]`, which frames are kept (at least one in each row) -> `[K]`.
        orders: each a permutation of the F frames, the most important first.
    """
    frames = len(orders[0])
    known: dict[bytes, float] = {}

    def logits(kept: np.ndarray) -> np.ndarray:
        keys = [row.tobytes() for row in kept]
        new = {key: row for key, row in zip(keys, kept, strict=True) if key not in known}
        if new:
            known.update(zip(new, np.asarray(logit(np.stack(list(new.values()))), float), strict=True))
        return np.array([known[key] for key in keys])

    chains = [chain for order in orders for chain in (_chain(order), _chain(order[::-1]))]
    curves = logits(np.concatenate(chains)).reshape(len(orders), 2, frames)
    greedy = _greedy(logits, frames)
    areas = np.concatenate([curves[:, :, :-1].mean(-1).ravel(), greedy]) if frames > 1 else np.zeros(1)
    worst, span = areas.min(), np.ptp(areas)
    kept, removed = curves[:, 0], curves[:, 1, ::-1]
    if not span:
        nothing = np.full(len(orders), np.nan)
        return Removal(nothing, nothing, kept, removed)
    insertion = (kept[:, :-1].mean(-1) - worst) / span
    deletion = 1 - (removed[:, 1:].mean(-1) - worst) / span
    return Removal(insertion, deletion, kept, removed)


def order_of(weights: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The places of `weights [F]` from the largest on, ties in a random order."""
    shuffled = generator.permutation(len(weights))
    return shuffled[np.argsort(-weights[shuffled], kind="stable")]


def _chain(order: np.ndarray) -> np.ndarray:
    """Bool `[F, F]`: row k holds the first k + 1 frames of an order."""
    place = np.empty(len(order), dtype=int)
    place[order] = np.arange(len(order))
    return place[None] <= np.arange(len(order))[:, None]


def _greedy(logits: Callable[[np.ndarray], np.ndarray], frames: int) -> np.ndarray:
    """Areas `[4]` of the orders that are built, and taken apart, by always the largest or smallest logit."""
    walks = [(np.zeros(frames, bool), 1), (np.zeros(frames, bool), -1)]
    walks += [(np.ones(frames, bool), 1), (np.ones(frames, bool), -1)]
    areas = np.zeros(4)
    for _ in range(frames - 1):
        steps = [np.flatnonzero(kept == (number > 1)) for number, (kept, _) in enumerate(walks)]
        tried = [
            kept ^ np.eye(frames, dtype=bool)[step] for (kept, _), step in zip(walks, steps, strict=True)
        ]
        found = np.split(logits(np.concatenate(tried)), np.cumsum([len(part) for part in tried])[:-1])
        for number, (_, sign) in enumerate(walks):
            best = int(np.argmax(sign * found[number]))
            walks[number] = tried[number][best], sign
            areas[number] += found[number][best] / (frames - 1)
    return areas


def _ranks(rows: np.ndarray) -> np.ndarray:
    """Ranks along each row, ties in the middle."""
    less = (rows[:, None, :] < rows[:, :, None]).sum(-1)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(-1)
    return less + (equal + 1) / 2
