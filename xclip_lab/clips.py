"""The frames of a caption's video: decoded on demand, from a folder that keeps them, or from memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import open_clip
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from xclip_lab import sampling, video
from xclip_lab.augment import augment_frames
from xclip_lab.config import RunConfig
from xclip_lab.datasets import Sample, VideoTextDataset
from xclip_lab.errors import DatasetError, UserError, VideoError
from xclip_lab.memory import available_memory
from xclip_lab.preprocess import preprocess
from xclip_lab.store import ClipStore, Frames

# The share of the free memory that decoded frames may take.
_MEMORY_SHARE = 0.8
# Tells the draws of a clip's augmentation from those of its order, and of its jitter.
_AUGMENT, _JITTER = 1, 2


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
class StoredClip:
    """A caption and its clip as the towers gave them: `words [W, D]`, `frames [F, D]`, masks `[W]`, `[F]`."""

    index: int
    video_id: str
    words: torch.Tensor
    text_mask: torch.Tensor
    frames: torch.Tensor
    video_mask: torch.Tensor


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


class Clips(Dataset[Clip | StoredClip | BrokenClip | UserError]):
    """What a loader reads of a split: `ClipDataset`, or `features.StoredClips`.

    Attributes:
        samples: one per item. instant: whether items are in memory, so that workers would only be in the way.
        store: frames decoded before. passed: ids of videos that were decoded and found undamaged; they are
            not verified again. epoch: with the seed and the index, what a clip's random choices come from.
    """

    instant: bool
    store: FrameStore | None

    def __init__(self, dataset: VideoTextDataset, config: RunConfig, unique_videos: bool = False) -> None:
        self.dataset = dataset
        self.config = config
        self.samples = dataset.video_samples() if unique_videos else dataset.samples
        self.passed: set[str] = set()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)


class ClipDataset(Clips):
    """The clips of a dataset's captions, or of its unique videos.

    An item is a `Clip`, a `BrokenClip`, or the error where `data.store` cannot be written.

    Args:
        dataset: the annotations.
        config: its `data`, `max_frames`, `max_words`, `seed` and image size are used.
        unique_videos: one item a video, in the order of `dataset.videos`, with its first caption; otherwise
            one item a caption, in the order of `dataset.samples`.
        store: frames decoded before (`preload`); else they come from `data.store`, where there is one, which
            keeps what is decoded on demand.
        image_size: side in pixels, None for that of `config.towers`.
        training: frames move and change as `data.frame_jitter` and `data.augment` say.
    """

    def __init__(
        self,
        dataset: VideoTextDataset,
        config: RunConfig,
        unique_videos: bool = False,
        store: FrameStore | None = None,
        image_size: int | None = None,
        training: bool = False,
    ) -> None:
        super().__init__(dataset, config, unique_videos)
        self.store = store
        self.image_size = image_size or tower_image_size(config)
        self.training = training
        self.kept = ClipStore(config.data, config.max_frames, self.image_size) if config.data.store else None

    @property
    def instant(self) -> bool:  # type: ignore[override]
        return self.store is not None

    def __getitem__(self, index: int) -> Clip | BrokenClip | UserError:
        sample = self.samples[index]
        try:
            pixels, timestamps, decoder = self._frames(index, sample)
        except VideoError as error:
            return BrokenClip(sample.video_id, str(error))
        except UserError as error:
            return error
        shuffler = self._random(index)
        if self.training and self.config.data.augment != "none":
            pixels = augment_frames(pixels, int(self._random(index, _AUGMENT).integers(2**63)))
        if self.config.data.frame_order:
            places = list(range(len(pixels)))
            order = torch.tensor(sampling.order_frames(places, self.config.data.frame_order, shuffler))
            pixels, timestamps = pixels.index_select(0, order), timestamps.index_select(0, order)
        return Clip(index, sample.video_id, sample.caption, pixels, timestamps, decoder)

    def _random(self, index: int, *what: int) -> np.random.Generator:
        """What is random depends on the place in the dataset and the epoch, not on the worker or the step."""
        return np.random.default_rng((self.config.seed, self.epoch, index, *what))

    def _frames(self, index: int, sample: Sample) -> tuple[torch.Tensor, torch.Tensor, video.Decoder | None]:
        if self.store is not None:
            if sample.video_id in self.store.broken:
                raise VideoError(self.store.broken[sample.video_id])
            return *self.store.clips[sample.video_id], None
        verify = sample.video_id not in self.passed
        if self.training and self.config.data.frame_jitter:  # other frames every epoch: nothing to keep
            return load_frames(sample, self.config, self.image_size, verify, self._random(index, _JITTER))
        frames = None if self.kept is None else self.kept.read(sample)
        if frames is None:
            frames = load_frames(sample, self.config, self.image_size, verify)
            if self.kept is not None:
                self.kept.write(sample, frames)
        return frames


def load_frames(
    sample: Sample,
    config: RunConfig,
    image_size: int,
    verify: bool = True,
    jitter: np.random.Generator | None = None,
) -> Frames:
    """Decode the frames that `config.data` asks for, in the order of time: 1 to `config.max_frames`, of side
    `image_size`. `jitter` moves them (`data.frame_jitter`).

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
            jitter=jitter,
        )
    except ValueError as error:
        raise VideoError(f"{sample.path}: {error}; data.sampler=uniform takes any video") from error
    if not indices:
        end = info.duration if sample.end is None else sample.end
        remedy = "mend its start and end"
        if data.sampler != "uniform":
            remedy += " or take data.sampler=uniform"
        raise VideoError(
            f"{sample.path}: no frame to take between {sample.start or 0:g} and {end:g} s "
            f"(data.sampler={data.sampler}, data.feature_framerate={data.feature_framerate}), the video "
            f"lasts {info.duration:.2f} s; {remedy} (video {sample.video_id!r})"
        )
    read, decoder = video.read_frames_and_decoder(sample.path, indices, info=info, verify=verify)
    timestamps = torch.from_numpy(read.timestamps).float()
    return Frames(preprocess(read.frames, image_size), timestamps, decoder)


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
        elif isinstance(clip, UserError):
            raise clip
        elif data.on_error == "skip":
            broken[clip.video_id] = clip.reason
        else:
            raise VideoError(clip.reason)
    return FrameStore(kept, broken, dict(decoders))


def tower_image_size(config: RunConfig) -> int:
    """The side in pixels of the images that the configured image tower takes."""
    if config.towers.architecture is not None:
        return config.towers.architecture.image_size
    known = open_clip.get_model_config(config.towers.name)
    return known["vision_cfg"]["image_size"] if known else 224


def _check_memory(needed: int) -> None:
    available = available_memory()
    if available is not None and needed > _MEMORY_SHARE * available:
        raise DatasetError(
            f"data.preload: the frames take {needed / 2**30:.1f} GiB, of the memory "
            f"{available / 2**30:.1f} GiB are free; set data.preload=false or lower max_frames"
        )
