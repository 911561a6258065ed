"""A `Result`: similarities, ranks, metrics with intervals, and the stamp that says how they came about."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xclip_lab.atomic import replacing, sync, write_text
from xclip_lab.errors import UserError, count_and_first, writing
from xclip_lab.metrics import METRICS, Entries, MetricError, lower_median, metrics_of, rank_entries
from xclip_lab.stats import recall_intervals

SIDES = {"t2v": "text-to-video", "v2t": "video-to-text"}
RERANKED = "reranked"
_JSON = ("gallery", "stamp", "intervals", "metrics")
_SIMILARITY, _SIMILARITY_V2T, _TOP = "similarity.npy", "similarity_v2t.npy", "top.npy"


class ResultError(UserError):
    """A result that cannot be written, or a folder that holds none."""


@dataclass(frozen=True)
class Result:
    """An evaluation and how it came about.

    Attributes:
        scores: `[T, V]`, float32 as the model gives it, float64 re-ranked; None where none were kept
            (`evaluation.similarity=none`). Read them as `similarity`.
        text_to_video: `[T]`, the column of each caption's video.
        captions: the T texts. videos: the V video ids. rows: `[T]`, the dataset's sample that each row is
            (every sample in its order, less those of missing videos).
        clusters: `[V]`, videos with the same number are drawn together (`video_clusters`).
        entries: `{"t2v": ..., "v2t": ...}`, the ranks and whose each is (`metrics.Entries`).
        metrics: `{"t2v": {"R@1": ...}, "v2t": {...}}`, recalls in percent.
        intervals: the same keys, 95% (low, high), bootstrapped over clusters; empty where there are none.
        stamp: checkpoint, dataset, protocol, what selected the checkpoint, ties, sampler, versions and so on;
            `post_processing` is "none", or how it was re-ranked and where the statistics come from.
        similarity_v2t: `[T, V]` that v2t ranks where it is another matrix: re-ranked similarities hold for
            one direction only, and `similarity` is then that of t2v alone. None: `similarity` serves both.
        top: `[T, 10]`, the columns of each caption's best videos, the best first, where no scores were kept.
        reranked: the same evaluation re-ranked (`evaluation.rerank`), beside this raw one.
    """

    scores: np.ndarray | None
    text_to_video: np.ndarray
    captions: list[str]
    videos: list[str]
    rows: np.ndarray
    clusters: np.ndarray
    entries: dict[str, Entries]
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    stamp: dict[str, Any]
    similarity_v2t: np.ndarray | None = None
    top: np.ndarray | None = None
    reranked: Result | None = None

    @property
    def ranks(self) -> dict[str, np.ndarray]:
        """`{"t2v": [T], "v2t": [V]}`, from 1; under `official` ties add some."""
        return {side: found.ranks for side, found in self.entries.items()}

    @property
    def similarity(self) -> np.ndarray:
        """`[T, V]`, the scores.

        Raises:
            ResultError: they were not kept.
        """
        if self.scores is None:
            raise ResultError(
                "this result has no scores, only ranks and each caption's first videos: evaluate again "
                "without evaluation.similarity=none"
            )
        return self.scores

    @classmethod
    def rank(
        cls,
        scores: np.ndarray | None,
        text_to_video: np.ndarray,
        clusters: np.ndarray,
        stamp: dict[str, Any],
        similarity_v2t: np.ndarray | None = None,
        entries: Mapping[str, Entries] | None = None,
        **gallery: Any,
    ) -> Result:
        """A result from its similarities: ranks, metrics and intervals by the stamp's `ties` and `intervals`.

        Args:
            entries: the ranks, where they are known already. gallery: `captions`, `videos`, `rows` and maybe
                `top`; the rest as the attributes.

        Raises:
            MetricError: a similarity that is NaN, or shapes that do not fit.
        """
        if entries is None:
            entries = _entries(scores, similarity_v2t, text_to_video, stamp["ties"])
        lower = {"t2v": lower_median(text_to_video, stamp["ties"]), "v2t": False}
        of_queries = {"t2v": clusters[text_to_video], "v2t": clusters}
        intervals = {
            side: _intervals(found, of_queries[side], stamp, lower[side]) for side, found in entries.items()
        }
        return cls(
            scores=scores,
            text_to_video=text_to_video,
            clusters=clusters,
            entries=dict(entries),
            metrics={side: metrics_of(found.ranks, lower[side]) for side, found in entries.items()},
            intervals=intervals if stamp["intervals"] else {},
            stamp=stamp,
            similarity_v2t=similarity_v2t,
            **gallery,
        )

    def subset(self, captions: Any) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Text-to-video metrics of some captions in the full gallery, and their intervals.

        Args:
            captions: bool `[T]`, for example `levels[result.rows] == 3`.

        Raises:
            MetricError: another length, or no caption chosen.
        """
        chosen = np.asarray(captions, dtype=bool)
        if chosen.shape != self.text_to_video.shape:
            raise MetricError(
                f"subset: expected one truth value for each of {len(self.captions)} captions, "
                f"got shape {list(chosen.shape)}"
            )
        ties = self.stamp["ties"]
        found = self.entries["t2v"]
        kept = chosen[found.queries]
        entries = Entries(found.ranks[kept], found.queries[kept])
        lower = lower_median(self.text_to_video, ties)
        clusters = self.clusters[self.text_to_video]
        return metrics_of(entries.ranks, lower), _intervals(entries, clusters, self.stamp, lower)

    def save(self, folder: str | Path) -> Path:
        """Write `metrics.json`, `intervals.json`, `stamp.json`, `gallery.json` and `similarity.npy`, or where
        no scores were kept `top.npy`, and of both directions `ranks_t2v.npy` and `queries_t2v.npy`.

        A re-ranked result goes, with the same names, into `reranked/`, and `similarity_v2t.npy` with it. What
        lay there from an earlier result goes. Each file appears whole or not at all; `metrics.json` comes
        last.

        Raises:
            ResultError: the folder cannot be written, or the disk is full.
        """
        folder = Path(folder)
        gallery = {
            "captions": self.captions,
            "videos": self.videos,
            "text_to_video": self.text_to_video.tolist(),
            "rows": self.rows.tolist(),
            "clusters": self.clusters.tolist(),
        }
        with writing(folder, " for the result", ResultError):
            folder.mkdir(parents=True, exist_ok=True)
            if self.reranked is None:
                _remove(folder / RERANKED)
            else:
                self.reranked.save(folder / RERANKED)
            arrays = {_SIMILARITY: self.scores, _SIMILARITY_V2T: self.similarity_v2t, _TOP: self.top}
            for side, found in self.entries.items():
                kept = found if self.scores is None else (None, None)
                arrays |= zip(_entry_files(side), kept, strict=True)
            for name, array in arrays.items():
                if array is None:
                    (folder / name).unlink(missing_ok=True)
                else:
                    with replacing(folder / name) as temporary:
                        np.save(temporary, array)
                        sync(temporary)
            for name, content in zip(_JSON, (gallery, self.stamp, self.intervals, self.metrics), strict=True):
                write_text(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """What `save` wrote.

        Raises:
            ResultError: a file is missing or damaged.
        """
        folder = Path(folder)
        v2t, reranked = folder / _SIMILARITY_V2T, folder / RERANKED
        try:
            top = np.load(folder / _TOP) if (folder / _TOP).exists() else None
            similarity = np.load(folder / _SIMILARITY) if top is None else None
            similarity_v2t = np.load(v2t) if v2t.exists() else None
            gallery, stamp, intervals, metrics = (
                json.loads((folder / f"{name}.json").read_text()) for name in _JSON
            )
            text_to_video = np.asarray(gallery["text_to_video"], dtype=np.int64)
            if similarity is None:
                entries = {
                    side: Entries(*(np.load(folder / name) for name in _entry_files(side))) for side in SIDES
                }
            else:
                entries = _entries(similarity, similarity_v2t, text_to_video, stamp["ties"])
            return cls(
                scores=similarity,
                text_to_video=text_to_video,
                captions=gallery["captions"],
                videos=gallery["videos"],
                rows=np.asarray(gallery["rows"], dtype=np.int64),
                clusters=np.asarray(gallery["clusters"], dtype=np.int64),
                entries=entries,
                metrics=metrics,
                intervals={
                    side: {name: (low, high) for name, (low, high) in found.items()}
                    for side, found in intervals.items()
                },
                stamp=stamp,
                similarity_v2t=similarity_v2t,
                top=top,
                reranked=cls.load(reranked) if reranked.is_dir() else None,
            )
        except FileNotFoundError as error:
            raise ResultError(f"no result in {folder}: {Path(error.filename).name} is missing") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultError(f"the result in {folder} is damaged: {error}") from error

    def __str__(self) -> str:
        stamp = self.stamp
        lines = [
            f"{stamp['dataset']} / {stamp['split']} (protocol {stamp['protocol'] or 'usual'}): "
            f"{len(self.captions)} captions, {len(self.videos)} videos",
            f"ties {stamp['ties']}, post-processing {self._post_processing()}, "
            f"checkpoint selected on {stamp['selection_split'] or 'no split'}",
        ]
        known = stamp.get("known_videos")
        if known is not None and known != len(self.videos):
            lines.insert(1, f"attention: the protocol has {known:,} videos here, not {len(self.videos):,}")
        if stamp.get("trained_on"):
            lines.insert(1, f"attention: the model was trained on {stamp['trained_on']} of these videos")
        if stamp["missing_videos"]:
            lines.insert(1, f"left out: {count_and_first(stamp['missing_videos'])}")
        lines += self._table()
        if self.reranked is not None:
            lines += ["", f"re-ranked by {self.reranked._post_processing()}", *self.reranked._table()]
        return "\n".join(lines)

    def _post_processing(self) -> str:
        how = self.stamp["post_processing"]
        if isinstance(how, str):
            return how
        numbers = [f"{name} {value:g}" for name, value in how.items() if not isinstance(value, str)]
        return f"{how['method']} ({', '.join(numbers)}), statistics: {how['statistics']}"

    def _table(self) -> list[str]:
        lines = [" " * 8 + "".join(f"{title:<28}" for title in SIDES.values()).rstrip()]
        for name in METRICS:
            cells = [self._cell(side, name) for side in SIDES]
            lines.append(f"{name:<5}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
        return lines

    def _cell(self, side: str, name: str) -> str:
        value = f"{self.metrics[side][name]:8.2f}"
        if side not in self.intervals:
            return value
        low, high = self.intervals[side][name]
        return f"{value}  [{low:.2f}, {high:.2f}]"


def _entry_files(side: str) -> list[str]:
    return [f"{field}_{side}.npy" for field in Entries._fields]


def _entries(
    similarity: Any, similarity_v2t: np.ndarray | None, text_to_video: np.ndarray, ties: Any
) -> dict[str, Entries]:
    """The ranks of both directions, each from its own matrix."""
    entries = rank_entries(similarity, text_to_video, ties)
    if similarity_v2t is not None:
        entries["v2t"] = rank_entries(similarity_v2t, text_to_video, ties)["v2t"]
    return entries


def _intervals(
    entries: Entries, clusters: np.ndarray, stamp: Mapping[str, Any], lower: bool = False
) -> dict[str, tuple[float, float]]:
    """Of some queries, `clusters` of all; empty where the stamp has no draws or there is only one cluster."""
    clusters = clusters[entries.queries]
    if not stamp["intervals"] or len(np.unique(clusters)) < 2:
        return {}
    return recall_intervals(entries.ranks, clusters, stamp["intervals"]["draws"], stamp["seed"], lower)


def _remove(folder: Path) -> None:
    """The files that `save` wrote, `metrics.json` first, and the folder where nothing else is in it."""
    for name in (*(f"{name}.json" for name in reversed(_JSON)), _SIMILARITY, _SIMILARITY_V2T):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
