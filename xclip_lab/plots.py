"""Figures. Every function returns a Figure and leaves matplotlib's global state alone; `save_figure` writes.

Colours come from viridis and cividis: they can be told apart by colour-blind readers and in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xclip_lab.attention_plots import aosm_figure as aosm_figure
from xclip_lab.attention_plots import pointing_figure as pointing_figure
from xclip_lab.clips import Clip
from xclip_lab.drawing import (
    DARK,
    LIGHT,
    MIDDLE,
    SIMILARITY_MAP,
    axes_at,
    draw_bars,
    draw_outline,
    show_frame,
    styled,
    text_at,
)
from xclip_lab.drawing import quote as quote
from xclip_lab.drawing import save_figure as save_figure
from xclip_lab.result import SIDES, Result

_HEATMAP = 40  # videos


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
    draw_bars(axis, places - 0.2, own, 0.38, (DARK, None), "as filmed", "{:.1f}")
    draw_bars(axis, places + 0.2, other, 0.38, (LIGHT, "///"), "frames shuffled", "{:.1f}")
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
        axis.bar_label(bars, fmt="{:.3g}", fontsize=9, padding=1)
    axis.set_xticks(places, [name.replace("-", "\u2013") for name in names])
    axis.set(xlabel=f"rank of the answer among {len(result.videos)} videos", ylabel="share of queries (%)")
    axis.margins(y=0.12)
    axis.grid(axis="y")
    axis.legend()
    return figure


@styled
def similarity_heatmap(result: Result) -> Figure:
    """Similarity of the first 40 videos with their captions; each caption's own video is outlined."""
    columns = np.arange(min(_HEATMAP, len(result.videos)))
    rows = np.flatnonzero(result.text_to_video < len(columns))
    rows = rows[np.argsort(result.text_to_video[rows], kind="stable")][: 3 * _HEATMAP]
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
        caption = "its own video" if clip.video_id == truth else quote(clip.caption)
        strips.append((f"rank {rank}, score {score:.2f}:  {caption}", clip))
    framed = [clip.video_id == truth for clip in clips]
    return film_strips(strips, title=quote(query), framed=framed)


def _evenly(clip: Clip, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` frames `[F, H, W, 3]` of a clip and their times."""
    chosen = np.unique(np.linspace(0, len(clip.pixels) - 1, min(most, len(clip.pixels))).round().astype(int))
    return clip.pixels[chosen].permute(0, 2, 3, 1).numpy(), clip.timestamps[chosen].numpy()
