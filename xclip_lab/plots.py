"""Figures. Every function returns a Figure and leaves matplotlib's global state alone; `save_figure` writes.

Colours come from viridis and cividis: they can be told apart by colour-blind readers and in grey.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xclip_lab.attention import Explanation
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
    show_frame,
    styled,
    text_at,
)
from xclip_lab.drawing import save_figure as save_figure
from xclip_lab.pointing import CONTENT_CLASSES, Pointing
from xclip_lab.result import SIDES, Result
from xclip_lab.stats import cluster_mean_interval
from xclip_lab.synthetic import ClipTruth


@styled
def training_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss with its moving mean, learning rate and, where the run was validated, R@1.

    Args:
        history: rows of `history.jsonl`.
    """
    window = 5  # records
    rows = pd.DataFrame(list(history)).set_index("step")
    validated = "val/t2v/R@1" in rows
    heights = [3, 1.5, 1.2] if validated else [3, 1.2]
    figure = Figure(figsize=(6.4, 1.1 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    axes[0].plot(rows.index, rows["loss"], ".", color=MIDDLE, markersize=4, label="batch")
    mean = rows["loss"].rolling(window, min_periods=1, center=True).mean()
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
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].ticklabel_format(axis="y", scilimits=(-2, 2), useMathText=True)
    for axis in axes:
        axis.grid(axis="y")
        axis.set_ylim(bottom=0)
    return figure


@styled
def recall_bars(table: pd.DataFrame, chance: float) -> Figure:
    """R@1 of groups of captions beside that with frames shuffled; 95% intervals and the line of guessing.

    Args:
        table: as `study.level_table` gives it. chance: R@1 of guessing, percent.
    """
    figure = Figure(figsize=(max(4.2, 1.6 + 1.25 * len(table)), 3.6), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(table))
    own = table[["R@1", "low", "high"]].to_numpy()
    other = table[["control", "control_low", "control_high"]].to_numpy()
    draw_bars(axis, places - 0.2, own, 0.38, (DARK, None), "as filmed", "{:.0f}")
    draw_bars(axis, places + 0.2, other, 0.38, (LIGHT, "///"), "frames shuffled", "{:.0f}")
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
    draw_outline(axis, result.text_to_video[rows][:, None] == columns, width=min(0.9, 18 / len(columns)))
    figure.colorbar(image, ax=axis, label="similarity (logit)", pad=0.02)
    axis.set(xlabel=f"video (first {len(columns)} of {len(result.videos)})", ylabel="caption")
    axis.spines[:].set_visible(False)
    return figure


@styled
def film_strips(
    strips: Sequence[tuple[str, Clip]],
    most_frames: int = 8,
    title: str | None = None,
    framed: Sequence[bool] | None = None,
) -> Figure:
    """Clips below each other, each a row of frames with its time in seconds under it.

    Args:
        strips: `(heading, clip)`. most_frames: of a longer clip so many are shown, evenly spaced.
        framed: which strips get a thick frame.
    """
    shown = [_evenly(clip, most_frames) for _, clip in strips]
    columns = max(len(pixels) for pixels, _ in shown)
    side, row, gap = 0.85, 1.4, 0.05  # inches
    height = row * len(strips) + (0.35 if title else 0.0)
    figure = Figure(figsize=(columns * (side + gap), height))
    for number, ((heading, _), (pixels, times)) in enumerate(zip(strips, shown, strict=True)):
        bottom = row * (len(strips) - number - 1) + 0.24
        text_at(figure, 0, bottom + side + 0.05, heading)
        for column, (frame, time) in enumerate(zip(pixels, times, strict=True)):
            axis = axes_at(figure, column * (side + gap), bottom, side, side)
            show_frame(axis, frame)
            axis.set_xlabel(f"{time:.1f} s", fontsize=9, labelpad=4)
        if framed and framed[number]:
            frame_axis = axes_at(figure, -0.025, bottom - 0.025, len(pixels) * (side + gap), side + 0.05)
            frame_axis.set(xticks=[], yticks=[], facecolor="none")
            frame_axis.spines[:].set(visible=True, linewidth=3, color=LIGHT)
    if title:
        text_at(figure, 0, height - 0.28, title, fontsize=11, weight="bold")
    return figure


def retrieved_videos(
    query: str,
    clips: Sequence[Clip],
    ranks: Sequence[int],
    scores: Sequence[float],
    truth: str,
) -> Figure:
    """What a query finds: clips with their ranks and scores.

    Args:
        truth: the id of the query's own video, which is framed.
    """
    strips = []
    for clip, rank, score in zip(clips, ranks, scores, strict=True):
        caption = "its own video" if clip.video_id == truth else _quote(clip.caption)
        strips.append((f"rank {rank}, score {score:.2f}:  {caption}", clip))
    framed = [clip.video_id == truth for clip in clips]
    return film_strips(strips, title=_quote(query), framed=framed)


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
    panel, bars, tall, below = 2.5, 0.62, 0.215 * words, 3.15
    side = panel / frames
    left = (1.15, 1.15 + panel + 0.22, 1.15 + 2 * panel + bars + 0.8)
    bottom = below + tall
    figure = Figure(figsize=(left[2] + panel, bottom + side + 0.75))
    own = _token_truth(explanation, truth)

    unit = Normalize(0, max(explanation.over_frames.max(), explanation.over_words.max()))
    span = Normalize(explanation.similarity.min(), explanation.similarity.max())
    maps = (
        ("(a) word-frame similarity", explanation.similarity, SIMILARITY_MAP, span),
        ("(b) stage 1, over frames", explanation.over_frames, WEIGHT_MAP, unit),
        ("(c) stage 1, over words", explanation.over_words, WEIGHT_MAP, unit),
    )
    for start, (title, values, colours, norm) in zip(left, maps, strict=True):
        for column, frame in enumerate(explanation.pixels):
            show_frame(axes_at(figure, start + column * side, bottom + 0.04, 0.96 * side, 0.96 * side), frame)
        text_at(figure, start, bottom + side + 0.1, title, weight="bold", fontsize=10)
        axis = axes_at(figure, start, below, panel, tall)
        axis.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="none")
        axis.set_xticks(range(frames), [f"{time:.1f}" for time in explanation.timestamps])
        axis.set_yticks(
            range(words), explanation.tokens if start == left[0] else [""] * words, parse_math=False
        )
        axis.tick_params(length=0, labelsize=10 if frames <= 8 else 7)
        axis.spines[:].set_visible(False)
        draw_outline(axis, own)
        axis.set_xlabel("time (s)", labelpad=1, fontsize=10)
    _bar_of_colours(figure, left[0], below - 0.6, panel, SIMILARITY_MAP, span, "similarity")
    _bar_of_colours(figure, left[1], below - 0.6, panel, WEIGHT_MAP, unit, "weight, in (b) and (c)")
    axis.set_xlabel("")
    axis.set_xticklabels([])

    rows = axes_at(figure, left[1] + panel + 0.06, below, bars, tall)
    rows.barh(range(words), explanation.word_weights, 0.8, color=DARK)
    rows.set(ylim=(words - 0.5, -0.5), yticks=[], xlim=(0, 1), xticks=[0, 1])
    rows.set_title("stage 2", fontsize=10, fontweight="normal")
    columns = axes_at(figure, left[2], below - 0.06 - bars, panel, bars)
    columns.bar(range(frames), explanation.frame_weights, 0.8, color=DARK)
    columns.set(xlim=(-0.5, frames - 0.5), ylim=(1, 0), yticks=[0, 1], ylabel="stage 2")
    columns.set_xlabel("time (s)", labelpad=1, fontsize=10)
    columns.yaxis.label.set_fontsize(10)
    columns.set_xticks(range(frames), [f"{time:.1f}" for time in explanation.timestamps])
    columns.tick_params(axis="x", length=0)
    for axis in (rows, columns):
        axis.spines[["top", "right", "bottom", "left"]].set_visible(True)
        axis.spines[:].set(color="0.7")

    text_at(figure, left[0], 1.72, "(d) the four contrasts add up to the logit", weight="bold", fontsize=10)
    _waterfall(axes_at(figure, left[0], 0.45, 2 * panel + 0.22, 1.2), explanation)
    if own.any():
        key = axes_at(figure, left[2], 0.95, 2 * side, 0.215)
        key.imshow(np.full((1, 2), 0.35), cmap=WEIGHT_MAP, vmin=0, vmax=1, aspect="auto")
        key.set_axis_off()
        draw_outline(key, np.ones((1, 2), dtype=bool))
        text_at(
            figure, left[2] + 2 * side + 0.1, 0.98, "frames that the word\nspeaks of (the truth)", va="center"
        )
    text_at(figure, left[0], bottom + side + 0.45, _quote(explanation.caption, 110), fontsize=12)
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


