"""The feature store: what frozen towers make of every caption and frame, computed once (`xclip-lab embed`).

    <folder>/features.json          whose towers, which frames; what does not fit it is refused
    <folder>/<split>/words.npy      [T, W, D], padded words as well: X-CLIP looks at them
    <folder>/<split>/text_mask.npy  [T, W]
    <folder>/<split>/frames.npy     [V, F, D], before `agg_module`
    <folder>/<split>/video_mask.npy [V, F], all 0 for a video that cannot be read
    <folder>/<split>/split.json     fingerprint of the captions, how far it is done, what cannot be read

All arrays are memory-mapped: a batch reads its own rows, whatever the size of the dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tqdm.auto import tqdm

from xclip_lab import sampling
from xclip_lab.atomic import write_text
from xclip_lab.batching import make_loader
from xclip_lab.clips import BrokenClip, ClipDataset, Clips, FrameStore, StoredClip
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.errors import ConfigError, DatasetError, writing
from xclip_lab.memory import reserve
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.provenance import dataset_fingerprint
from xclip_lab.text import tokenize

STAMP = "features.json"
_FRAME_SETTINGS = ("sampler", "feature_framerate", "slice_framepos")
_TOWER_SETTINGS = ("linear_patch", "mask_padded_words", "mask_padded_frames", "precision")
_ARRAYS = ("words", "text_mask", "frames", "video_mask")


def embed(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig,
    folder: str | Path,
    precision: Literal["fp32", "fp16"] = "fp32",
    progress: bool = True,
) -> Path:
    """Store the tower outputs of one split. Stopped at any moment, the same call goes on.

    Args:
        model: its towers are used, as they stand. config: its `data`, sizes and `evaluation.batch_size`.
        precision: of what is stored; `fp16` takes half the room.

    Returns:
        The split's folder.

    Raises:
        DatasetError: more unreadable videos than `evaluation.allow_missing`; the disk is full.
        ConfigError: the folder holds features of other towers, frames or captions.
    """
    config = config.with_model(model.config)
    folder = Path(folder)
    with writing(folder, "; what is embedded already stays good"):
        split = _Split(folder, model, dataset, config, np.dtype({"fp32": "f4", "fp16": "f2"}[precision]))
        with evaluating(model):
            split.embed_captions(progress)
            split.embed_videos(progress)
    return split.place


class _Split:
    """The arrays of a split while they are filled, and the note of how far that is."""

    def __init__(
        self,
        folder: Path,
        model: RetrievalModel,
        dataset: VideoTextDataset,
        config: RunConfig,
        values: np.dtype,
    ) -> None:
        self.model, self.dataset, self.config = model, dataset, config
        self.place = folder / dataset.split
        self.size = int(config.evaluation.batch_size)
        origin = _origin(model, config) | {"stored_as": str(values)}
        if (folder / STAMP).is_file():
            _check_origin(folder, origin)
        self.place.mkdir(parents=True, exist_ok=True)
        if not (folder / STAMP).is_file():
            write_text(folder / STAMP, json.dumps(origin, indent=2) + "\n")
        self.note = self.place / "split.json"
        mine = {"dataset": dataset_fingerprint(dataset), "captions": 0, "videos": 0, "broken": {}}
        self.state: dict[str, Any] = _read_json(self.note) if self.note.is_file() else mine
        if self.state["dataset"] != mine["dataset"]:
            raise ConfigError(f"{self.place} holds features of other captions; choose another folder")
        texts, videos, width = len(dataset), len(dataset.videos), model.clip.sizes.embed_dim
        masks = np.dtype("u1")
        self.words = self._array("words", (texts, config.max_words, width), values)
        self.text_mask = self._array("text_mask", (texts, config.max_words), masks)
        self.frames = self._array("frames", (videos, config.max_frames, width), values)
        self.video_mask = self._array("video_mask", (videos, config.max_frames), masks)
        self._done()

    def _array(self, name: str, shape: tuple[int, ...], values: np.dtype) -> np.memmap:
        path = self.place / f"{name}.npy"
        if self.note.is_file():
            return _open(path, shape, "r+")
        array = open_memmap(path, mode="w+", dtype=values, shape=shape)
        with path.open("r+b") as file:
            reserve(file.fileno())
        return array

    def _done(self, **what: int) -> None:
        for array in (self.words, self.text_mask, self.frames, self.video_mask):
            array.flush()
        self.state |= what
        write_text(self.note, json.dumps(self.state))

    def embed_captions(self, progress: bool) -> None:
        starts = range(self.state["captions"], len(self.dataset), self.size)
        for start in tqdm(starts, "embed captions", unit="batch", disable=not progress):
            stop = min(start + self.size, len(self.dataset))
            texts = [sample.caption for sample in self.dataset.samples[start:stop]]
            ids, mask = tokenize(texts, self.config.max_words)
            device = self.model.logit_scale.device
            self.words[start:stop] = self.model.clip.words(ids.to(device), mask.to(device))[1].cpu()
            self.text_mask[start:stop] = mask
            self._done(captions=stop)

    def embed_videos(self, progress: bool) -> None:
        data = replace(self.config.data, on_error="skip", frame_order=0, features=None)
        config = replace(self.config, data=data)
        clips = ClipDataset(self.dataset, config, unique_videos=True, image_size=self.model.image_size)
        start = self.state["videos"]
        # Those that could not be read before may have been mended since.
        again = [
            row for row, video in enumerate(self.dataset.videos[:start]) if video in self.state["broken"]
        ]
        order = [*again, *range(start, len(clips))]
        loader = make_loader(clips, order, self.size)
        bar = tqdm(loader.in_place(), "embed videos", len(loader), unit="batch", disable=not progress)
        for number, batch in enumerate(bar, 1):
            if batch is not None:
                given = batch.to(self.model.logit_scale.device)
                rows = batch.index
                self.frames[rows] = self.model.frame_features(given.video, given.video_mask).cpu()
                self.video_mask[rows] = batch.video_mask
                for video in batch.video_ids or ():
                    self.state["broken"].pop(video, None)
            self.state["broken"] |= loader.broken
            self._check_broken()
            self._done(videos=max(start, start + min(number * self.size, len(order)) - len(again)))

    def _check_broken(self) -> None:
        broken, allowed = self.state["broken"], self.config.evaluation.allow_missing
        if len(broken) > allowed:
            raise DatasetError(
                f"{self.dataset.name} / {self.dataset.split}: {len(broken)} videos cannot be read, such as "
                f"{next(iter(broken.values()))}; evaluation.allow_missing is {allowed}"
            )


def left_out(place: Path) -> dict[str, str]:
    """The videos of an embedded split that could not be read, with the reason."""
    return _read_json(place / "split.json")["broken"]


def towers_hash(model: RetrievalModel) -> str:
    """SHA-256 of the towers' weights, the learnt scale left out."""
    return weights_hash({name: of for name, of in model.clip.state_dict().items() if name != "logit_scale"})


