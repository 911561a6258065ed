"""Decoded frames kept on disk: a video is decoded once, for every epoch and every run that looks at it alike.

    <folder>/clips/ab/<key>.safetensors    the frames, as the image tower takes them
    <folder>/sources/cd/<path>.json        of a video's path: size, time of change, SHA-256 of its content

A clip is found by the content of its video, the way its frames were chosen (sampler, number, stretch, size)
and the versions of what decoded them: a video that moves is found again, another sampler or decoder never
gets the frames of this one. Files appear whole or not at all, so many processes may read and fill a store.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from xclip_lab.atomic import write_bytes
from xclip_lab.config import DataConfig
from xclip_lab.datasets import Sample
from xclip_lab.datasets.overlap import digest
from xclip_lab.errors import writing
from xclip_lab.frame_folder import NOTE_FILE
from xclip_lab.video import Decoder

JPEG_QUALITY = 90
_LAYOUT = 1
"""To be raised when a sampler or the preprocessing changes what it gives."""
_DECODERS = ("decord", "av", "pillow")
_CHOOSES = ("sampler", "feature_framerate", "slice_framepos", "store_format")


class Frames(NamedTuple):
    """`pixels` uint8 `[F, 3, S, S]` in the order of time, `timestamps` float32 `[F]` seconds, and what
    decoded them."""

    pixels: torch.Tensor
    timestamps: torch.Tensor
    decoder: Decoder


class ClipStore:
    """The folder `data.store`.

    `raw` keeps the pixels as they are. `jpeg` keeps them in about a tenth of the room, one JPEG a clip with
    its frames below each other; they come back a few grey levels off.

    Args:
        data: its `store`, `store_format` and what chooses the frames are used.
        max_frames: at most so many a clip. image_size: their side in pixels.
    """

    def __init__(self, data: DataConfig, max_frames: int, image_size: int) -> None:
        if data.store is None:
            raise ValueError("data.store names no folder")
        self.folder = Path(data.store)
        self.image_size = image_size
        self.settings = {name: getattr(data, name) for name in _CHOOSES}
        self.settings |= {
            "max_frames": max_frames,
            "image_size": image_size,
            "layout": _LAYOUT,
            **_versions(),
        }

    def path(self, sample: Sample) -> Path:
        """Where a sample's frames lie or would lie.

        Raises:
            OSError: its video cannot be read.
        """
        if sample.path is None:
            raise FileNotFoundError(f"video {sample.video_id!r} has no file")
        content = content_of(sample.path, self.folder / "sources")
        told = json.dumps([content, sample.start, sample.end, self.settings], sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()
        return self.folder / "clips" / key[:2] / f"{key}.safetensors"

    def read(self, sample: Sample) -> Frames | None:
        """The frames of a sample, None where they are not here, or damaged, as after a power cut."""
        try:
            with safe_open(self.path(sample), "pt") as clip:
                decoder: Any = clip.metadata()["decoder"]
                timestamps = clip.get_tensor("timestamps")
                if self.settings["store_format"] == "raw":
                    return Frames(clip.get_tensor("frames"), timestamps, decoder)
                strip = simplejpeg.decode_jpeg(clip.get_tensor("jpeg").numpy())
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        frames = torch.from_numpy(strip).view(-1, self.image_size, self.image_size, 3)
        return Frames(frames.permute(0, 3, 1, 2), timestamps, decoder)

    def write(self, sample: Sample, frames: Frames) -> Path:
        """Keep the frames of a sample.

        Raises:
            DatasetError: the folder cannot be written, or the disk is full.
        """
        tensors = {"timestamps": frames.timestamps}
        if self.settings["store_format"] == "raw":
            tensors["frames"] = frames.pixels
        else:
            tensors["jpeg"] = torch.from_numpy(_strip(frames.pixels))
        with writing(self.folder, " (data.store); what is kept already stays good"):
            path = self.path(sample)
            write_bytes(path, save(tensors, metadata={"decoder": frames.decoder}))
        return path


def content_of(path: Path, notes: Path) -> str:
    """SHA-256 of a video, read anew only where the file has changed since it was noted in a folder.

    Raises:
        OSError: the video cannot be read.
    """
    path = path.absolute()
    state = _state(path)
    name = hashlib.sha256(str(path).encode(errors="surrogateescape")).hexdigest()
    note = notes / name[:2] / f"{name}.json"
    try:
        known = json.loads(note.read_bytes())
        if known | state == known:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    content = digest(path)
    told = {"path": str(path), **state, "sha256": content}
    with contextlib.suppress(OSError):  # where it can only be read it is worked out every time
        write_bytes(note, json.dumps(told).encode(errors="replace"))
    return content


def _state(path: Path) -> dict[str, Any]:
    """What changes when a video does: of a folder, the size and time of every frame in it."""
    if not path.is_dir():
        status = path.stat()
        return {"size": status.st_size, "changed_ns": status.st_mtime_ns}
    with os.scandir(path) as entries:
        files = sorted((entry.name, *_stamp(entry.stat())) for entry in entries)
    note = path.parent / NOTE_FILE
    files += [(NOTE_FILE, *_stamp(note.stat()))] if note.is_file() else []
    return {"frames": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _strip(pixels: torch.Tensor) -> np.ndarray:
    """One JPEG of all frames below each other: quicker to read than one a frame."""
    frames, _, height, width = pixels.shape
    strip = pixels.permute(0, 2, 3, 1).reshape(frames * height, width, 3).contiguous().numpy()
    encoded = simplejpeg.encode_jpeg(strip, JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")
    return np.frombuffer(encoded, np.uint8).copy()


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for library in _DECODERS:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "none"
    return found
