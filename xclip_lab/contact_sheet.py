"""Frames of the videos that a query found, with their times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from xclip_lab import video
from xclip_lab.drawing import LIGHT, axes_at, show_frame, styled, text_at

_PIXELS = 320
"""The longer side of a picture in a sheet."""


class Strip(NamedTuple):
    """A row of a sheet: pictures uint8 `[H, W, 3]`, in the order of time, and which of them is outlined."""

    heading: str
    labels: Sequence[str]
    pictures: Sequence[np.ndarray]
    best: int


def read_pictures(path: Path, seconds: Sequence[float]) -> list[np.ndarray]:
    """The frames shown at these times, small, uint8 `[H, W, 3]`.

    Raises:
        VideoError: the video cannot be read.
    """
    info = video.probe(path)
    indices = [int(np.abs(info.timestamps - time).argmin()) for time in seconds]
    pictures = []
    for frame in video.read_frames(path, indices, info=info).frames:
        picture = Image.fromarray(frame)
        picture.thumbnail((_PIXELS, _PIXELS))
        pictures.append(np.asarray(picture))
    return pictures


def time_code(seconds: float) -> str:
    """Minutes and seconds, as a player shows them.

    >>> time_code(3.24), time_code(59.97), time_code(3725)
    ('0:03.2', '1:00.0', '1:02:05.0')
    """
    tenths = round(10 * seconds)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    clock = f"{tenths / 10:04.1f}"
    return f"{hours}:{minutes:02d}:{clock}" if hours else f"{minutes}:{clock}"


@styled
def contact_sheet(strips: Sequence[Strip], title: str, note: str) -> Figure:
    """Rows of frames below each other, each with its label under it; the one that counts most is outlined,
    its label bold."""
    columns = max(len(strip.pictures) for strip in strips)
    wide, gap, head = 1.6, 0.08, 0.6  # inches
    heights = [min(wide, wide * max(of.shape[0] / of.shape[1] for of in strip.pictures)) for strip in strips]
    across = max(6.4, columns * (wide + gap))
    top = head + sum(height + 0.62 for height in heights)
    figure = Figure(figsize=(across, top))
    text_at(figure, 0, top - 0.26, _fit(title, across), fontsize=12, weight="bold")
    text_at(figure, 0, top - 0.5, note, fontsize=9, color="0.35")
    top -= head
    for strip, tall in zip(strips, heights, strict=True):
        text_at(figure, 0, top - 0.24, _fit(strip.heading, across), weight="bold")
        for column, (picture, label) in enumerate(zip(strip.pictures, strip.labels, strict=True)):
            axis = axes_at(figure, column * (wide + gap), top - 0.3 - tall, wide, tall)
            show_frame(axis, picture)
            axis.set_xlabel(label, fontsize=10, labelpad=3)
            if column == strip.best:
                axis.spines[:].set(visible=True, linewidth=3, color=LIGHT)
                axis.xaxis.label.set_fontweight("bold")
        top -= tall + 0.62
    return figure


def _fit(text: str, inches: float) -> str:
    """The text, its middle left out where it is too long for one line."""
    most = int(inches * 11)
    return text if len(text) <= most else f"{text[: most // 2 - 2]} ... {text[-(most // 2 - 3) :]}"
