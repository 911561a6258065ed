"""Retrieval metrics as pure functions of a similarity matrix and an index vector."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from xclip_lab.errors import UserError, one_line
from xclip_lab.memory import similarity_matrix
from xclip_lab.registry import did_you_mean

Ties = Literal["pessimistic", "optimistic", "mean", "official"]
METRICS = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR", "Rsum")
CUTOFFS = (1, 5, 10, 50)
_BLOCK = 4_000_000  # entries compared at once: what is needed besides the matrix itself stays at a few MB


class MetricError(UserError, ValueError):
    """A similarity matrix or an index vector that no metric can be made from."""


class Entries(NamedTuple):
    """`ranks [N]`, counted from 1, and `queries [N]`, the caption or video that each belongs to."""

    ranks: np.ndarray
    queries: np.ndarray


def retrieval_metrics(
    similarity: Any, text_to_video: Any, ties: Ties = "pessimistic"
) -> dict[str, dict[str, float]]:
    """Recall at k in percent, median and mean rank, in both directions.

    Text-to-video (`t2v`): each caption looks for its video among all videos. Video-to-text (`v2t`): each
    video looks for its best caption among the other videos' best captions. A video without a caption is a
    distractor in t2v; in v2t it has nothing to be found by and takes no part.

    Args:
        similarity: `[T, V]`, array or tensor, higher is more alike.
        text_to_video: `[T]`, the column of each caption's video.
        ties: what a competitor of equal score does. `pessimistic` stands before the right one, `optimistic`
            behind it, `mean` takes half a place. `official` repeats the papers' code: the right one counts
            once at every place of the tie, so that the denominator grows; where a video has several captions,
            t2v orders equals as the gallery does and its median is the lower of the middle two.

    Returns:
        `{"t2v": {...}, "v2t": {...}}`, each with `R@1 R@5 R@10 R@50 MdR MnR Rsum`
        (`Rsum` = R@1 + R@5 + R@10).

    Raises:
        MetricError: wrong shapes, an index out of range, or a NaN; names the row and column.

    >>> similarity = [[0.9, 0.1, 0.3], [0.2, 0.4, 0.8], [0.1, 0.6, 0.2], [0.0, 0.3, 0.7]]
    >>> metrics = retrieval_metrics(similarity, [0, 1, 1, 2])
    >>> metrics["t2v"]["R@1"], metrics["t2v"]["MnR"]
    (75.0, 1.25)
    >>> metrics["v2t"]["R@1"], metrics["v2t"]["MnR"]
    (66.66666666666667, 1.3333333333333333)
    """
    found = rank_entries(similarity, text_to_video, ties)
    lower = lower_median(text_to_video, ties)
    return {name: metrics_of(entries.ranks, name == "t2v" and lower) for name, entries in found.items()}


def metrics_of(ranks: Any, lower_median: bool = False) -> dict[str, float]:
    """The metrics of some queries, given their ranks `[N]`, for example those of the captions of one level.

    Args:
        ranks: counted from 1. lower_median: of an even number the lower middle rank, not the mean of the two.

    Raises:
        MetricError: no ranks.

    >>> metrics_of([1, 2, 3, 20])
    {'R@1': 25.0, 'R@5': 75.0, 'R@10': 75.0, 'R@50': 100.0, 'MdR': 2.5, 'MnR': 6.5, 'Rsum': 175.0}
    """
    ranks = _to_numpy(ranks, "ranks")
    if ranks.size == 0:
        raise MetricError("no ranks: a metric needs at least one query")
    values = {f"R@{k}": 100.0 * int(np.count_nonzero(ranks <= k)) / ranks.size for k in CUTOFFS}
    values["MdR"] = float(np.sort(ranks)[(ranks.size - 1) // 2] if lower_median else np.median(ranks))
    values["MnR"] = float(ranks.mean())
    values["Rsum"] = values["R@1"] + values["R@5"] + values["R@10"]
    return values


def ranks(similarity: Any, text_to_video: Any, ties: Ties = "pessimistic") -> dict[str, np.ndarray]:
    """`{"t2v": [T], "v2t": [captioned videos]}`, counted from 1; arguments as in `retrieval_metrics`.

    Captions keep their order, videos that of the columns. Under `official` a tie adds entries:
    `rank_entries` says to which query each belongs.

    >>> ranks([[0.9, 0.1], [0.5, 0.5]], [0, 1])["t2v"].tolist()
    [1, 2]
    >>> ranks([[0.9, 0.1], [0.5, 0.5]], [0, 1], ties="mean")["t2v"].tolist()
    [1.0, 1.5]
    """
    return {name: entries.ranks for name, entries in rank_entries(similarity, text_to_video, ties).items()}


def rank_entries(similarity: Any, text_to_video: Any, ties: Ties = "pessimistic") -> dict[str, Entries]:
    """As `ranks`, with the query of each rank: a row of `similarity` for t2v, a column for v2t."""
    scores = _to_numpy(similarity, "similarity")
    if scores.ndim != 2 or scores.size == 0:
        raise MetricError(f"similarity: expected captions x videos [T, V], got shape {list(scores.shape)}")
    found = BlockedRanks(text_to_video, scores.shape[1], ties, keep=0)
    if len(found.index) != len(scores):
        raise MetricError(
            f"text_to_video has {len(found.index)} entries, similarity {len(scores)} rows: give one entry a "
            "caption"
        )
    step = max(1, _BLOCK // scores.shape[1])
    for start in range(0, len(scores), step):
        found.add(scores[start : start + step], start)
    return found.entries()


class BlockedRanks:
    """Ranks, and the best columns of each row, of a matrix that comes in blocks of rows and is never whole.

    Keeps `[C, C]` of the C videos with captions, not `[T, V]`: in memory, or in a temporary file where that
    would need more than a quarter of what is free. With one caption a video it is as large as all scores.

    Args:
        text_to_video: `[T]`. videos: V. ties: as in `retrieval_metrics`. keep: how many columns of each row.

    Attributes:
        above, equal: `[T]`, how many videos stand before a caption's own, and as high as it. best: `[C, C]`,
            of each video's captions the highest score with each video. top: `[T, keep]`, the best columns of
            each row, the best first, equals by their column.

    Raises:
        MetricError: an index out of range or not of whole numbers, or an unknown policy.
        DatasetError: a disk that does not take `best`.

    >>> found = BlockedRanks([0, 1, 1, 2], videos=3, keep=1)
    >>> found.add([[0.9, 0.1, 0.3], [0.2, 0.4, 0.8]], start=0)
    >>> found.add([[0.1, 0.6, 0.2], [0.0, 0.3, 0.7]], start=2)
    >>> found.ranks()["t2v"].tolist(), found.ranks()["v2t"].tolist(), found.top.ravel().tolist()
    ([1, 2, 1, 1], [1, 1, 2], [0, 2, 1, 2])
    """

    def __init__(self, text_to_video: Any, videos: int, ties: Ties = "pessimistic", keep: int = 10) -> None:
        if ties not in get_args(Ties):
            allowed = get_args(Ties)
            raise MetricError(
                f"ties: {ties!r} is not one of {', '.join(allowed)}{did_you_mean(str(ties), allowed)}"
            )
        self.index, self.videos, self.ties = _checked_index(text_to_video, videos), videos, ties
        self._captioned, self._place = np.unique(self.index, return_inverse=True)
        self._in_gallery_order = lower_median(self.index, ties)
        self.above = np.full(len(self.index), -1)  # until a row comes
        self.equal = np.zeros_like(self.above)
        self.top = np.empty((len(self.index), min(keep, videos)), dtype=np.int64)
        count = len(self._captioned)
        self.best = similarity_matrix(count, count, "auto")
        self.best.fill(-np.inf)

    def add(self, scores: Any, start: int) -> None:
        """Some rows, `[n, V]`, the first of which is row `start`.

        Raises:
            MetricError: a NaN, what is no number, or rows and columns that there are not.
        """
        block, rows = _checked_block(scores, start), slice(start, start + len(scores))
        if block.shape[1] != self.videos or rows.stop > len(self.index):
            raise MetricError(
                f"rows {start} to {rows.stop - 1} with {block.shape[1]} columns do not fit: there are "
                f"{len(self.index)} captions and {self.videos} videos"
            )
        own, index = np.take_along_axis(block, self.index[rows, None], 1), self.index[rows, None]
        above, equal = block > own, block == own
        if self._in_gallery_order:  # no equals: the gallery orders them
            above |= equal & (np.arange(self.videos) < index)
            equal = above[:, :0]
        self.above[rows] = np.count_nonzero(above, axis=1)
        self.equal[rows] = np.maximum(np.count_nonzero(equal, axis=1) - 1, 0)
        if self.top.shape[1]:
            self.top[rows] = _best_columns(block, self.top.shape[1])
        self.best = self.best.astype(np.result_type(self.best, block), copy=False)
        by_video = np.argsort(self._place[rows], kind="stable")
        videos, first = np.unique(self._place[rows][by_video], return_index=True)
        columns = block if len(self._captioned) == self.videos else block[:, self._captioned]
        best = np.maximum.reduceat(columns[by_video], first, axis=0)
        self.best[videos] = np.maximum(self.best[videos], best)

    def entries(self) -> dict[str, Entries]:
        """As `rank_entries` gives them, once all rows were added.

        Raises:
            MetricError: rows are missing.
        """
        missing = np.count_nonzero(self.above < 0)
        if missing:
            raise MetricError(f"{missing} of {len(self.index)} rows were not added")
        own = np.diagonal(self.best).copy()
        above, equal = np.zeros(len(own), dtype=np.int64), np.full(len(own), -1)
        step = max(1, _BLOCK // max(1, len(own)))
        for start in range(0, len(own), step):
            some = self.best[start : start + step]
            above += np.count_nonzero(some > own, axis=0)
            equal += np.count_nonzero(some == own, axis=0)
        return {
            "t2v": _settle(self.above, self.equal, np.arange(len(self.index)), self.ties),
            "v2t": _settle(above, equal, self._captioned, self.ties),
        }

    def ranks(self) -> dict[str, np.ndarray]:
        """As `ranks` gives them; raises as `entries`."""
        return {name: entries.ranks for name, entries in self.entries().items()}


def _best_columns(block: np.ndarray, keep: int) -> np.ndarray:
    """`[n, keep]`, the highest of each row first, equals by their column; without a sort of whole rows."""
    last = block.shape[1] - keep
    least = np.partition(block, last, axis=1)[:, last, None]
    above, equal = block > least, block == least
    wanted = keep - np.count_nonzero(above, axis=1, keepdims=True)
    chosen = above | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= wanted))
    columns = np.nonzero(chosen)[1].reshape(-1, keep)
    order = np.argsort(-np.take_along_axis(block, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)


def lower_median(text_to_video: Any, ties: Ties) -> bool:
    """Whether t2v's median is the lower one: the official code's, where a video has several captions."""
    index = _to_numpy(text_to_video, "text_to_video")
    return ties == "official" and len(np.unique(index)) < len(index)


def _settle(above: np.ndarray, equal: np.ndarray, queries: np.ndarray, ties: str) -> Entries:
    """Ranks from the number of competitors `above [Q]` and of equal score `equal [Q]`."""
    if ties == "optimistic":
        return Entries(above + 1, queries)
    if ties == "mean":
        return Entries(above + 1 + equal / 2, queries)
    if ties == "pessimistic":
        return Entries(above + 1 + equal, queries)
    places = equal + 1
    starts = np.cumsum(places) - places
    offset = np.arange(places.sum()) - np.repeat(starts, places)
    return Entries(np.repeat(above + 1, places) + offset, np.repeat(queries, places))


def _to_numpy(values: Any, name: str) -> np.ndarray:
    try:
        if hasattr(values, "detach"):  # a tensor; NumPy has no bfloat16
            values = values.detach().cpu()
            values = values.float() if str(values.dtype) == "torch.bfloat16" else values
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # torch raises the last of sparse tensors
        raise MetricError(f"{name}: expected a plain array, rows of one length: {one_line(error)}") from error


def _checked_index(text_to_video: Any, videos: int) -> np.ndarray:
    index = _to_numpy(text_to_video, "text_to_video")
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise MetricError(
            f"text_to_video: expected whole numbers [T], got {index.dtype} of shape {list(index.shape)}"
        )
    outside = np.flatnonzero((index < 0) | (index >= videos))
    if outside.size:
        row = outside[0]
        raise MetricError(
            f"text_to_video[{row}] is {index[row]}: similarity has the columns 0 to {videos - 1}"
        )
    return index.astype(np.int64)


def _checked_block(similarity: Any, first_row: int) -> np.ndarray:
    """Rows of scores, as floats."""
    scores = _to_numpy(similarity, "similarity")
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.number) or np.iscomplexobj(scores):
        raise MetricError(
            f"similarity: expected real numbers [T, V], got {scores.dtype} of shape {list(scores.shape)}"
        )
    bad = np.argwhere(np.isnan(scores))
    if len(bad):
        row, column = first_row + bad[0, 0], bad[0, 1]
        raise MetricError(
            f"similarity is NaN at row {row}, column {column} (caption {row}, video {column}); look for "
            "a video without valid frames, or weights that are not finite"
        )
    return scores if np.issubdtype(scores.dtype, np.floating) else scores.astype(np.float64)
