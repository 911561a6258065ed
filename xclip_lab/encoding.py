"""The first stage of an evaluation: every video passes the model once, a caption when it is asked for.

Several processes share the work by whole batches, and a batch of captions begins at a multiple of its size
whatever rows are asked for: each process meets the batches that one alone would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from xclip_lab.batching import make_loader
from xclip_lab.clips import FrameStore
from xclip_lab.config import RunConfig, to_dict
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.distributed import Ranks
from xclip_lab.errors import ConfigError, DatasetError, count_and_first
from xclip_lab.features import StoredClips, open_clips
from xclip_lab.memory import free_memory, room_for
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.provenance import dataset_fingerprint
from xclip_lab.text import tokenize
from xclip_lab.tokens import TokenSet


class TextBlocks(Protocol):
    """T captions whose features come a block of rows at a time: a `TokenSet` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> TokenSet: ...


@dataclass(frozen=True)
class Encoded:
    """A split for a model; the videos are on the CPU.

    Attributes:
        video: of the V videos that could be read. text: the T captions of these, encoded when they are asked
            for. dataset: their annotations. rows: `[T]`, the captions' rows in the whole dataset.
        fingerprint: of the whole dataset. missing: ids of the videos that could not be read. decoders: how
            many videos each decoder gave.
    """

    video: TokenSet
    text: TextBlocks
    dataset: VideoTextDataset
    rows: np.ndarray
    fingerprint: str
    missing: list[str]
    decoders: dict[str, int]


def encode(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig,
    store: FrameStore | None = None,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> Encoded:
    """Every video of a split, once, in every process; `score` compares them with the captions.

    Args:
        ranks: who share the work; None for this process alone.

    Raises:
        DatasetError, ConfigError: as `evaluate`.
    """
    ranks = ranks or Ranks()
    fingerprint = dataset_fingerprint(dataset)
    _check_same_start(dataset, fingerprint, config, ranks)
    # What cannot be read is counted here, and held against `evaluation.allow_missing`.
    config = replace(config.with_model(model.config), data=replace(config.data, on_error="skip"))
    clips = open_clips(model, dataset, config, store, unique_videos=True)
    batch_size, allowed = config.evaluation.batch_size, config.evaluation.allow_missing
    if not len(dataset):
        raise DatasetError(f"{dataset.name} / {dataset.split}: no captions to evaluate")
    own = ranks.shares(len(clips), batch_size)[ranks.rank]
    if not clips.instant:
        place = config.data.videos or dataset.root
        absent = {
            s.video_id: f"{s.path or f'{s.video_id} below {place}'}: no such file"
            for s in clips.samples[own]
            if s.path is None or not s.path.exists()
        }
        gone = ranks.union(absent)
        if len(gone) > allowed:
            raise _too_many_missing(dataset, gone, allowed)
    loader = make_loader(clips, order=range(own.start, own.stop), batch_size=batch_size)
    device, made = model.logit_scale.device, []
    with evaluating(model):
        for batch in tqdm(loader, "encode videos", unit="batch", disable=not progress, leave=False):
            if len(loader.broken) <= allowed:  # beyond that, only to name every file that is to be mended
                with _batch_fits(batch_size):
                    batch = batch.to(device)
                    made.append(model.encode_video(batch.video, batch.video_mask).to("cpu"))
    broken = ranks.union(loader.broken)
    if len(broken) > allowed or len(broken) == len(clips):
        raise _too_many_missing(dataset, broken, allowed)
    parts = [part for of in ranks.collect(made) for part in of]
    of_each = [loader.decoders] if clips.store is not None else ranks.collect(loader.decoders)
    decoders = dict(sum(map(Counter, of_each), Counter[str]()))
    missing = [video for video in dataset.videos if video in broken]
    rows = np.flatnonzero(~np.isin([sample.video_id for sample in dataset.samples], missing))
    kept = _only(dataset, rows)
    text: TextBlocks = (
        Texts.stored(model, clips, rows, batch_size)
        if isinstance(clips, StoredClips)
        else Texts.of(model, [sample.caption for sample in kept.samples], batch_size)
    )
    return Encoded(TokenSet.cat(parts), text, kept, rows, fingerprint, missing, decoders)


@torch.no_grad()
def encode_texts(model: RetrievalModel, captions: Sequence[str], batch_size: int = 32) -> TokenSet:
    """Features of captions, on the CPU: `pooled [T, D]`, `tokens [T, W, D]`."""
    device, parts = model.logit_scale.device, []
    for start in range(0, len(captions), batch_size):
        ids, mask = tokenize(captions[start : start + batch_size], model.config.max_words)
        parts.append(model.encode_text(ids.to(device), mask.to(device)).to("cpu"))
    return TokenSet.cat(parts)


class Texts:
    """T captions, encoded when they are asked for: by whole batches, that begin at multiples of `batch_size`.
    The last one stays, for the next rows may begin in it.

    Args:
        encode_batch: the features of some rows.
    """

    def __init__(self, count: int, batch_size: int, encode_batch: Callable[[slice], TokenSet]) -> None:
        self._count, self._batch_size, self._encode_batch = count, batch_size, encode_batch
        self._last: tuple[int, TokenSet | None] = (0, None)

    @classmethod
    def of(cls, model: RetrievalModel, captions: Sequence[str], batch_size: int) -> Texts:
        return cls(len(captions), batch_size, lambda rows: encode_texts(model, captions[rows], batch_size))

    @classmethod
    def stored(cls, model: RetrievalModel, clips: StoredClips, rows: np.ndarray, batch_size: int) -> Texts:
        """Captions whose word features are stored, `rows [T]` of the store."""

        @torch.no_grad()
        def encode_batch(some: slice) -> TokenSet:
            words, mask = clips.texts(rows[some])
            device = model.logit_scale.device
            return model.encode_text(words.to(device), mask.to(device))

        return cls(len(rows), batch_size, encode_batch)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice) -> TokenSet:
        start, stop, _ = rows.indices(self._count)
        first = start // self._batch_size * self._batch_size
        parts = [self._batch(at) for at in range(first, stop, self._batch_size)]
        return TokenSet.cat(parts)[start - first : stop - first]

    def _batch(self, start: int) -> TokenSet:
        at, batch = self._last
        if at != start or batch is None:
            with _batch_fits(self._batch_size):
                batch = self._encode_batch(slice(start, min(start + self._batch_size, self._count)))
            self._last = start, batch
        return batch


