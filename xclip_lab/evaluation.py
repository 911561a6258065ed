"""Encode every text and video once, score in blocks, rank: a `Result`, stamped with how it came about."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from xclip_lab.atomic import TEMPORARY, sync, write_text
from xclip_lab.batching import ClipDataset, FrameStore, make_loader
from xclip_lab.config import RunConfig, config_from_dict
from xclip_lab.datasets.base import VideoTextDataset
from xclip_lab.errors import DatasetError, UserError
from xclip_lab.metrics import (
    METRICS,
    Entries,
    MetricError,
    lower_median,
    metrics_of,
    rank_entries,
    retrieval_metrics,
)
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.provenance import dataset_fingerprint, versions
from xclip_lab.stats import recall_intervals
from xclip_lab.text import check_vocabulary, tokenize
from xclip_lab.tokens import TokenSet

FRAME_SETTINGS = ("sampler", "feature_framerate", "slice_framepos", "frame_order")
SIDES = {"t2v": "text-to-video", "v2t": "video-to-text"}


class ResultError(UserError):
    """A result that cannot be written, or a folder that holds none."""


@dataclass(frozen=True)
class Result:
    """An evaluation and how it came about.

    Attributes:
        similarity: float32 `[T, V]`. text_to_video: `[T]`, the column of each caption's video.
        captions: the T texts. videos: the V video ids. rows: `[T]`, the dataset's sample that each row is
            (every sample in its order, less those of missing videos).
        clusters: `[V]`, videos with the same number are drawn together (`video_clusters`).
        ranks: `{"t2v": [T], "v2t": [V]}`, from 1; under `official` ties add entries.
        metrics: `{"t2v": {"R@1": ...}, "v2t": {...}}`, recalls in percent.
        intervals: the same keys, 95% (low, high), bootstrapped over clusters; empty where there are none.
        stamp: checkpoint, dataset, protocol, what selected the checkpoint, ties, sampler, versions and so on.
    """

    similarity: np.ndarray
    text_to_video: np.ndarray
    captions: list[str]
    videos: list[str]
    rows: np.ndarray
    clusters: np.ndarray
    ranks: dict[str, np.ndarray]
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    stamp: dict[str, Any]

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
        entries = rank_entries(self.similarity, self.text_to_video, ties)["t2v"]
        kept = chosen[entries.queries]
        entries = Entries(entries.ranks[kept], entries.queries[kept])
        lower = lower_median(self.text_to_video, ties)
        clusters = self.clusters[self.text_to_video]
        return metrics_of(entries.ranks, lower), _intervals(entries, clusters, self.stamp, lower)

    def save(self, folder: str | Path) -> Path:
        """Write `metrics.json`, `intervals.json`, `stamp.json`, `gallery.json` and `similarity.npy`.

        Each file appears whole or not at all; `metrics.json` comes last.

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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_array(folder / "similarity.npy", self.similarity)
            _write_json(folder / "gallery.json", gallery)
            _write_json(folder / "stamp.json", self.stamp)
            _write_json(folder / "intervals.json", self.intervals)
            _write_json(folder / "metrics.json", self.metrics)
        except OSError as error:
            raise ResultError(
                f"the result could not be written to {folder}: {error.strerror or error}"
            ) from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """What `save` wrote.

        Raises:
            ResultError: a file is missing or damaged.
        """
        folder = Path(folder)
        try:
            similarity = np.load(folder / "similarity.npy", allow_pickle=False)
            gallery, stamp, intervals, metrics = (
                json.loads((folder / f"{name}.json").read_text())
                for name in ("gallery", "stamp", "intervals", "metrics")
            )
            text_to_video = np.asarray(gallery["text_to_video"], dtype=np.int64)
            entries = rank_entries(similarity, text_to_video, stamp["ties"])
            return cls(
                similarity=similarity,
                text_to_video=text_to_video,
                captions=gallery["captions"],
                videos=gallery["videos"],
                rows=np.asarray(gallery["rows"], dtype=np.int64),
                clusters=np.asarray(gallery["clusters"], dtype=np.int64),
                ranks={side: found.ranks for side, found in entries.items()},
                metrics=metrics,
                intervals={
                    side: {name: (low, high) for name, (low, high) in found.items()}
                    for side, found in intervals.items()
                },
                stamp=stamp,
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
            f"ties {stamp['ties']}, post-processing {stamp['post_processing']}, "
            f"checkpoint selected on {stamp['selection_split'] or 'no split'}",
            " " * 8 + "".join(f"{title:<28}" for title in SIDES.values()).rstrip(),
        ]
        if stamp["missing_videos"]:
            lines.insert(1, f"left out: {_count_and_first(stamp['missing_videos'])}")
        for name in METRICS:
            cells = [self._cell(side, name) for side in SIDES]
            lines.append(f"{name:<5}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
        return "\n".join(lines)

    def _cell(self, side: str, name: str) -> str:
        value = f"{self.metrics[side][name]:8.2f}"
        if side not in self.intervals:
            return value
        low, high = self.intervals[side][name]
        return f"{value}  [{low:.2f}, {high:.2f}]"


def video_clusters(dataset: VideoTextDataset) -> np.ndarray:
    """`[V]`, numbers: what the bootstrap draws as one.

    The two videos of a pair (`dataset.groups`) are told apart or taken for each other together, so they share
    a number. Where no groups are known, each video has its own.
    """
    if dataset.groups is None:
        return np.arange(len(dataset.videos))
    _, first_captions = np.unique(dataset.text_to_video, return_index=True)
    return dataset.groups[first_captions]


def evaluate(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig | None = None,
    *,
    store: FrameStore | None = None,
    progress: bool = True,
) -> Result:
    """Retrieval in both directions over one split.

    The model stays where it is (device, training mode); `max_words` and `max_frames` are the model's own.

    Args:
        config: its `data` (sampler, frame order, workers), `evaluation` and `seed` are used; None for those
            of the run that trained the model, or the defaults where it is not known. store: frames decoded
            before (`batching.preload`). progress: show bars.

    Raises:
        DatasetError: no captions, or more videos missing or unreadable than `evaluation.allow_missing`; says
            how many, names the first and gives a reason.
        MetricError: a similarity that is NaN.
    """
    config = (config or model.origin.run or config_from_dict({})).with_model(model.config)
    settings = config.evaluation
    check_vocabulary(model.clip.token_embedding.num_embeddings)
    encoded = encode(model, dataset, config, store, progress)
    kept = encoded.dataset
    similarity = score(model, encoded.text, encoded.video, settings.block_size, progress).numpy()
    clusters = video_clusters(kept)
    draws = int(settings.bootstrap) if len(np.unique(clusters)) > 1 else 0
    stamp = {
        "checkpoint": model.origin.checkpoint,
        "dataset": dataset.name,
        "split": dataset.split,
        "dataset_fingerprint": dataset_fingerprint(dataset),
        "protocol": dataset.protocol,
        "selection_split": model.origin.selection_split,
        "post_processing": "none",
        "ties": settings.ties,
        "intervals": {"draws": draws, "clusters": "pair" if kept.groups is not None else "video"}
        if draws
        else None,
        "missing_videos": encoded.missing,
        "decoders": encoded.decoders,
        **{name: getattr(config.data, name) for name in FRAME_SETTINGS},
        "max_frames": config.max_frames,
        "max_words": config.max_words,
        "seed": config.seed,
        "dtype": str(encoded.video.pooled.dtype).removeprefix("torch."),
        "device": str(_device(model)),
        "versions": versions(),
    }
    found = rank_entries(similarity, kept.text_to_video, settings.ties)
    lower = lower_median(kept.text_to_video, settings.ties)
    intervals = {
        "t2v": _intervals(found["t2v"], clusters[kept.text_to_video], stamp, lower),
        "v2t": _intervals(found["v2t"], clusters, stamp),
    }
    return Result(
        similarity=similarity,
        text_to_video=kept.text_to_video,
        captions=[sample.caption for sample in kept.samples],
        videos=kept.videos,
        rows=encoded.rows,
        clusters=clusters,
        ranks={side: entries.ranks for side, entries in found.items()},
        metrics=retrieval_metrics(similarity, kept.text_to_video, settings.ties),
        intervals=intervals if draws else {},
        stamp=stamp,
    )


@dataclass(frozen=True)
class Encoded:
    """Features of a split, on the CPU.

    Attributes:
        text: of the T captions whose video could be read. video: of these V videos.
        dataset: the annotations of what could be read. rows: `[T]`, its rows in the whole dataset.
        missing: ids of the videos that could not. decoders: how many videos each decoder gave.
    """

    text: TokenSet
    video: TokenSet
    dataset: VideoTextDataset
    rows: np.ndarray
    missing: list[str]
    decoders: dict[str, int]


def encode(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig,
    store: FrameStore | None = None,
    progress: bool = False,
) -> Encoded:
    """Every caption and every video of a split, each once; `score` compares them.

    Raises:
        DatasetError: as `evaluate`.
    """
    # What cannot be read is counted here, and held against `evaluation.allow_missing`.
    config = replace(config.with_model(model.config), data=replace(config.data, on_error="skip"))
    clips = ClipDataset(dataset, config, unique_videos=True, store=store, image_size=model.image_size)
    batch_size, allowed = config.evaluation.batch_size, config.evaluation.allow_missing
    if not len(dataset):
        raise DatasetError(f"{dataset.name} / {dataset.split}: no captions to evaluate")
    if store is None:
        absent = [s for s in clips.samples if s.path is None or not s.path.exists()]
        if len(absent) > allowed:
            raise _too_many_missing(dataset, {s.video_id: f"{s.path}: no such file" for s in absent}, allowed)
    loader = make_loader(clips, order=None, batch_size=batch_size)
    device, parts = _device(model), []
    with evaluating(model):
        for batch in tqdm(loader, "encode videos", unit="batch", disable=not progress, leave=False):
            if len(loader.broken) <= allowed:  # beyond that, only to name every file that is to be mended
                batch = batch.to(device)
                parts.append(model.encode_video(batch.video, batch.video_mask).to("cpu"))
        if len(loader.broken) > allowed or not parts:
            raise _too_many_missing(dataset, loader.broken, allowed)
        missing = [video for video in dataset.videos if video in loader.broken]
        rows = np.flatnonzero(~np.isin([sample.video_id for sample in dataset.samples], missing))
        kept = _only(dataset, rows)
        text = encode_texts(model, [sample.caption for sample in kept.samples], batch_size, progress)
    return Encoded(text, TokenSet.cat(parts), kept, rows, missing, loader.decoders)


@torch.no_grad()
def encode_texts(
    model: RetrievalModel, captions: Sequence[str], batch_size: int = 32, progress: bool = False
) -> TokenSet:
    """Features of captions, on the CPU: `pooled [T, D]`, `tokens [T, W, D]`."""
    parts = []
    starts = range(0, len(captions), batch_size)
    for start in tqdm(starts, "encode texts", unit="batch", disable=not progress, leave=False):
        ids, mask = tokenize(captions[start : start + batch_size], model.config.max_words)
        parts.append(model.encode_text(ids.to(_device(model)), mask.to(_device(model))).to("cpu"))
    return TokenSet.cat(parts)


def _too_many_missing(dataset: VideoTextDataset, broken: Mapping[str, str], allowed: int) -> DatasetError:
    left_out = "" if len(broken) < len(dataset.videos) else " (all there are)"
    return DatasetError(
        f"{dataset.name} / {dataset.split}: cannot read {_count_and_first(list(broken))}{left_out}; "
        f"evaluation.allow_missing is {allowed}. Bring the files back, or raise it to leave them out. "
        f"The first: {next(iter(broken.values()))}"
    )


def score(
    model: RetrievalModel, text: TokenSet, video: TokenSet, block_size: int = 64, progress: bool = False
) -> Tensor:
    """`model.similarity` of all texts with all videos, float32 `[T, V]` on the CPU.

    `block_size` texts meet `block_size` videos at a time, so that a head that looks at every word and frame
    needs memory for one block only. The blocks do not change the scores.
    """
    device = _device(model)
    similarity = torch.empty(len(text), len(video))
    video = video.to(device)
    starts = range(0, len(text), block_size)
    with evaluating(model):
        for top in tqdm(starts, "score", unit="block", disable=not progress, leave=False):
            rows = slice(top, top + block_size)
            texts = text[rows].to(device)
            for left in range(0, len(video), block_size):
                columns = slice(left, left + block_size)
                similarity[rows, columns] = model.similarity(texts, video[columns]).float().cpu()
    return similarity


def _intervals(
    entries: Entries, clusters: np.ndarray, stamp: Mapping[str, Any], lower: bool = False
) -> dict[str, tuple[float, float]]:
    """Of some queries, `clusters` of all; empty where the stamp has no draws or there is only one cluster."""
    clusters = clusters[entries.queries]
    if not stamp["intervals"] or len(np.unique(clusters)) < 2:
        return {}
    return recall_intervals(entries.ranks, clusters, stamp["intervals"]["draws"], stamp["seed"], lower)


def _only(dataset: VideoTextDataset, rows: np.ndarray) -> VideoTextDataset:
    groups = None if dataset.groups is None else dataset.groups[rows]
    return replace(dataset, samples=[dataset.samples[row] for row in rows], groups=groups)


def _count_and_first(names: Sequence[str]) -> str:
    """`3 videos: a, b, c`, at most five names."""
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} video{'s' if len(names) > 1 else ''}: {', '.join(names[:5])}{more}"


def _device(model: RetrievalModel) -> torch.device:
    return next(model.parameters()).device


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _write_array(path: Path, array: np.ndarray) -> None:
    """Through a temporary file beside it, so that a reader never sees half of it."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with temporary.open("wb") as file:
            np.save(file, array)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
