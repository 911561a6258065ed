"""Figures of attention: one logit taken apart, the maps of a pair, where words point."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xclip_lab.attention import Explanation
from xclip_lab.attention_maps import Pair
from xclip_lab.clips import Clip
from xclip_lab.drawing import (
    DARK,
    LIGHT,
    MIDDLE,
    SIMILARITY_MAP,
    WEIGHT_MAP,
    axes_at,
    draw_bars,
    draw_outline,
    quote,
    show_frame,
    styled,
    text_at,
)
from xclip_lab.pointing import CONTENT_CLASSES, Pointing
from xclip_lab.stats import cluster_mean_interval
from xclip_lab.synthetic import ClipTruth
from xclip_lab.text import token_texts

_ROW = 0.24  # inches a word


def panel_width(frames: int) -> float:
    """Inches for as many frames side by side: pictures that can be made out, up to what a page holds."""
    return min(max(3.0, 0.36 * frames), 5.5)


@styled
def pointing_figure(scores: Mapping[str, Pointing]) -> Figure | None:
    """Attention mass on a word's own frames, by the word's class, beside what a uniform map would put there.

    Args:
        scores: as `study.pointing_study` gives them. Without any there is no figure.
    """
    if not scores:
        return None
    classes = ["all", *CONTENT_CLASSES]
    figure = Figure(figsize=(8.8, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(scores)
    looks = [(DARK, None), (DARK, "xxx"), (MIDDLE, "..."), (LIGHT, "///")]
    for number, (name, pointing) in enumerate(scores.items()):
        words = pointing.words
        groups = [words if kind == "all" else words[words["word_class"] == kind] for kind in classes]
        found = np.array([cluster_mean_interval(group["inside"], group["cluster"]) for group in groups])
        places = np.arange(len(classes)) - 0.4 + width * (number + 0.5)
        draw_bars(axis, places, found, 0.92 * width, looks[number % len(looks)], name, "{:.2f}")
    # What a uniform map puts there depends on the truth only, and a shuffled truth has as many frames.
    for place, group in enumerate(groups):
        label = None if place else "uniform map"
        level = [group["uniform"].mean()] * 2
        axis.plot([place - 0.44, place + 0.44], level, color="black", ls=":", lw=1.8, label=label)
    axis.set_xticks(range(len(classes)), ["all content words", *(f"{kind} words" for kind in classes[1:])])
    axis.set(ylabel="attention on the word's frames", ylim=(0, 1.08))
    axis.grid(axis="y")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=5)
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
    panel, bars, tall, below = panel_width(frames), 0.62, _ROW * words, 3.3
    side = panel / frames
    left = (1.2, 1.2 + panel + 0.22, 1.2 + 2 * panel + bars + 1.1)
    bottom = below + tall
    heading = textwrap.fill(quote(explanation.caption, 240), int((left[2] + panel) / 0.1))
    figure = Figure(figsize=(left[2] + panel, bottom + side + 0.6 + 0.21 * len(heading.splitlines())))
    own = _token_truth(explanation.words, explanation.timestamps, truth)

    unit = Normalize(0, max(explanation.over_frames.max(), explanation.over_words.max()))
    span = Normalize(explanation.similarity.min(), explanation.similarity.max())
    maps = (
        ("(a) word-frame similarity", explanation.similarity, SIMILARITY_MAP, span),
        ("(b) stage 1, over frames", explanation.over_frames, WEIGHT_MAP, unit),
        ("(c) stage 1, over words", explanation.over_words, WEIGHT_MAP, unit),
    )
    for start, (title, values, colours, norm) in zip(left, maps, strict=True):
        _film(figure, start, bottom + 0.04, side, explanation.pixels)
        text_at(figure, start, bottom + side + 0.1, title, weight="bold", fontsize=11)
        axis = axes_at(figure, start, below, panel, tall)
        _matrix(axis, values, colours, norm, own)
        axis.set_yticks(
            range(words), explanation.tokens if start == left[0] else [""] * words, parse_math=False
        )
        if start != left[2]:
            _time_axis(axis, explanation.timestamps, side)
    _bar_of_colours(figure, left[0], below - 0.65, panel, SIMILARITY_MAP, span, "similarity")
    _bar_of_colours(figure, left[1], below - 0.65, panel, WEIGHT_MAP, unit, "weight, in (b) and (c)")

    most = math.ceil(10 * max(explanation.word_weights.max(), explanation.frame_weights.max())) / 10
    rows = axes_at(figure, left[1] + panel + 0.06, below, bars, tall)
    rows.barh(range(words), explanation.word_weights, 0.8, color=DARK)
    rows.set(ylim=(words - 0.5, -0.5), yticks=[], xlim=(0, most))
    rows.set_xticks([most], [f"{most:g}"])
    rows.set_title("stage 2", fontsize=11, fontweight="normal")
    columns = axes_at(figure, left[2], below - 0.06 - bars, panel, bars)
    columns.bar(range(frames), explanation.frame_weights, 0.8, color=DARK)
    columns.set(xlim=(-0.5, frames - 0.5), ylim=(most, 0), ylabel="stage 2")
    columns.set_yticks([0, most], ["0", f"{most:g}"])
    _time_axis(columns, explanation.timestamps, side)
    for axis in (rows, columns):
        axis.spines[["top", "right", "bottom", "left"]].set_visible(True)
        axis.spines[:].set(color="0.7")

    text_at(figure, left[0], 1.75, "(d) the contrasts add up to the logit", weight="bold", fontsize=11)
    _waterfall(axes_at(figure, left[0], 0.45, 2 * panel + 0.22, 1.25), explanation)
    if own.any():
        _truth_key(figure, left[2], 0.95)
    text_at(figure, left[0], bottom + side + 0.42, heading, fontsize=12)
    return figure


@styled
def maps_figure(pair: Pair, clip: Clip, truth: ClipTruth | None = None) -> Figure:
    """Every map of a caption with its clip, whatever the model: maps over words and frames as matrices, those
    over frames as rows below the first one, those over words as columns to the right.

    Each map is drawn from its least to its largest value; their heights do not compare. Padding is left out.

    Args:
        truth: of a generated clip; the frames that a word speaks of are outlined.
    """
    of_kind = {
        axes: [name for name, found in pair.seen.maps.items() if found.axes == axes and name != "uniform"]
        for axes in ("words x frames", "frames", "words")
    }
    matrices, frames, words = of_kind["words x frames"], of_kind["frames"], of_kind["words"]
    panel, tall, strip = panel_width(pair.frames), _ROW * pair.tokens, 0.22
    side, below, edge = panel / pair.frames, 1.1 + strip * len(frames), 2.0
    right = edge + len(matrices) * (panel + 0.2)
    heading = textwrap.fill(quote(pair.caption, 240), int((right - edge) / 0.1))
    size = (
        right + 0.3 + strip * len(words),
        below + tall + max(side + 0.45 + 0.21 * len(heading.splitlines()), 2.2),
    )
    figure = Figure(figsize=size)
    ids = pair.seen.batch.token_ids[pair.row].tolist()
    own = _token_truth(pair.words[: pair.tokens].tolist(), pair.timestamps, truth)
    pixels = clip.pixels.permute(0, 2, 3, 1).numpy()
    for number, name in enumerate(matrices):
        start = edge + number * (panel + 0.2)
        _film(figure, start, below + tall + 0.04, side, pixels)
        text_at(figure, start, below + tall + side + 0.1, name, weight="bold", fontsize=11)
        axis = axes_at(figure, start, below, panel, tall)
        _matrix(axis, pair.values(name)[: pair.tokens, : pair.frames], WEIGHT_MAP, None, own)
        axis.set_yticks(range(pair.tokens), [""] * pair.tokens)
        axis.set_xticks([])
        if not number:
            axis.set_yticks(range(pair.tokens), token_texts(ids)[: pair.tokens], parse_math=False)
        if number or not frames:
            _time_axis(axis, pair.timestamps, side)
    for number, name in enumerate(frames):
        axis = axes_at(figure, edge, below - 0.05 - strip * (number + 1), panel, 0.9 * strip)
        _matrix(axis, pair.values(name)[:1, : pair.frames], WEIGHT_MAP, None, np.zeros((1, 1), bool))
        axis.set_yticks([0], [name])
        axis.set_xticks([])
        if number == len(frames) - 1:
            _time_axis(axis, pair.timestamps, side)
    for number, name in enumerate(words):
        axis = axes_at(figure, right + 0.05 + strip * number, below, 0.9 * strip, tall)
        _matrix(axis, pair.values(name)[: pair.tokens, :1], WEIGHT_MAP, None, np.zeros((1, 1), bool))
        axis.set(xticks=[], yticks=[])
        axis.text(0, -0.7, name, rotation=90, fontsize=10, va="bottom", ha="center")
    _bar_of_colours(
        figure, edge, 0.42, min(panel, 3), WEIGHT_MAP, Normalize(0, 1), "of each map, least to most"
    )
    if own.any():
        _truth_key(figure, edge + min(panel, 3) + 0.3, 0.36)
    text_at(figure, edge, below + tall + side + 0.42, heading, fontsize=12)
    return figure


@styled
def patch_figure(clip: Clip, patches: np.ndarray) -> Figure:
    """Where the image tower's class token looks: each frame beside itself under that light.

    Args:
        patches: `[F, P, P]` of the real frames (`attention_maps.patch_attention`).
    """
    frames = clip.pixels.permute(0, 2, 3, 1).numpy()
    panel = 1.6 * panel_width(len(frames))
    side = panel / len(frames)
    figure = Figure(figsize=(panel, 2 * side + 0.85))
    _film(figure, 0, side + 0.75, side, frames)
    norm = Normalize(0, float(patches.max()))
    for column, (frame, weights) in enumerate(zip(frames, patches, strict=True)):
        axis = axes_at(figure, column * side, 0.72, 0.96 * side, 0.96 * side)
        show_frame(axis, frame.mean(-1).repeat(3).reshape(frame.shape).astype(np.uint8))
        extent = (-0.5, frame.shape[1] - 0.5, frame.shape[0] - 0.5, -0.5)
        axis.imshow(weights, cmap=WEIGHT_MAP, norm=norm, extent=extent, alpha=0.65, interpolation="nearest")
        axis.set_xlabel(f"{clip.timestamps[column]:.1f} s", fontsize=9, labelpad=2)
    _bar_of_colours(figure, 0, 0.36, min(panel, 3), WEIGHT_MAP, norm, "weight of a patch")
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
        text = text.replace("-", "\u2212")
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


def _film(figure: Figure, x: float, y: float, side: float, pixels: np.ndarray) -> None:
    """Frames side by side, each as wide as a column of the matrix below it."""
    for column, frame in enumerate(pixels):
        show_frame(axes_at(figure, x + column * side, y, 0.96 * side, 0.96 * side), frame)


def _matrix(axis: Axes, values: np.ndarray, colours: str, norm: Normalize | None, own: np.ndarray) -> None:
    axis.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="none")
    axis.set_xticks([])
    axis.tick_params(length=0, labelsize=11)
    axis.spines[:].set_visible(False)
    draw_outline(axis, own)


def _time_axis(axis: Axes, times: np.ndarray, side: float) -> None:
    """Seconds below the columns, as many as have room."""
    labels = [f"{time:.1f}" for time in times]
    step = math.ceil((max(map(len, labels)) + 1) * 0.085 / side)
    axis.set_xticks(range(0, len(labels), step), labels[::step])
    axis.tick_params(axis="x", length=0 if step == 1 else 2, labelsize=10)
    axis.set_xlabel("time (s)", labelpad=1, fontsize=11)


def _truth_key(figure: Figure, x: float, y: float) -> None:
    key = axes_at(figure, x, y, 0.6, _ROW)
    key.imshow(np.full((1, 2), 0.35), cmap=WEIGHT_MAP, vmin=0, vmax=1, aspect="auto")
    key.set_axis_off()
    draw_outline(key, np.ones((1, 2), dtype=bool))
    text_at(figure, x + 0.7, y + _ROW / 2, "frames that the word\nspeaks of (the truth)", va="center")


def _token_truth(words: Sequence[int], times: np.ndarray, truth: ClipTruth | None) -> np.ndarray:
    """Bool `[W, F]`: the token belongs to a word that speaks of this frame."""
    if truth is None:
        return np.zeros((len(words), len(times)), dtype=bool)
    own = truth.at(times)
    return np.array([own[word] if word >= 0 else np.zeros_like(own[0]) for word in words])


def _bar_of_colours(
    figure: Figure, x: float, y: float, width: float, colours: str, norm: Normalize, label: str
) -> None:
    bar = figure.colorbar(
        ScalarMappable(norm, colours), cax=axes_at(figure, x, y, width, 0.1), orientation="horizontal"
    )
    bar.outline.set_visible(False)
    bar.set_label(label, labelpad=1, fontsize=10)
    bar.ax.tick_params(labelsize=9, length=2)
    bar.locator = MaxNLocator(4)  # more would run into those of the bar beside
    bar.update_ticks()
