"""Figures that put methods beside each other. They take the table of `compare.table`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from xclip_lab.drawing import DARK, MIDDLE, WEIGHT_MAP, styled

_MARKERS = "osD^vPX<>hd8"


@styled
def level_recalls(table: pd.DataFrame) -> Figure | None:
    """R@1 of each method on each level, as a table in shades; below each mean the range over seeds."""
    if table.empty:
        return None
    shape = {"index": "method", "columns": "level"}
    methods, levels = table["method"].unique(), table["level"].unique()
    mean, low, high = (
        table.pivot(values=name, **shape).loc[methods, levels].to_numpy()
        for name in ("R@1", "seed_min", "seed_max")
    )
    size = (2.4 + 1.15 * len(levels), 1.0 + 0.5 * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(mean, cmap=WEIGHT_MAP, vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(mean):
        colour = "white" if value < 50 else "black"
        axis.text(column, row - 0.14, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=11)
        spread = f"{low[row, column]:.0f} to {high[row, column]:.0f}"
        axis.text(column, row + 0.26, spread, ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(levels)), [str(level) for level in levels])
    axis.set_yticks(range(len(methods)), [str(method) for method in methods])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("Text-to-video R@1 (%): mean, and range over seeds", loc="left")
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    return figure


@styled
def recall_against_cost(table: pd.DataFrame) -> Figure | None:
    """R@1 over the multiply-accumulates of scoring 1,000 texts against 1,000 videos (GLSCL's figure 1).

    Bars: 95% intervals over the clips.
    """
    if table.empty:
        return None
    rows = table[table["level"] == "all"].sort_values("gmac").reset_index(drop=True)
    figure = Figure(figsize=(7.0, 5.2), layout="constrained")
    axis = figure.subplots()
    for number, row in rows.iterrows():
        marker = _MARKERS[int(number) % len(_MARKERS)]
        error = [[row["R@1"] - row["low"]], [row["high"] - row["R@1"]]]
        axis.errorbar(
            row["gmac"],
            row["R@1"],
            np.nan_to_num(error).clip(min=0),
            fmt=marker,
            color=DARK,
            ecolor=MIDDLE,
            markersize=9,
            markeredgecolor="white",
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
