"""Figures. Every function returns a Figure and leaves matplotlib's global state alone; `save_figure` writes it.

Colours come from viridis and cividis: they can be told apart by colour-blind readers and in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from xclip_lab.attention import Explanation
from xclip_lab.batching import Clip
from xclip_lab.evaluation import SIDES, Result
from xclip_lab.pointing import CONTENT_CLASSES, Pointing
from xclip_lab.stats import cluster_mean_interval
from xclip_lab.synthetic import ClipTruth

P = ParamSpec("P")
R = TypeVar("R")

STYLE: dict[str, Any] = {
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


@styled
def training_curve(history: Sequence[Mapping[str, Any]], window: int = 10) -> Figure:
    """Loss with its moving mean, learning rate and, where the run was validated, R@1.

    Args:
        history: rows of `history.jsonl`. window: rows that the moving mean takes.
    """
    rows = pd.DataFrame(list(history)).set_index("step")
    validated = "val/t2v/R@1" in rows
    heights = [3, 1.5, 1.2] if validated else [3, 1.2]
    figure = Figure(figsize=(6.4, 1.1 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    axes[0].plot(rows.index, rows["loss"], ".", color=MIDDLE, markersize=4, label="batch")
    mean = rows["loss"].rolling(window, min_periods=1).mean()
    axes[0].plot(mean.index, mean, color=DARK, lw=2, label=f"mean of {min(window, len(rows))} records")
    axes[0].set(ylabel="loss (nats)")
    axes[0].legend()
    if validated:
        for side, colour, marker in (("t2v", DARK, "o"), ("v2t", MIDDLE, "s")):
            recall = rows[f"val/{side}/R@1"].dropna()
            axes[1].plot(recall.index, recall, marker=marker, color=colour, label=SIDES[side])
        axes[1].set(ylabel="val R@1 (%)")
        axes[1].legend()
    axes[-1].plot(rows.index, rows["lr"], color=DARK)
    axes[-1].set(xlabel="optimiser step", ylabel="learning rate")
    axes[-1].ticklabel_format(axis="y", scilimits=(-2, 2), useMathText=True)
    for axis in axes:
        axis.grid(axis="y")
        axis.set_ylim(bottom=0)
    return figure


@styled
def recall_bars(table: pd.DataFrame, chance: float, control: str = "frames shuffled") -> Figure:
    """R@1 of groups of captions beside a control, with 95% intervals and the line of guessing.

    Args:
        table: as `study.level_table` gives it. chance: R@1 of guessing, percent. control: what it is.
    """
    figure = Figure(figsize=(max(4.2, 1.6 + 1.25 * len(table)), 3.6), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(table))
    own = table[["R@1", "low", "high"]].to_numpy()
    other = table[["control", "control_low", "control_high"]].to_numpy()
    _bars(axis, places - 0.2, own, 0.38, (DARK, None), "as filmed", "{:.0f}")
    _bars(axis, places + 0.2, other, 0.38, (LIGHT, "///"), control, "{:.0f}")
    axis.axhline(chance, color="black", ls=":", lw=1.2, label=f"chance ({chance:.2g}%)")
    names = [f"{name}\n(n = {count})" for name, count in table["captions"].items()]
    axis.set_xticks(places, names)
    axis.set(ylabel="text-to-video R@1 (%)", ylim=(0, 112), yticks=range(0, 101, 20))
    axis.grid(axis="y")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


@styled
def rank_histogram(result: Result) -> Figure:
    """At which rank queries find their answer, both directions."""
    edges = [1, 2, 3, 6, 11, 51, np.inf]
    names = ["1", "2", "3-5", "6-10", "11-50", "> 50"]
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(names))
    for shift, side, colour, hatch in ((-0.2, "t2v", DARK, None), (0.2, "v2t", LIGHT, "///")):
        ranks = result.ranks[side]
        shares = 100 * np.histogram(ranks, edges)[0] / len(ranks)
        bars = axis.bar(
            places + shift, shares, 0.38, color=colour, hatch=hatch, edgecolor="white", label=SIDES[side]
        )
        axis.bar_label(bars, fmt="{:.0f}", fontsize=9, padding=1)
    axis.set_xticks(places, [name.replace("-", "\u2013") for name in names])
    axis.set(xlabel=f"rank of the answer among {len(result.videos)} videos", ylabel="share of queries (%)")
    axis.margins(y=0.12)
    axis.grid(axis="y")
    axis.legend()
    return figure


@styled
def similarity_heatmap(result: Result, limit: int = 40) -> Figure:
    """Similarity of the first `limit` videos with their captions; each caption's own video is outlined."""
    columns = np.arange(min(limit, len(result.videos)))
    rows = np.flatnonzero(result.text_to_video < len(columns))
    rows = rows[np.argsort(result.text_to_video[rows], kind="stable")][: 3 * limit]
    block = result.similarity[np.ix_(rows, columns)]
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(block, cmap=SIMILARITY_MAP, aspect="auto", interpolation="none")
    outline = result.text_to_video[rows][:, None] == columns
    _outline(axis, outline, width=0.9)
    figure.colorbar(image, ax=axis, label="similarity (logit)", pad=0.02)
    axis.set(xlabel=f"video (first {len(columns)} of {len(result.videos)})", ylabel="caption")
    axis.spines[:].set_visible(False)
    return figure