def weights_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of weights and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class StoredClips(Clips):
    """The captions of a split, or its unique videos, as stored features; stands in for `ClipDataset`.

    An item is a `StoredClip`, or a `BrokenClip` where the video could not be read when it was embedded.

    Args:
        model: whose towers' outputs these must be. config: its `data.features` is the folder.

    Raises:
        ConfigError: features of other towers, frames or captions, or not there.
    """

    instant = True
    store = None  # nothing here is decoded

    def __init__(
        self,
        model: RetrievalModel,
        dataset: VideoTextDataset,
        config: RunConfig,
        unique_videos: bool = False,
    ) -> None:
        folder = Path(str(config.data.features))
        place = folder / dataset.split
        _check_origin(folder, _origin(model, config.with_model(model.config)))
        note = _read_json(place / "split.json")
        if note["dataset"] != dataset_fingerprint(dataset):
            raise ConfigError(f"data.features: {place} holds features of other captions; embed these anew")
        if note["captions"] < len(dataset) or note["videos"] < len(dataset.videos):
            raise ConfigError(f"data.features: {place} is not finished; give the command that makes it again")
        if config.data.frame_order and model.config.towers.linear_patch == "3d":
            raise ConfigError(
                "data.frame_order: with towers.linear_patch=3d a stored frame knows its neighbours"
            )
        super().__init__(dataset, config, unique_videos)
        self.broken: dict[str, str] = note["broken"]
        columns = dataset.text_to_video
        self._rows = np.unique(columns, return_index=True)[1] if unique_videos else np.arange(len(columns))
        sizes = {"words": config.max_words, "text_mask": config.max_words}
        self._arrays = {}
        for name in _ARRAYS:
            rows = len(dataset) if name in sizes else len(dataset.videos)
            shape = (rows, sizes.get(name, config.max_frames))
            width = () if name.endswith("mask") else (model.clip.sizes.embed_dim,)
            self._arrays[name] = _open(place / f"{name}.npy", (*shape, *width), "r")

    def __getitem__(self, index: int) -> StoredClip | BrokenClip:
        sample, row = self.samples[index], self._rows[index]
        if sample.video_id in self.broken:
            return BrokenClip(sample.video_id, self.broken[sample.video_id])
        column = self.dataset.text_to_video[row]
        words, text_mask = self.texts(slice(row, row + 1))
        video_mask = _tensor(self._arrays["video_mask"][column]).long()
        frames = _tensor(self._arrays["frames"][column]).float()
        shuffler = np.random.default_rng((self.config.seed, self.epoch, index))
        real = list(range(int(video_mask.sum())))
        order = sampling.order_frames(real, self.config.data.frame_order, shuffler)
        frames[real] = frames[order]
        return StoredClip(index, sample.video_id, words[0], text_mask[0], frames, video_mask)

    def texts(self, rows: slice | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Word features float32 `[n, W, D]` and mask `[n, W]` of some captions of the split."""
        words = _tensor(self._arrays["words"][rows]).float()
        return words, _tensor(self._arrays["text_mask"][rows]).long()


def open_clips(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig,
    store: FrameStore | None = None,
    **options: bool,
) -> Clips:
    """The clips of a split as `config` says: as pixels, or as stored features.

    Args:
        options: `unique_videos`, and `training` for pixels.
    """
    if config.data.features is None:
        return ClipDataset(dataset, config, store=store, image_size=model.image_size, **options)
    return StoredClips(model, dataset, config, options.get("unique_videos", False))


def _origin(model: RetrievalModel, config: RunConfig) -> dict[str, Any]:
    frames = {name: getattr(config.data, name) for name in _FRAME_SETTINGS}
    sizes = {"max_words": config.max_words, "max_frames": config.max_frames}
    towers = {f"towers.{name}": getattr(config.towers, name) for name in _TOWER_SETTINGS}
    activation = {"quick_gelu": model.clip.sizes.quick_gelu}
    return {"towers": towers_hash(model), **sizes, **frames, **towers, **activation}


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Refuse features that were not made as `origin` says."""
    found = _read_json(folder / STAMP)
    for key, wanted in origin.items():
        if found.get(key) != wanted:
            told = "are of other towers" if key == "towers" else f"have {key} {found.get(key)}, not {wanted}"
            raise ConfigError(f"data.features: the features in {folder} {told}; embed these anew elsewhere")


def _open(path: Path, shape: tuple[int, ...], mode: Literal["r", "r+"]) -> np.memmap:
    """A stored array. One that was cut off would be filled with zeros on opening."""
    try:
        array = open_memmap(path, mode="r")
        whole = array.shape == shape and path.stat().st_size == array.offset + array.nbytes
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.features: {path} is missing or damaged ({error}); delete its folder"
        ) from error
    if not whole:
        raise ConfigError(f"data.features: {path} is damaged (not of shape {list(shape)}); delete its folder")
    return open_memmap(path, mode=mode)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.features: no {path}; make it by xclip-lab embed, or leave data.features out"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.features: {path} is damaged ({error}); delete its folder") from error
