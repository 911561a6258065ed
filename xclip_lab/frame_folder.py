"""Folders of frames, as CLIP2Video reads them: one image a frame, in the order of their names."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from xclip_lab.errors import VideoError
from xclip_lab.sampling import FOLDER_RATE

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_VIDEOS = "3gp avi flv gif m4v mkv mov mp4 mpeg mpg ogv ts webm wmv"
VIDEO_SUFFIXES = frozenset(f".{suffix}" for suffix in _VIDEOS.split())
NOTE_FILE = "prepared.json"
"""Beside the folders that `export` writes: how they were made."""


def images(folder: Path) -> list[Path]:
    """The frames of a folder: `img_2.jpg` stands before `img_10.jpg`. What is no image does not count.

    Raises:
        VideoError: none there, as many videos beside them, or the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as scan:
            entries = list(scan)
    except OSError as error:
        raise VideoError(f"{folder}: cannot be listed ({error.strerror})") from error
    names = [entry.name for entry in entries if _is_image(entry)]
    videos = [entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES]
    if names and len(videos) >= len(names):  # fewer are previews
        raise VideoError(f"{folder}: pictures beside videos are no frames; name one, such as {min(videos)}")
    if not names:
        raise VideoError(f"{folder}: a folder without a frame in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [folder / name for name in sorted(names, key=_natural)]


def rate(folder: Path) -> float:
    """Frames a second: those of `prepared.json` beside the folder, else CLIP2Video's 5.

    Raises:
        VideoError: that file says no rate.
    """
    note = folder.absolute().parent / NOTE_FILE
    if not note.is_file():
        return float(FOLDER_RATE)
    try:
        fps = float(json.loads(note.read_text(encoding="utf-8"))["fps"])
    except (OSError, ValueError, KeyError, TypeError):
        fps = math.nan
    if not 0 < fps < math.inf:
        raise VideoError(f'{note}: no frame rate in it; {{"fps": 5}} would be one')
    return fps


def size(file: Path) -> tuple[int, int]:
    """Height and width of a frame. Raises VideoError where it cannot be read."""
    height, width = _pixels(file).shape[:2]
    return height, width


def read(files: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """Frames of this height and width as uint8 `[F, H, W, 3]` RGB, turned as their EXIF data say.

    Raises:
        VideoError: an image that is damaged, cut off or of another size.
    """
    frames = np.empty((len(files), *size, 3), np.uint8)
    for frame, file in zip(frames, files, strict=True):
        pixels = _pixels(file)
        if pixels.shape != frame.shape:
            (height, width), (h, w) = pixels.shape[:2], size
            raise VideoError(
                f"{file}: {width} x {height} pixels where the folder's first image has {w} x {h}"
            )
        frame[:] = pixels
    return frames


def _pixels(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # Pillow would make nearly all of it white
                raise ValueError(f"pixels of more than 8 bits (mode {image.mode})")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow's errors derive from half a dozen built-in ones
        raise VideoError(f"{file}: Pillow: {' '.join(str(error).split()) or type(error).__name__}") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    is_named_so = os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.name[0] != "."
    return is_named_so and os.path.isfile(entry.path)  # `entry.is_file()` raises at a link to itself


def _natural(name: str) -> tuple[list[str | int], str]:
    """Numbers in a name count as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
