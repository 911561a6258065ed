"""Clips to batches: which pair comes when, decoding in worker processes, padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    """A caption and its frames, not yet padded: `pixels` uint8 `[F, 3, S, S]`, `timestamps` `[F]` seconds."""

    index: int
    video_id: str
    caption: str
    pixels: torch.Tensor
    timestamps: torch.Tensor


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
    """

    clips: dict[str, tuple[torch.Tensor, torch.Tensor]]
    broken: dict[str, str]


class ClipDataset(Dataset):
    """The clips of a dataset's captions, or of its unique videos, as `Clip` or `BrokenClip`.

    Args:
        dataset: the annotations.
        config: its `data`, `max_frames`, `max_words`, `seed` and image size are used.
        unique_videos: one item a video, in the order of `dataset.videos`, with its first caption; otherwise
            one item a caption, in the order of `dataset.samples`.
        store: frames decoded before (`preload`), else they are decoded on demand.
        image_size: side in pixels, None for that of `config.towers`.
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

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Clip | BrokenClip:
        sample = self.samples[index]
        try:
            pixels, timestamps = self._frames(sample)
        except VideoError as error:
            return BrokenClip(sample.video_id, str(error))
        # What is random depends on the place in the dataset and the epoch, not on the worker or the step.
        shuffler = np.random.default_rng((self.config.seed, self.epoch, index))
        order = sampling.order_frames(list(range(len(pixels))), self.config.data.frame_order, shuffler)
        return Clip(index, sample.video_id, sample.caption, pixels[order], timestamps[order])

    def _frames(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        if self.store is None:
            return load_frames(sample, self.config, self.image_size, verify=self.epoch == 0)
        if sample.video_id in self.store.broken:
            raise VideoError(self.store.broken[sample.video_id])
        return self.store.clips[sample.video_id]


def load_frames(
    sample: Sample, config: RunConfig, image_size: int, verify: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the frames that `config.data` asks for, in the order of time.

    Returns:
        uint8 `[F, 3, image_size, image_size]`, F from 1 to `config.max_frames`, and float32 `[F]` seconds.

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
    frames, timestamps = video.read_frames(sample.path, indices, info=info, verify=verify)
    return preprocess(frames, image_size), torch.from_numpy(timestamps).float()


def preload(clips: ClipDataset, workers: int | None = None, progress: bool = True) -> FrameStore:
    """Decode every video of `clips` once and keep the frames as `clips.store`.

    Args:
        workers: processes that decode, None for `config.data.workers`. progress: show a bar.

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
    loader = DataLoader(videos, batch_size=None, num_workers=data.workers if workers is None else workers)
    title = f"decode {clips.dataset.split} (at most {needed / 2**30:.2f} GiB)"
    for clip in tqdm(loader, total=len(videos), desc=title, unit="video", disable=not progress):
        if isinstance(clip, Clip):
            # A copy of its own: what a worker sends lies in shared memory, one open file a tensor.
            kept[clip.video_id] = (clip.pixels.clone(), clip.timestamps.clone())
        elif data.on_error == "skip":
            broken[clip.video_id] = clip.reason
        else:
            raise VideoError(clip.reason)
    clips.store = FrameStore(kept, broken)
    return clips.store


class Loader:
    """Iterates over `Batch`es. `broken` maps the ids of videos that were left out to the reason.

    Raises (while iterating):
        VideoError: the first video that cannot be read, unless `config.data.on_error` is `skip`.
    """

    def __init__(self, loader: DataLoader, skip: bool) -> None:
        self._loader = loader
        self._skip = skip
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch, broken in self._loader:
            if isinstance(batch, UserError):
                raise batch
            for clip in broken:
                if not self._skip:
                    raise VideoError(clip.reason)
                self.broken[clip.video_id] = clip.reason
            if batch is not None:
                yield batch


def make_loader(
    clips: ClipDataset,
    order: Sequence[int] | None,
    batch_size: int,
    epoch: int = 0,
    workers: int | None = None,
    drop_last: bool = False,
) -> Loader:
    """Batches of `batch_size` clips in a given order.

    Args:
        order: indices into `clips`, such as (the rest of) an `epoch_order`; None for all, as they stand.
        epoch: seeds what is random in a clip. workers: processes that decode; None for `config.data.workers`,
            or none where the frames are in memory.
        drop_last: leave out a last batch that is not full, as the official training does.
    """
    clips.epoch = epoch
    if workers is None:
        workers = 0 if clips.store is not None else clips.config.data.workers
    loader = DataLoader(
        clips,
        batch_size=batch_size,
        sampler=list(range(len(clips))) if order is None else list(order),
        num_workers=workers,
        drop_last=drop_last,
        collate_fn=_Collate(clips.config.max_words, clips.config.max_frames),
        pin_memory=torch.cuda.is_available(),
    )
    return Loader(loader, skip=clips.config.data.on_error == "skip")


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


class _Collate:
    """`collate` for worker processes: errors come back as values (see `BrokenClip`)."""

    def __init__(self, max_words: int, max_frames: int) -> None:
        self.max_words = max_words
        self.max_frames = max_frames

    def __call__(self, items: list[Clip | BrokenClip]) -> tuple[Batch | UserError | None, list[BrokenClip]]:
        clips = [item for item in items if isinstance(item, Clip)]
        broken = [item for item in items if isinstance(item, BrokenClip)]
        try:
            return (collate(clips, self.max_words, self.max_frames) if clips else None), broken
        except UserError as error:
            return error, broken


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
