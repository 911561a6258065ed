"""Figures of what `attention_study` measured. They take its table."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from xclip_lab.attention_maps import BASELINES
from xclip_lab.drawing import DARK, LIGHT, MIDDLE, WEIGHT_MAP, draw_table, styled
from xclip_lab.pointing import CONTENT_CLASSES

_MARKERS = "osD^vX"
_SHADES = (DARK, MIDDLE, LIGHT)
_CURVES = 6
MEASURES = {
    "pointing": "points at\nown frame",
    "mass": "mass on\nown frames",
    "precision_recall": "precision-recall\narea",
    "insertion": "insertion\n(logit kept)",
    "deletion": "deletion\n(logit lost)",
    "padding": "share on\npadding",
    "stability": "agreement with\nfirst model",
}
"""Measures of `attention_study` as the figures call them, from 0 (stability: -1) to 1."""
_OF_CLASSES = {"pointing": "points at an own frame", "precision_recall": "precision-recall area"}


@styled
def measures_figure(table: pd.DataFrame) -> Figure:
    """Every map of every model on every measure, with 95% intervals; dotted, in its own panel, what the
    uniform map of the first model scores: chance.

    Args:
        table: of `attention_study`.
    """
    table = table[table["word_class"].isin(["content", "all"])]
    table = table[table["measure"].isin(MEASURES)]
    measures = [name for name in MEASURES if name in set(table["measure"])]
    maps = [name for name in table["map"].unique() if name not in BASELINES]
    maps += [name for name in BASELINES if name in set(table["map"])]
    models = list(table["model"].unique())
    size = (2.3 + 1.45 * len(measures), 1.5 + (0.16 + 0.11 * len(models)) * len(maps))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, measure in zip(panels, measures, strict=True):
        found = table[table["measure"] == measure]
        chance = found[(found["map"] == "uniform") & (found["model"] == models[0])]["value"]
        for level in chance:
            axis.axvline(level, color="black", ls=":", lw=1.2)
        for number, model in enumerate(models):
            rows = found[found["model"] == model]
            places = [maps.index(name) for name in rows["map"]]
            shift = 0.7 * ((number + 0.5) / len(models) - 0.5)
            errors = np.nan_to_num(np.array([rows["value"] - rows["low"], rows["high"] - rows["value"]]))
            axis.errorbar(
                rows["value"],
                np.array(places) + shift,
                xerr=errors.clip(min=0),
                fmt=_MARKERS[number % len(_MARKERS)],
                color=_SHADES[number % len(_SHADES)],
                markeredgecolor="black",
                markeredgewidth=0.5,
                markersize=5,
                elinewidth=1,
                ecolor="0.35",
                label=model,
            )
        for place in set(range(len(maps))) - {maps.index(name) for name in found["map"]}:
            axis.text(0.8, place, "n/a", color="0.5", ha="center", va="center", fontsize=9)
        axis.set(
            xlim=(-1.1 if measure == "stability" else -0.05, 1.1 if measure == "stability" else 1.05),
            xlabel=MEASURES[measure],
        )
        for edge in range(1, len(maps)):
            axis.axhline(edge - 0.5, color="0.88", lw=0.8, zorder=0)
    panels[0].set_yticks(range(len(maps)), maps)
    panels[0].set_ylim(len(maps) - 0.5, -0.5)
    handles = {
        label: handle
        for axis in panels
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(3, len(models)))
    return figure


@styled
def classes_figure(table: pd.DataFrame, model: str) -> Figure | None:
    """How well each map does for each class of words: whether it points at an own frame, and the area under
    its precision-recall curve; without truth no figure.

    Args:
        table: of `attention_study`. model: one of its models.
    """
    rows = table[(table["model"] == model) & table["measure"].isin(_OF_CLASSES)]
    if rows.empty:
        return None
    classes = [name for name in (*CONTENT_CLASSES, "order", "function") if name in set(rows["word_class"])]
    maps = rows["map"].unique()
    size = (2.6 + 1.5 * len(classes), 1.3 + 0.32 * len(maps))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, (measure, title) in zip(panels, _OF_CLASSES.items(), strict=True):
        grid = rows[rows["measure"] == measure].pivot(index="map", columns="word_class", values="value")
        grid = grid.reindex(index=maps, columns=classes)
        texts = np.vectorize("{:.2f}".format)(grid)
        draw_table(axis, grid, texts, maps, classes, cmap=WEIGHT_MAP, vmin=0, vmax=1, cbar=False)
        axis.set(xlabel="class of the word", title=title)
    return figure


@styled
def removal_figure(table: pd.DataFrame, model: str) -> Figure:
    """How the logit falls as frames are taken away, the most attended first (deletion) or last (insertion).

    Args:
        table: of `attention_study`. model: one of its models. Drawn are the maps that find what the logit
            hangs on best, and the uniform map, a random order.
    """
    rows = table[table["model"] == model]
    best = rows[(rows["measure"] == "deletion") & (rows["map"] != "uniform")].sort_values("value")["map"]
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("deletion: most attended go first", "insertion: most attended stay longest")
    for axis, kind, title in zip(panels, ("deletion", "insertion"), titles, strict=True):
        for number, name in enumerate([*best[::-1][:_CURVES], "uniform"]):
            curve = rows[(rows["measure"] == f"{kind}_curve") & (rows["map"] == name)].sort_values("removed")
            look = {"color": "black", "ls": ":", "lw": 2, "label": "random order"}
            if name != "uniform":
                look = {"color": _SHADES[number % 3], "ls": ("-", "--")[number // 3 % 2], "label": name}
                look |= {"marker": _MARKERS[number % 6], "markersize": 5, "markeredgecolor": "black"}
                look |= {"markeredgewidth": 0.4}
            axis.plot(curve["removed"], curve["value"], **look)
        axis.set(xlabel="frames removed", title=title)
        axis.grid()
    panels[0].set_ylabel("logit less the whole clip's")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure
