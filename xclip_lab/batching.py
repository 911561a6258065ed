"""Clips to batches: which pair comes when, decoding in worker processes, padding."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from xclip_lab import sampling, text, video
from xclip_lab.config import RunConfig
from xclip_lab.datasets import Sample, VideoTextDataset
from xclip_lab.errors import DatasetError, UserError, VideoError
from xclip_lab.preprocess import preprocess

# The share of the free memory that decoded frames may take.
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Batch:
    """Pairs of a caption and a clip.

    Attributes:
        token_ids: int64 `[B, W]`. text_mask: int64 `[B, W]`, 1 for a token.
        video: `[B, F, 3, H, W]`, uint8 pixels or float32 already normalised with CLIP's mean and deviation.
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


@dataclass(frozen=True)
class Clip:
    """A caption and its frames, not yet padded: `pixels` uint8 `[F, 3, S, S]`, `timestamps` `[F]` seconds.

    `decoder` is what gave the frames (see `video.VideoFrames`), None where they were in memory already.
    """

    index: int
    video_id: str
    caption: str
    pixels: torch.Tensor
    timestamps: torch.Tensor
    decoder: video.Decoder | None = None


@dataclass(frozen=True)
class BrokenClip:
    """A clip that could not be read, and why. Travels from worker to main process as a value, because an
    exception raised in a worker arrives wrapped in its traceback."""

    video_id: str
    reason: str


@dataclass(frozen=True)
class FrameStore:
    """Frames of a dataset's videos in memory, decoded once, unordered by `frame_order`.

    Attributes:
        clips: by video id. broken: video id to the reason why it is not among `clips`.
        decoders: how many of the videos each decoder gave, such as `{"decord": 198, "pyav": 2}`.
    """

    clips: dict[str, tuple[torch.Tensor, torch.Tensor]]
    broken: dict[str, str]
    decoders: dict[str, int] = field(default_factory=dict)


