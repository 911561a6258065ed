"""Figures that put models beside each other. They take the tables of `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from xclip_lab import compare
from xclip_lab.clips import ClipDataset
from xclip_lab.drawing import DARK, LIGHT, MIDDLE, WEIGHT_MAP, draw_table, styled
from xclip_lab.paired import LEVEL
from xclip_lab.plots import film_strips, quote
from xclip_lab.result import Result
from xclip_lab.study import read_clip

_MARKERS = "osD^vPX<>hd8"
_FOREST = 10  # differences at most: more of them are easier to read as a matrix


@styled
def level_recalls(table: pd.DataFrame) -> Figure | None:
    """R@1 of each method on each level, as a table in shades; their range over seeds below."""
    if table.empty:
        return None
    several = bool(table["seeds"].max() > 1)
    shape = {"index": "method", "columns": "level"}
    methods, levels = table["method"].unique(), table["level"].unique()
    mean, low, high = (
        table.pivot(values=name, **shape).loc[methods, levels].to_numpy()
        for name in ("R@1", "seed_min", "seed_max")
    )
    size = (2.4 + 1.15 * len(levels), 1.0 + 0.5 * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    texts = np.vectorize("{:.1f}\n{:.0f} to {:.0f}".format if several else "{:.1f}".format)
    bar = {"fraction": 0.05, "pad": 0.02}
    look: dict[str, Any] = {"cmap": WEIGHT_MAP, "vmin": 0, "vmax": 100, "cbar_kws": bar}
    draw_table(axis, mean, texts(mean, low, high), methods, levels, **look)
    spread = ": mean, and range over seeds" if several else ""
    axis.set_title(f"Text-to-video R@1 (%){spread}", loc="left")
    return figure


@styled
def recall_against_cost(table: pd.DataFrame) -> Figure | None:
    """R@1 over the multiply-accumulates of scoring 1,000 texts against 1,000 videos (GLSCL's figure 1).

    Bars: 95% intervals over the clips. None where nothing is known of the cost.
    """
    rows = table if table.empty else table[(table["level"] == "all") & table["gmac"].notna()]
    if rows.empty:
        return None
    rows = rows.sort_values("gmac").reset_index(drop=True)
    figure = Figure(figsize=(7.0, 5.2), layout="constrained")
    axis = figure.subplots()
    for number, row in rows.iterrows():
        again, marker = divmod(int(number), len(_MARKERS))
        face, edge = ("white", DARK) if again else (DARK, "white")
        error = [[row["R@1"] - row["low"]], [row["high"] - row["R@1"]]]
        axis.errorbar(
            row["gmac"],
            row["R@1"],
            np.nan_to_num(error).clip(min=0),
            fmt=_MARKERS[marker],
            color=face,
            ecolor=MIDDLE,
            markersize=9,
            markeredgecolor=edge,
            elinewidth=1,
            capsize=2,
            label=f"{row['method']}  ({row['R@1']:.1f}%, {row['gmac']:,.{_digits(row['gmac'])}f} GMAC)",
        )
    axis.set_xscale("log")
    axis.set(xlabel="scoring 1,000 texts with 1,000 videos (GMAC after the towers)", ylim=(-2, None))
    axis.set_ylabel("text-to-video R@1 (%)")
    axis.grid()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _digits(value: float) -> int:
    """Decimals that leave two or three figures."""
    return 0 if value >= 100 else 1 if value >= 10 else 2


@styled
def differences(tests: pd.DataFrame) -> Figure:
    """Every difference of `compare.pairwise`: of few pairs with its interval, of many as a matrix.

    Filled: shown, p < 0.05 after Holm's correction for all pairs.
    """
    return _forest(tests) if len(tests) <= _FOREST else _matrix(tests)


def _forest(tests: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7.6, 1.4 + 0.42 * len(tests)), layout="constrained")
    axis = figure.subplots()
    for shown, face, label in ((True, DARK, f"p < {LEVEL} after Holm"), (False, "white", "not shown")):
        places = np.flatnonzero((tests["p_holm"] < LEVEL) == shown)
        rows = tests.iloc[places]
        error = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
        look: dict[str, Any] = {"color": DARK, "markerfacecolor": face, "markersize": 8, "elinewidth": 1.5}
        axis.errorbar(
            rows["difference"], places, xerr=np.clip(error, 0, None), fmt="o", label=label, capsize=3, **look
        )
    axis.axvline(0, color="black", lw=1)
    pairs = list(zip(tests["a"], tests["b"], strict=True))
    names = [f"{a} \u2212" + (" " if len(a + b) < 30 else "\n") + b for a, b in pairs]
    axis.set_yticks(range(len(tests)), names, parse_math=False)
    axis.set_ylim(len(tests) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    for place, p in enumerate(map(compare.p_text, tests["p_holm"])):
        told = f"p {p}" if p[0] == "<" else f"p = {p}"
        axis.text(1.02, place, told, va="center", fontsize=10, transform=axis.get_yaxis_transform())
    axis.set_xlabel("difference in text-to-video R@1 (points), 95% interval")
    axis.grid(axis="x")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _matrix(tests: pd.DataFrame) -> Figure:
    recalls = dict(zip(tests["a"], tests["R@1 a"], strict=True)) | dict(
        zip(tests["b"], tests["R@1 b"], strict=True)
    )
    names = sorted(recalls, key=recalls.__getitem__, reverse=True)
    size = len(names)
    values, shown = np.full((size, size), np.nan), np.zeros((size, size), dtype=bool)
    for row in tests.to_dict("records"):
        a, b = names.index(row["a"]), names.index(row["b"])
        values[a, b], values[b, a] = row["difference"], -row["difference"]
        shown[a, b] = shown[b, a] = row["p_holm"] < LEVEL
    figure = Figure(figsize=(2.6 + 0.72 * size, 1.8 + 0.5 * size), layout="constrained")
    axis = figure.subplots()
    kinds = np.where(shown, np.where(values > 0, 2.0, 1.0), 0.0)
    kinds[np.isnan(values)] = np.nan
    texts = [[f"{round(value, 1) + 0.0:+.1f}" for value in row] for row in values]
    colours = ListedColormap(["white", LIGHT, DARK])
    look: dict[str, Any] = {"cmap": colours, "vmin": 0, "vmax": 2, "cbar": False}
    rows = [f"{name}  ({recalls[name]:.1f}%)" for name in names]
    draw_table(axis, kinds, texts, rows, names, **look, linewidths=1, linecolor="0.88")
    for label in axis.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    title = (
        "Row minus column: text-to-video R@1 (points)\nshaded: p < 0.05 after Holm, dark where the row leads"
    )
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    return figure


def only_one_finds(clips: ClipDataset | None, results: Mapping[str, Result], who: str) -> Figure | None:
    """The caption that one of two models answers and the other misses most: its own video, and the first of
    the other. None without clips, or where there is no such caption.

    Args:
        results: of two, by name. who: the one that answers.
    """
    a, b = results
    table = compare.disagreements(results[a], results[b])
    table = table[table["right"] == ("a" if who == a else "b")]
    if clips is None or table.empty:
        return None
    found, other = table.iloc[0], b if who == a else a
    first = {sample.video_id: index for index, sample in reversed(list(enumerate(clips.dataset.samples)))}
    own, instead = (read_clip(clips, first[found[column]]) for column in ("video", "instead"))
    missed = max(found["rank_a"], found["rank_b"])
    strips = [
        (f"its own video: rank 1 in {who}, rank {missed} in {other}", own),
        (f"what {other} puts first: {quote(instead.caption, 70)}", instead),
    ]
    return film_strips(strips, title=quote(found["caption"]), framed=[True, False])
