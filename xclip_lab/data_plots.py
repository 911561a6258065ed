"""Figures of what `check` found in a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xclip_lab.check_report import Report
from xclip_lab.drawing import MIDDLE, WEIGHT_MAP, draw_table, styled

_BINS = 40
_SHOWN_SHARE = 99.5  # percent of the values; the few that are longer share the last bar


@styled
def caption_lengths(report: Report, max_words: int = 32) -> Figure | None:
    """How many words the captions of each split have; the dotted line is where `max_words` cuts them:
    the axis goes that far, though no caption may.

    None where there is no caption.
    """
    found = {name: split.words for name, split in report.splits.items() if split.words}
    if not found:
        return None
    end = max(_end(found), max_words)
    width = max(1, round(end / _BINS))  # whole words: no bar stands for more lengths than its neighbour
    edges = np.arange(0.5, end + width, width)
    figure = _histograms(found, edges, "caption", "words", "1 word" if width == 1 else f"{width} words")
    for axis in figure.axes:
        line = axis.axvline(max_words - 1.5, color="black", ls=":", lw=1.6)
    figure.legend([line], [f"cut at max_words {max_words}"], loc="outside upper right")
    figure.axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled
def durations(report: Report) -> Figure | None:
    """How long the videos of each split are. None where none was opened."""
    found = {name: split.seconds for name, split in report.splits.items() if split.seconds}
    if not found:
        return None
    end = _end(found)
    width = _round_step(end / _BINS)
    return _histograms(found, np.arange(0, end + 2 * width, width), "video", "seconds", f"{width:g} s")


@styled
def overlap_matrix(report: Report) -> Figure | None:
    """How many videos each two splits share, by id or content; on the diagonal how many each one has. Below,
    how many each shares with splits of the dataset's other protocols, by id.

    Shades: the share of the smaller of both. None where there is one split only.
    """
    names = list(report.splits)
    if len(names) == 1:
        return None
    sizes = [len(split.videos) for split in report.splits.values()]
    counts = np.full((len(names) + len(report.elsewhere), len(names)), np.nan)  # nan: not known
    for row, split in enumerate(report.splits.values()):
        counts[row, row] = sizes[row] if split.dataset else np.nan
    for (one, other), shared in report.overlaps.items():
        row, column = names.index(one), names.index(other)
        counts[row, column] = counts[column, row] = shared.total
    for row, (_, ids) in enumerate(report.elsewhere.values(), start=len(names)):
        counts[row] = [len(ids[name]) if name in ids else np.nan for name in names]
    heights = [*sizes, *(found.videos for found in report.elsewhere.values())]
    shares = 100 * counts / np.maximum(np.minimum.outer(heights, sizes), 1)
    alone = np.eye(*counts.shape, dtype=bool) | np.isnan(counts)
    figure = Figure(figsize=(2.0 + 1.0 * len(names), 0.7 + 0.7 * len(heights)), layout="constrained")
    axis = figure.subplots()
    texts = [["-" if np.isnan(count) else f"{count:,.0f}" for count in row] for row in counts]
    others = [f"{name}\n({found.videos:,})" for name, found in report.elsewhere.items()]
    # No share, such as a split's with itself, has a grey of its own, below all shades.
    colours = mpl.colormaps[WEIGHT_MAP].with_extremes(under="0.9")
    bar = {"label": "videos in both (%)", "ticks": [0, 50, 100], "pad": 0.03}
    look: dict[str, Any] = {"cmap": colours, "vmin": 0, "vmax": 100, "cbar_kws": bar}
    draw_table(axis, np.where(alone, -1, shares), texts, [*names, *others], names, **look)
    if others:
        axis.axhline(len(names), color="white", lw=4)
    return figure


def _histograms(
    values: Mapping[str, Sequence[float]], edges: np.ndarray, what: str, unit: str, width: str
) -> Figure:
    """A panel a split, below each other: splits are often so alike that one line would hide another."""
    figure = Figure(figsize=(6.0, 1.0 + 1.25 * len(values)), layout="constrained")
    panels = figure.subplots(len(values), sharex=True, squeeze=False)[:, 0]
    for axis, (name, found) in zip(panels, values.items(), strict=True):
        shares = 100 * np.histogram(np.clip(found, edges[0], edges[-1]), edges)[0] / len(found)
        axis.stairs(shares, edges, fill=True, color=MIDDLE)
        axis.margins(y=0.1)
        axis.set(xlim=(0, edges[-1]), ylim=(0, None))
        axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axis.grid(axis="y")
        told = f"{len(found):,} {what}s, median {_short(np.median(found))}, longest {_short(max(found))}"
        axis.set_title(name)
        axis.set_title(told, loc="right", fontsize=10, fontweight="normal")
    figure.supylabel(f"{what}s of the split (%)", fontsize=11)
    rest = "" if max(map(max, values.values())) <= edges[-1] else ", the last one for all longer"
    panels[-1].set_xlabel(f"{unit} a {what} ({width} a bar{rest})")
    return figure


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _end(values: Mapping[str, Sequence[float]]) -> float:
    """Where the axis ends: a few very long ones would leave the others no room."""
    return max(float(np.percentile(found, _SHOWN_SHARE)) for found in values.values())


def _round_step(width: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... and their tenths."""
    power = 10.0 ** np.floor(np.log10(width))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= width))