class ClipDataset(Dataset):
    """The clips of a dataset's captions, or of its unique videos, as `Clip` or `BrokenClip`.

    Args:
        dataset: the annotations.
        config: its `data`, `max_frames`, `max_words`, `seed` and image size are used.
        unique_videos: one item a video, in the order of `dataset.videos`, with its first caption; otherwise
            one item a caption, in the order of `dataset.samples`.
        store: frames decoded before (`preload`), else they are decoded on demand.
        image_size: side in pixels, None for that of `config.towers`.

    Attributes:
        passed: ids of videos that were decoded and found undamaged; they are not verified again.
    """

    def __init__(
        self,
        dataset: VideoTextDataset,
        config: RunConfig,
        unique_videos: bool = False,
        store: FrameStore | None = None,
        image_size: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.samples = dataset.video_samples() if unique_videos else dataset.samples
        self.store = store
        self.image_size = image_size or tower_image_size(config)
        self.epoch = 0
        self.passed: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Clip | BrokenClip:
        sample = self.samples[index]
        try:
            pixels, timestamps, decoder = self._frames(sample)
        except VideoError as error:
            return BrokenClip(sample.video_id, str(error))
        # What is random depends on the place in the dataset and the epoch, not on the worker or the step.
        shuffler = np.random.default_rng((self.config.seed, self.epoch, index))
        order = sampling.order_frames(list(range(len(pixels))), self.config.data.frame_order, shuffler)
        return Clip(index, sample.video_id, sample.caption, pixels[order], timestamps[order], decoder)

    def _frames(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor, video.Decoder | None]:
        if self.store is None:
            verify = sample.video_id not in self.passed
            return load_frames(sample, self.config, self.image_size, verify)
        if sample.video_id in self.store.broken:
            raise VideoError(self.store.broken[sample.video_id])
        return *self.store.clips[sample.video_id], None


def load_frames(
    sample: Sample, config: RunConfig, image_size: int, verify: bool = True
) -> tuple[torch.Tensor, torch.Tensor, video.Decoder]:
    """Decode the frames that `config.data` asks for, in the order of time.

    Returns:
        uint8 `[F, 3, image_size, image_size]`, F from 1 to `config.max_frames`; float32 `[F]` seconds; and
        what decoded them.

    Raises:
        VideoError: the file cannot be read, or no frame of it lies in the sample's stretch.
    """
    if sample.path is None:
        raise VideoError(f"video {sample.video_id!r} has no file")
    info = video.probe(sample.path)
    data = config.data
    try:
        indices = video.frame_indices(
            info,
            data.sampler,
            config.max_frames,
            data.feature_framerate,
            data.slice_framepos,
            start=sample.start,
            end=sample.end,
        )
    except ValueError as error:
        raise VideoError(f"{sample.path}: {error}; data.sampler=uniform takes any video") from error
    if not indices:
        raise VideoError(
            f"{sample.path}: no frame between {sample.start} and {sample.end} s, "
            f"the video lasts {info.duration:.2f} s (video {sample.video_id!r})"
        )
    read, decoder = video.read_frames_and_decoder(sample.path, indices, info=info, verify=verify)
    return preprocess(read.frames, image_size), torch.from_numpy(read.timestamps).float(), decoder


def preload(clips: ClipDataset, progress: bool = True) -> FrameStore:
    """Decode every video of `clips` once, with `config.data.workers` processes.

    Args:
        progress: show a bar.

    Raises:
        DatasetError: the frames would not fit into the free memory. VideoError: a video cannot be read and
            `config.data.on_error` is `raise`.
    """
    data = clips.config.data
    # A store keeps the order of time; each epoch orders its frames anew.
    in_time = dataclasses.replace(clips.config, data=dataclasses.replace(data, frame_order=0))
    videos = ClipDataset(clips.dataset, in_time, unique_videos=True, image_size=clips.image_size)
    needed = len(videos) * in_time.max_frames * 3 * videos.image_size**2
    _check_memory(needed)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    broken: dict[str, str] = {}
    decoders: Counter[str] = Counter()
    loader = DataLoader(videos, batch_size=None, num_workers=data.workers)
    title = f"decode {clips.dataset.split} (at most {needed / 2**30:.2f} GiB)"
    for clip in tqdm(loader, total=len(videos), desc=title, unit="video", disable=not progress):
        if isinstance(clip, Clip):
            # A copy of its own: what a worker sends lies in shared memory, one open file a tensor.
            kept[clip.video_id] = (clip.pixels.clone(), clip.timestamps.clone())
            decoders[str(clip.decoder)] += 1
        elif data.on_error == "skip":
            broken[clip.video_id] = clip.reason
        else:
            raise VideoError(clip.reason)
    return FrameStore(kept, broken, dict(decoders))


class Loader:
    """Iterates over `Batch`es. Where `config.data.on_error` is `skip`, clips that cannot be read are missing
    from their batch, which is smaller then; nothing moves up from the next one.

    Attributes:
        broken: the ids of the videos that were left out so far, with the reason.

    Raises (while iterating):
        VideoError: the first video that cannot be read, unless `config.data.on_error` is `skip`.
    """

    def __init__(self, loader: DataLoader, clips: ClipDataset) -> None:
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
    clips: ClipDataset,
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
        workers = 0 if clips.store is not None else clips.config.data.workers
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


def tower_image_size(config: RunConfig) -> int:
    """The side in pixels of the images that the configured image tower takes."""
    if config.towers.architecture is not None:
        return config.towers.architecture.image_size
    known = open_clip.get_model_config(config.towers.name)
    return known["vision_cfg"]["image_size"] if known else 224


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

    def __call__(self, items: list[Clip | BrokenClip]) -> _Collated:
        clips = [item for item in items if isinstance(item, Clip)]
        broken = [item for item in items if isinstance(item, BrokenClip)]
        decoders = {clip.video_id: clip.decoder for clip in clips if clip.decoder is not None}
        try:
            batch = collate(clips, self.max_words, self.max_frames) if clips else None
        except UserError as error:
            return _Collated(error, broken, decoders)
        return _Collated(batch, broken, decoders)


def _check_memory(needed: int) -> None:
    available = _available_memory()
    if available is not None and needed > _MEMORY_SHARE * available:
        raise DatasetError(
            f"data.preload: the frames take {needed / 2**30:.1f} GiB, of the memory "
            f"{available / 2**30:.1f} GiB are free; set data.preload=false or lower max_frames"
        )


def _available_memory() -> int | None:
    """Bytes that can be had without swapping, None where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
