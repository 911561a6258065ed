"""The look of the figures: style, colours, and the small parts that several figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from seaborn.utils import relative_luminance

P = ParamSpec("P")
R = TypeVar("R")

STYLE: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "grid.color": "0.88",
    "hatch.linewidth": 0.6,
}
DARK, MIDDLE, LIGHT = "#2f3f6f", "#7c8a8f", "#d9c85f"
"""Three steps of lightness for series that stand side by side."""
SIMILARITY_MAP, WEIGHT_MAP = "viridis", "cividis"
_MIDDLE_SHADE = 0.179  # relative luminance on which black and white have the same contrast


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function within `STYLE`; the caller's settings are as before afterwards."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return inside


@styled
def save_figure(figure: Figure | None, folder: str | Path, name: str) -> Figure | None:
    """Write `name.pdf` and `name.png` (200 dots an inch) and return the figure, so that a notebook shows it.

    None, where there was nothing to draw, is passed through.
    """
    if figure is None:
        return None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("pdf", "png"):
        figure.savefig(folder / f"{name}.{suffix}", bbox_inches="tight", pad_inches=0.05)
    return figure


def draw_outline(axis: Axes, cells: np.ndarray, width: float = 1.4) -> None:
    """Draw the border of the cells of an image that are true, white on black."""
    padded = np.pad(cells, 1)
    level, upright = np.argwhere(padded[1:] != padded[:-1]), np.argwhere(padded[:, 1:] != padded[:, :-1])
    lines = [[(column - 1.5, row - 0.5), (column - 0.5, row - 0.5)] for row, column in level]
    lines += [[(column - 0.5, row - 1.5), (column - 0.5, row - 0.5)] for row, column in upright]
    if not lines:
        return
    for colour, line_width in (("black", 2.2 * width), ("white", width)):
        drawn = LineCollection(
            lines, colors=colour, linewidths=line_width, capstyle="projecting", clip_on=False, zorder=3
        )
        axis.add_collection(drawn, autolim=False)


def draw_table(
    axis: Axes, values: ArrayLike, texts: ArrayLike, rows: Sequence[str], columns: Sequence[str], **look: Any
) -> None:
    """A named matrix `[rows, columns]` in shades with a text in each cell, without one where it is NaN.

    `look` goes to seaborn's heat map: colours, their range and bar, lines between the cells.
    """
    seaborn.heatmap(
        np.asarray(values),
        ax=axis,
        annot=np.asarray(texts),
        fmt="",
        xticklabels=False,
        yticklabels=False,
        **look,
    )
    shades = np.asarray(axis.collections[0].get_facecolor()).reshape(len(rows), len(columns), 4)
    for text in axis.texts:  # seaborn writes white until far into the light shades
        column, row = map(int, text.get_position())
        text.set_color("black" if relative_luminance(shades[row, column]) > _MIDDLE_SHADE else "white")
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns, parse_math=False)
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows, parse_math=False)
    axis.tick_params(length=0)


def draw_bars(
    axis: Axes,
    places: np.ndarray,
    intervals: np.ndarray,
    width: float,
    look: tuple[str, str | None],
    label: str,
    number: str,
) -> None:
    """Bars with intervals `[N, 3]` (value, low, high) and the value above; `look` is colour and hatch."""
    value, low, high = intervals.T
    errors = np.nan_to_num([value - low, high - value])
    axis.bar(places, value, width, color=look[0], hatch=look[1], edgecolor="white", label=label)
    axis.errorbar(places, value, errors.clip(min=0), fmt="none", ecolor="black", elinewidth=1, capsize=2.5)
    for place, top, shown in zip(places, value + errors[1], value, strict=True):
        axis.annotate(
            number.format(shown), (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=9
        )


def axes_at(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((x / across, y / up, width / across, height / up))


def text_at(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    across, up = figure.get_size_inches()
    figure.text(x / across, y / up, text, **{"va": "bottom", "fontsize": 10, "parse_math": False, **style})


def show_frame(axis: Axes, frame: np.ndarray) -> None:
    axis.imshow(frame, interpolation="antialiased")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def quote(caption: str, most: int = 90) -> str:
    """A caption in quotation marks, shortened to `most` characters."""
    return f"\u201c{textwrap.shorten(caption, most, placeholder=' ...')}\u201d"
