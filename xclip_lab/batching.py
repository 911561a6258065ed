"""Clips to batches: which pair comes when, decoding in worker processes, padding."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from xclip_lab import text, video
from xclip_lab.clips import BrokenClip, Clip, Clips, StoredClip
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.datasets.base import one_caption_each
from xclip_lab.errors import UserError, VideoError

# Apart from the numbers that seed the order of an epoch.
_DRAW = 1


@dataclass(frozen=True)
class Batch:
    """Pairs of a caption and a clip.

    Attributes:
        token_ids: int64 `[B, W]`. text_mask: int64 `[B, W]`, 1 for a token.
        video: `[B, F, 3, H, W]`, uint8 pixels or float32 already normalised with CLIP's mean and deviation.
            From a feature store both are what the towers made of them: float32 `[B, W, D]` and `[B, F, D]`.
        video_mask: int64 `[B, F]`, 1 for a frame. Padded frames are zeros. The official loaders pad after
            normalising, and zero there is not zero in pixels: who normalises uint8 multiplies by this mask.
        video_ids: one per row. index: int64 `[B]`, the row's place in the dataset (of the caption, or of the
            video where unique videos are read). timestamps: float32 `[B, F]` seconds, 0 for padding.
    """

    token_ids: torch.Tensor
    text_mask: torch.Tensor
    video: torch.Tensor
    video_mask: torch.Tensor
    video_ids: list[str] | None = None
    index: torch.Tensor | None = None
    timestamps: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return len(self.token_ids)


class Loader:
    """Iterates over `Batch`es. Where `config.data.on_error` is `skip`, clips that cannot be read are missing
    from their batch, which is smaller then; nothing moves up from the next one.

    Attributes:
        broken: the ids of the videos that were left out so far, with the reason.

    Raises (while iterating):
        VideoError: the first video that cannot be read, unless `config.data.on_error` is `skip`.
    """

    def __init__(self, loader: DataLoader, clips: Clips) -> None:
        self._loader = loader
        self._clips = clips
        self._decoder_of: dict[str, str] = {}
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """The batches that hold anything."""
        return (batch for batch in self.in_place() if batch is not None)

    def in_place(self) -> Iterator[Batch | None]:
        """`len(self)` items, one for each stretch of `batch_size` indices: None where not one of its clips
        can be read."""
        skip = self._clips.config.data.on_error == "skip"
        for batch, broken, decoders in self._loader:
            if isinstance(batch, UserError):
                raise batch
            for clip in broken:
                if not skip:
                    raise VideoError(clip.reason)
                self.broken[clip.video_id] = clip.reason
            self._decoder_of |= decoders
            self._clips.passed.update(decoders)
            yield batch

    @property
    def decoders(self) -> dict[str, int]:
        """How many of the videos read so far each decoder gave; those of the store, where there is one."""
        store = self._clips.store
        return dict(Counter(self._decoder_of.values()) if store is None else store.decoders)


def make_loader(
    clips: Clips,
    order: Sequence[int] | None,
    batch_size: int,
    epoch: int = 0,
    workers: int | None = None,
) -> Loader:
    """Batches of `batch_size` clips in a given order.

    Args:
        order: indices into `clips`, such as (the rest of) an `epoch_order`; None for all, as they stand.
        epoch: seeds what is random in a clip. workers: processes that decode; None for `config.data.workers`,
            or none where the frames are in memory.
    """
    clips.epoch = epoch
    if workers is None:
        workers = 0 if clips.instant else clips.config.data.workers
    loader = DataLoader(
        clips,
        batch_size=batch_size,
        sampler=list(range(len(clips))) if order is None else list(order),
        num_workers=workers,
        collate_fn=_Collate(clips.config.max_words, clips.config.max_frames),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_group,
    )
    return Loader(loader, clips)


def _leave_group(worker: int) -> None:
    """Keep a worker out of reach of a signal to all processes of a run: the main one stops after its step,
    and until then it needs its workers."""
    os.setpgid(0, 0)


def collate(clips: Sequence[Clip], max_words: int, max_frames: int) -> Batch:
    """Tokenise the captions and pad the frames with zeros to `max_frames`, as the official loaders do."""
    side = clips[0].pixels.shape[-1]
    pixels = torch.zeros(len(clips), max_frames, 3, side, side, dtype=torch.uint8)
    mask = torch.zeros(len(clips), max_frames, dtype=torch.int64)
    timestamps = torch.zeros(len(clips), max_frames)
    for row, clip in enumerate(clips):
        count = len(clip.pixels)
        pixels[row, :count] = clip.pixels
        mask[row, :count] = 1
        timestamps[row, :count] = clip.timestamps
    token_ids, text_mask = text.tokenize([clip.caption for clip in clips], max_words)
    return Batch(
        token_ids=token_ids,
        text_mask=text_mask,
        video=pixels,
        video_mask=mask,
        video_ids=[clip.video_id for clip in clips],
        index=torch.tensor([clip.index for clip in clips]),
        timestamps=timestamps,
    )


def collate_stored(clips: Sequence[StoredClip]) -> Batch | None:
    """Rows of stored features as a batch; None for no rows."""
    if not clips:
        return None
    return Batch(
        token_ids=torch.stack([clip.words for clip in clips]),
        text_mask=torch.stack([clip.text_mask for clip in clips]),
        video=torch.stack([clip.frames for clip in clips]),
        video_mask=torch.stack([clip.video_mask for clip in clips]),
        video_ids=[clip.video_id for clip in clips],
        index=torch.tensor([clip.index for clip in clips]),
    )


def epoch_order(n: int, seed: int, epoch: int, groups: np.ndarray | None = None) -> list[int]:
    """The order in which an epoch visits `n` samples: a pure function, so a resumed run finds its place.

    Args:
        groups: `[n]`; samples of one group stand side by side, so that they meet in a batch (where the batch
            size is a multiple of the groups' size, always).

    >>> epoch_order(6, seed=0, epoch=1, groups=np.array([0, 0, 1, 1, 2, 2]))
    [1, 0, 4, 5, 3, 2]
    """
    shuffled = np.random.default_rng((seed, epoch)).permutation(n)
    if groups is None:
        return shuffled.tolist()
    members: dict[int, list[int]] = {}
    for index in shuffled.tolist():
        members.setdefault(int(groups[index]), []).append(index)
    return [index for group in members.values() for index in group]


def training_order(dataset: VideoTextDataset, config: RunConfig, epoch: int) -> list[int]:
    """The captions that an epoch of training visits, in order: all, or with `data.captions` `one` a caption
    drawn for each video. A pure function of the config and the epoch."""
    groups = dataset.groups if config.data.group_batches else None
    if config.data.captions == "all":
        return epoch_order(len(dataset), config.seed, epoch, groups)
    generator = np.random.default_rng((config.seed, epoch, _DRAW))
    drawn = one_caption_each(dataset, lambda count: int(generator.integers(count)))
    order = epoch_order(len(drawn), config.seed, epoch, None if groups is None else groups[drawn])
    return [drawn[place] for place in order]


class _Collated(NamedTuple):
    """What a worker sends: errors as values (see `BrokenClip`), and what decoded which video."""

    batch: Batch | UserError | None
    broken: list[BrokenClip]
    decoders: dict[str, video.Decoder]


class _Collate:
    """`collate` for worker processes."""

    def __init__(self, max_words: int, max_frames: int) -> None:
        self.max_words = max_words
        self.max_frames = max_frames

    def __call__(self, items: list[Clip | StoredClip | BrokenClip | UserError]) -> _Collated:
        for item in items:
            if isinstance(item, UserError):
                return _Collated(item, [], {})
        stored = [item for item in items if isinstance(item, StoredClip)]
        clips = [item for item in items if isinstance(item, Clip)]
        broken = [item for item in items if isinstance(item, BrokenClip)]
        decoders = {clip.video_id: clip.decoder for clip in clips if clip.decoder is not None}
        try:
            batch = collate(clips, self.max_words, self.max_frames) if clips else collate_stored(stored)
        except UserError as error:
            return _Collated(error, broken, decoders)
        return _Collated(batch, broken, decoders)