@dataclass
class KeptTexts:
    """Captions that are asked for again in the same blocks: encoded once, where a quarter of the memory that
    is free at the first takes them all."""

    of: TextBlocks
    _blocks: dict[tuple[int, int], TokenSet] = field(default_factory=dict)
    _fits: bool | None = None

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, rows: slice) -> TokenSet:
        place = rows.start, rows.stop
        if place in self._blocks:
            return self._blocks[place]
        block = self.of[rows].to("cpu")
        if self._fits is None:
            tensors = (block.pooled, block.tokens, block.mask, *block.extra.values())
            needed = sum(value.nbytes for value in tensors) / len(block) * len(self)
            free = free_memory(torch.device("cpu"))
            self._fits = free is None or 4 * needed <= free
        if self._fits:
            self._blocks[place] = block
        return block


def _batch_fits(batch_size: int) -> AbstractContextManager[None]:
    """A full memory as the batch's fault."""
    remedy = f"try {batch_size // 2}" if batch_size > 1 else "free some"
    return room_for(
        lambda: ConfigError(
            f"evaluation.batch_size: {batch_size} at a time in the towers do not fit into memory; {remedy}"
        )
    )


def _too_many_missing(dataset: VideoTextDataset, broken: Mapping[str, str], allowed: int) -> DatasetError:
    left_out = "" if len(broken) < len(dataset.videos) else " (all there are)"
    return DatasetError(
        f"{dataset.name} / {dataset.split}: cannot read {count_and_first(list(broken))}{left_out}; "
        f"evaluation.allow_missing is {allowed}. Bring the files back, or raise it to leave them out. "
        f"The first: {next(iter(broken.values()))}"
    )


def _check_same_start(dataset: VideoTextDataset, fingerprint: str, config: RunConfig, ranks: Ranks) -> None:
    own, first = (fingerprint, to_dict(config)), ranks.share((fingerprint, to_dict(config)))
    if own != first:
        what = "settings" if own[0] == first[0] else "captions or videos"
        raise DatasetError(
            f"{dataset.name} / {dataset.split}: process {ranks.rank} has other {what} than the first one; "
            "give every process the same"
        )


def _only(dataset: VideoTextDataset, rows: np.ndarray) -> VideoTextDataset:
    groups = None if dataset.groups is None else dataset.groups[rows]
    return replace(dataset, samples=[dataset.samples[row] for row in rows], groups=groups)
