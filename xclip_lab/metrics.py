"""Retrieval metrics as pure functions of a similarity matrix and an index vector."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from xclip_lab.errors import UserError
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
    ranks = np.asarray(ranks)
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
    if ties not in get_args(Ties):
        allowed = get_args(Ties)
        raise MetricError(
            f"ties: {ties!r} is not one of {', '.join(allowed)}{did_you_mean(str(ties), allowed)}"
        )
    scores, index = _checked(similarity, text_to_video)
    t2v = _caption_entries(scores, index, ties, _several_captions(index))
    return {"t2v": t2v, "v2t": _settle(*_video_to_text(scores, index), np.unique(index), ties)}


class BlockedRanks:
    """`ranks`, and the best columns of each row, of a matrix that comes in blocks of rows and is never whole.

    Needs memory for a `[V, V]` matrix, not for `[T, V]`.

    Args:
        text_to_video: `[T]`. videos: V. ties: as in `retrieval_metrics`. keep: how many columns of each row.

    >>> found = BlockedRanks([0, 1, 1, 2], videos=3, keep=1)
    >>> found.add([[0.9, 0.1, 0.3], [0.2, 0.4, 0.8]])
    >>> found.add([[0.1, 0.6, 0.2], [0.0, 0.3, 0.7]])
    >>> found.ranks()["t2v"].tolist(), found.ranks()["v2t"].tolist(), found.top.ravel().tolist()
    ([1, 2, 1, 1], [1, 1, 2], [0, 2, 1, 2])
    """

    def __init__(self, text_to_video: Any, videos: int, ties: Ties = "pessimistic", keep: int = 10) -> None:
        self.index, self.ties = _to_numpy(text_to_video).astype(np.int64), ties
        self.top = np.empty((len(self.index), min(keep, videos)), dtype=np.int64)
        self._best = np.full((videos, videos), -np.inf, dtype=np.float32)  # [video of a caption, video]
        self._of_texts: list[np.ndarray] = []
        self._seen = 0

    def add(self, scores: Any) -> None:
        """The next rows, `[n, V]`.

        Raises:
            MetricError: a NaN, or another number of videos.
        """
        rows = slice(self._seen, self._seen + len(scores))
        block, index = _checked(scores, self.index[rows], first_row=rows.start)
        if block.shape[1] != len(self._best):
            raise MetricError(f"a block has {block.shape[1]} columns, there are {len(self._best)} videos")
        found = _caption_entries(block, index, self.ties, _several_captions(self.index))
        self._of_texts.append(found.ranks)
        by_video = np.argsort(index, kind="stable")
        videos, first = np.unique(index[by_video], return_index=True)
        best = np.maximum.reduceat(block[by_video], first, axis=0)
        self._best[videos] = np.maximum(self._best[videos], best)
        kept = np.argpartition(-block, self.top.shape[1] - 1, axis=1)[:, : self.top.shape[1]]
        order = np.argsort(-np.take_along_axis(block, kept, 1), axis=1, kind="stable")
        self.top[rows] = np.take_along_axis(kept, order, 1)
        self._seen = rows.stop

    def ranks(self) -> dict[str, np.ndarray]:
        """As `ranks` gives them, once all rows were added.

        Raises:
            MetricError: rows are missing.
        """
        if self._seen < len(self.index):
            raise MetricError(f"{self._seen} of {len(self.index)} rows were added")
        captioned = np.unique(self.index)
        counts = _video_to_text(self._best[captioned], captioned)
        return {
            "t2v": np.concatenate(self._of_texts),
            "v2t": _settle(*counts, captioned, self.ties).ranks,
        }


def lower_median(text_to_video: Any, ties: Ties) -> bool:
    """Whether t2v's median is the lower one: the official code's, where a video has several captions."""
    return ties == "official" and _several_captions(_to_numpy(text_to_video))


def _caption_entries(scores: np.ndarray, index: np.ndarray, ties: str, several: bool) -> Entries:
    rows = np.arange(len(index))
    if ties == "official" and several:
        return Entries(_gallery_order_ranks(scores, index), rows)
    return _settle(*_text_to_video(scores, index), rows, ties)


def _several_captions(index: np.ndarray) -> bool:
    return len(np.unique(index)) < len(index)


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


def _text_to_video(scores: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each caption the number of videos above its own, and of others with the same score."""
    above = np.empty(len(index), dtype=np.int64)
    equal = np.empty_like(above)
    for rows in _blocks(len(index), scores.shape[1]):
        own = np.take_along_axis(scores[rows], index[rows, None], axis=1)
        above[rows] = np.count_nonzero(scores[rows] > own, axis=1)
        equal[rows] = np.count_nonzero(scores[rows] == own, axis=1) - 1
    return above, equal


def _gallery_order_ranks(scores: np.ndarray, index: np.ndarray) -> np.ndarray:
    """For each caption the rank of its video when videos of equal score keep the gallery's order."""
    found = np.empty(len(index), dtype=np.int64)
    position = np.arange(scores.shape[1])
    for rows in _blocks(len(index), scores.shape[1]):
        own = np.take_along_axis(scores[rows], index[rows, None], axis=1)
        earlier = (scores[rows] == own) & (position < index[rows, None])
        found[rows] = 1 + np.count_nonzero((scores[rows] > own) | earlier, axis=1)
    return found


def _video_to_text(scores: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each captioned video the number of videos whose best caption beats its own best, and of equals."""
    videos, first = np.unique(np.sort(index), return_index=True)
    by_video = np.argsort(index, kind="stable")
    above = np.empty(len(videos), dtype=np.int64)
    equal = np.empty_like(above)
    for part in _blocks(len(videos), len(index)):
        best = np.maximum.reduceat(scores[np.ix_(by_video, videos[part])], first, axis=0)
        own = np.diagonal(best[part])
        above[part] = np.count_nonzero(best > own, axis=0)
        equal[part] = np.count_nonzero(best == own, axis=0) - 1
    return above, equal


def _blocks(count: int, width: int) -> list[slice]:
    size = max(1, _BLOCK // max(1, width))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _to_numpy(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor; NumPy has no bfloat16
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)


def _checked(similarity: Any, text_to_video: Any, first_row: int = 0) -> tuple[np.ndarray, np.ndarray]:
    scores, index = _to_numpy(similarity), _to_numpy(text_to_video)
    if scores.ndim != 2 or scores.size == 0:
        raise MetricError(f"similarity: expected captions x videos [T, V], got shape {list(scores.shape)}")
    if not np.issubdtype(scores.dtype, np.number) or np.iscomplexobj(scores):
        raise MetricError(f"similarity: expected real numbers, got {scores.dtype}")
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise MetricError(
            f"text_to_video: expected whole numbers [T], got {index.dtype} of shape {list(index.shape)}"
        )
    captions, videos = scores.shape
    if len(index) != captions:
        raise MetricError(
            f"text_to_video has {len(index)} entries, similarity {captions} rows: give one entry a caption"
        )
    outside = np.flatnonzero((index < 0) | (index >= videos))
    if outside.size:
        row = outside[0]
        raise MetricError(
            f"text_to_video[{row}] is {index[row]}: similarity has the columns 0 to {videos - 1}"
        )
    for rows in _blocks(captions, videos):
        bad = np.argwhere(np.isnan(scores[rows]))
        if len(bad):
            row, column = first_row + rows.start + bad[0, 0], bad[0, 1]
            raise MetricError(
                f"similarity is NaN at row {row}, column {column} (caption {row}, video {column}); look for "
                "a video without valid frames, or weights that are not finite"
            )
    return scores, index.astype(np.int64)