@styled
def film_strips(strips: Sequence[tuple[str, Clip]], most_frames: int = 8, title: str | None = None) -> Figure:
    """Clips below each other, each a row of frames with its time in seconds under it.

    Args:
        strips: `(heading, clip)`. most_frames: of a longer clip so many are shown, evenly spaced.
    """
    shown = [_evenly(clip, most_frames) for _, clip in strips]
    columns = max(len(pixels) for pixels, _ in shown)
    side, row, gap = 0.85, 1.4, 0.04  # inches
    height = row * len(strips) + (0.35 if title else 0.0)
    figure = Figure(figsize=(columns * (side + gap), height))
    for number, ((heading, _), (pixels, times)) in enumerate(zip(strips, shown, strict=True)):
        bottom = row * (len(strips) - number - 1) + 0.24
        _write(figure, 0, bottom + side + 0.05, heading)
        for column, (frame, time) in enumerate(zip(pixels, times, strict=True)):
            axis = _place(figure, column * (side + gap), bottom, side, side)
            _show_frame(axis, frame)
            axis.set_xlabel(f"{time:.1f} s", fontsize=9, labelpad=2)
    if title:
        _write(figure, 0, height - 0.28, title, fontsize=11, weight="bold")
    return figure


def retrieved_videos(
    query: str, clips: Sequence[Clip], scores: Sequence[float], truth: str, most_frames: int = 8
) -> Figure:
    """What a query finds: the first clips, best first, with their scores.

    Args:
        clips: in the order of their rank, from 1. scores: of each. truth: the id of the query's own video.
    """
    strips = []
    for rank, (clip, score) in enumerate(zip(clips, scores, strict=True), start=1):
        verdict = "the right one" if clip.video_id == truth else f"\u201c{clip.caption}\u201d"
        strips.append((f"{rank}.  {score:.2f}  {verdict}", clip))
    return film_strips(strips, most_frames, title=f"\u201c{query}\u201d")