def _quote(caption: str, most: int = 90) -> str:
    return f"\u201c{textwrap.shorten(caption, most, placeholder=' ...')}\u201d"


def _token_truth(explanation: Explanation, truth: ClipTruth | None) -> np.ndarray:
    """Bool `[W, F]`: the token belongs to a word that speaks of this frame."""
    if truth is None:
        return np.zeros(explanation.similarity.shape, dtype=bool)
    own = truth.at(explanation.timestamps)
    return np.array([own[word] if word >= 0 else np.zeros_like(own[0]) for word in explanation.words])


def _bar_of_colours(
    figure: Figure, x: float, y: float, width: float, colours: str, norm: Normalize, label: str
) -> None:
    bar = figure.colorbar(
        ScalarMappable(norm, colours), cax=axes_at(figure, x, y, width, 0.1), orientation="horizontal"
    )
    bar.outline.set_visible(False)
    bar.set_label(label, labelpad=1, fontsize=10)
    bar.ax.tick_params(labelsize=9, length=2)


def _evenly(clip: Clip, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` frames `[F, H, W, 3]` of a clip and their times."""
    chosen = np.unique(np.linspace(0, len(clip.pixels) - 1, min(most, len(clip.pixels))).round().astype(int))
    return clip.pixels[chosen].permute(0, 2, 3, 1).numpy(), clip.timestamps[chosen].numpy()