@styled
def pointing_figure(scores: Mapping[str, Pointing]) -> Figure | None:
    """Attention mass on a word's own frames, by the word's class, beside what a uniform map would put there.

    Args:
        scores: as `study.pointing_study` gives them. Without any there is no figure.
    """
    if not scores:
        return None
    classes = ["all", *CONTENT_CLASSES]
    figure = Figure(figsize=(6.8, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(scores)
    looks = [(DARK, None), (MIDDLE, "..."), (LIGHT, "///")]
    for number, (name, pointing) in enumerate(scores.items()):
        words = pointing.words
        groups = [words if kind == "all" else words[words["word_class"] == kind] for kind in classes]
        found = np.array([cluster_mean_interval(group["inside"], group["video_id"]) for group in groups])
        places = np.arange(len(classes)) - 0.4 + width * (number + 0.5)
        _bars(axis, places, found, 0.92 * width, looks[number % len(looks)], name, "{:.2f}")
    # What a uniform map puts there depends on the truth only, and a shuffled truth has as many frames.
    for place, group in enumerate(groups):
        label = None if place else "uniform map"
        level = [group["uniform"].mean()] * 2
        axis.plot([place - 0.44, place + 0.44], level, color="black", ls=":", lw=1.8, label=label)
    axis.set_xticks(range(len(classes)), ["all content words", *(f"{kind} words" for kind in classes[1:])])
    axis.set(ylabel="attention on the word's frames", ylim=(0, 1.08))
    axis.grid(axis="y")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


@styled
def aosm_figure(explanation: Explanation, truth: ClipTruth | None = None) -> Figure:
    """How the logit of a caption with a clip comes about: frames, similarity matrix, both stages of AOSM,
    and what each contrast adds (X-CLIP 3.3 and 3.4).

    Args:
        truth: of a generated clip; the frames that a word speaks of are outlined.
    """
    words, frames = explanation.similarity.shape
    # All in inches; columns of the three matrices are as wide as the frames above them.
    panel, bars, tall, below = 2.5, 0.62, 0.215 * words, 3.15
    side = panel / frames
    left = (1.15, 1.15 + panel + 0.22, 1.15 + 2 * panel + bars + 0.65)
    bottom = below + tall
    figure = Figure(figsize=(left[2] + panel, bottom + side + 0.75))
    outline = _token_truth(explanation, truth)

    unit = Normalize(0, 1)
    span = Normalize(explanation.similarity.min(), explanation.similarity.max())
    maps = (
        ("(a) similarity", explanation.similarity, SIMILARITY_MAP, span),
        ("(b) stage 1: over frames, for each word", explanation.over_frames, WEIGHT_MAP, unit),
        ("(c) stage 1: over words, for each frame", explanation.over_words, WEIGHT_MAP, unit),
    )
    for start, (title, values, colours, norm) in zip(left, maps, strict=True):
        for column, frame in enumerate(explanation.pixels):
            _show_frame(_place(figure, start + column * side, bottom + 0.04, 0.96 * side, 0.96 * side), frame)
        _write(figure, start, bottom + side + 0.1, title, weight="bold", fontsize=10)
        axis = _place(figure, start, below, panel, tall)
        axis.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="none")
        axis.set_xticks(range(frames), [f"{time:.1f}" for time in explanation.timestamps])
        axis.set_yticks(range(words), explanation.tokens if start == left[0] else [""] * words)
        axis.tick_params(length=0, labelsize=10 if frames <= 8 else 7)
        axis.spines[:].set_visible(False)
        _outline(axis, outline)
        axis.set_xlabel("time (s)", labelpad=1, fontsize=10)
    _bar_of_colours(figure, left[0], below - 0.6, panel, SIMILARITY_MAP, span, "similarity")
    _bar_of_colours(figure, left[1], below - 0.6, panel, WEIGHT_MAP, unit, "weight, in (b) and (c)")
    axis.set_xlabel("")
    axis.set_xticklabels([])

    rows = _place(figure, left[1] + panel + 0.06, below, bars, tall)
    rows.barh(range(words), explanation.word_weights, 0.8, color=DARK)
    rows.set(ylim=(words - 0.5, -0.5), yticks=[], xlim=(0, 1), xticks=[0, 1], xlabel="stage 2")
    columns = _place(figure, left[2], below - 0.06 - bars, panel, bars)
    columns.bar(range(frames), explanation.frame_weights, 0.8, color=DARK)
    columns.set(xlim=(-0.5, frames - 0.5), ylim=(1, 0), yticks=[0, 1], ylabel="stage 2", xlabel="time (s)")
    columns.set_xticks(range(frames), [f"{time:.1f}" for time in explanation.timestamps])
    columns.tick_params(axis="x", length=0)
    for axis in (rows, columns):
        axis.spines[["top", "right", "bottom", "left"]].set_visible(True)
        axis.spines[:].set(color="0.7")

    _write(figure, left[0], 1.72, "(d) the four contrasts add up to the logit", weight="bold", fontsize=10)
    _waterfall(_place(figure, left[0], 0.45, 2 * panel + 0.22, 1.2), explanation)
    if outline.any():
        key = _place(figure, left[2], 0.95, 2 * side, 0.215)
        key.imshow(np.full((1, 2), 0.35), cmap=WEIGHT_MAP, norm=unit, aspect="auto")
        key.set_axis_off()
        _outline(key, np.ones((1, 2), dtype=bool))
        _write(
            figure, left[2] + 2 * side + 0.1, 0.98, "frames that the word\nspeaks of (the truth)", va="center"
        )
    _write(figure, left[0], bottom + side + 0.45, f"\u201c{explanation.caption}\u201d", fontsize=12)
    return figure


def _waterfall(axis: Axes, explanation: Explanation) -> None:
    """Each contrast begins where the one before ended; the last bar is the logit."""
    names = [*explanation.contributions, "logit"]
    values = np.array(list(explanation.contributions.values()))
    starts = np.concatenate([[0.0], np.cumsum(values)])
    starts[-1] = 0.0
    values = np.append(values, explanation.logit)
    colours = [MIDDLE] * (len(names) - 1) + [DARK]
    axis.barh(names, values, 0.72, left=starts, color=colours)
    ends = np.concatenate([starts, starts + values])
    room = 0.12 * (np.ptp(ends) or 1.0)
    for row, (start, value) in enumerate(zip(starts, values, strict=True)):
        text = f"{value:.2f}" if row == len(values) - 1 else f"{value:+.2f}"
        axis.text(max(start, start + value) + 0.1 * room, row, text, va="center", fontsize=10)
        if row:
            joint = starts[row] if row < len(values) - 1 else explanation.logit
            axis.plot([joint] * 2, [row - 1.36, row + 0.36], color="0.4", lw=0.8)
    axis.set_xlim(min(0.0, ends.min()) - 0.02 * room, ends.max() + room)
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel("contribution to the logit", labelpad=2)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def _token_truth(explanation: Explanation, truth: ClipTruth | None) -> np.ndarray:
    """Bool `[W, F]`: the token belongs to a word that speaks of this frame."""
    if truth is None:
        return np.zeros(explanation.similarity.shape, dtype=bool)
    own = truth.at(explanation.timestamps)
    return np.array([own[word] if word >= 0 else np.zeros_like(own[0]) for word in explanation.words])


def _outline(axis: Axes, cells: np.ndarray, width: float = 1.4) -> None:
    """Draw the border of the cells of an image that are true."""
    padded = np.pad(cells, 1)
    lines = []
    for row, column in np.argwhere(padded[1:] != padded[:-1]):
        lines.append([(column - 1.5, row - 0.5), (column - 0.5, row - 0.5)])
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        lines.append([(column - 0.5, row - 1.5), (column - 0.5, row - 0.5)])
    drawn = LineCollection(lines, colors="white", linewidths=width, capstyle="projecting", clip_on=False)
    drawn.set_path_effects([withStroke(linewidth=2.2 * width, foreground="black")])
    axis.add_collection(drawn, autolim=False)


def _bars(
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


def _bar_of_colours(
    figure: Figure, x: float, y: float, width: float, colours: str, norm: Normalize, label: str
) -> None:
    bar = figure.colorbar(
        ScalarMappable(norm, colours), cax=_place(figure, x, y, width, 0.1), orientation="horizontal"
    )
    bar.outline.set_visible(False)
    bar.set_label(label, labelpad=1, fontsize=10)
    bar.ax.tick_params(labelsize=9, length=2)


def _place(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((x / across, y / up, width / across, height / up))


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    across, up = figure.get_size_inches()
    figure.text(x / across, y / up, text, **{"va": "bottom", "fontsize": 10, **style})


def _show_frame(axis: Axes, frame: np.ndarray) -> None:
    axis.imshow(frame, interpolation="antialiased")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _evenly(clip: Clip, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` frames `[F, H, W, 3]` of a clip and their times."""
    chosen = np.unique(np.linspace(0, len(clip.pixels) - 1, min(most, len(clip.pixels))).round().astype(int))
    return clip.pixels[chosen].permute(0, 2, 3, 1).numpy(), clip.timestamps[chosen].numpy()
