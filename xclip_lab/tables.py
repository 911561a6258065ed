"""A paper's table beside our runs of the same grid: values, intervals, and what may be said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xclip_lab.atomic import write_text
from xclip_lab.config import RunConfig, load_config
from xclip_lab.drawing import DARK, MIDDLE, styled
from xclip_lab.grid import Cell, Grid
from xclip_lab.guards import check_comparable
from xclip_lab.preset_files import about
from xclip_lab.published import ablation, published
from xclip_lab.result import SIDES, Result
from xclip_lab.stats import cluster_mean_interval

NOT_PUBLISHED = "not published here"
UNLIKE = ("other data", "frozen towers", "other towers")
"""Why a run cannot judge a published value."""


def table(grid: Grid, cells: Sequence[Cell]) -> pd.DataFrame:
    """A row of the grid a row, R@1 in percent; those of towers that train stand at the end.

    The interval is bootstrapped over videos, hits of all runs of a row together: it says what other captions
    would give. What other trainings would give, the range over the runs hints at.

    Returns:
        Columns `row`; `towers`: frozen, of which training, or trained; `runs` that are done; for `t2v` and
        `v2t` each `published`, `R@1` (the mean over runs), `low`, `high`, `min`, `max`, `verdict`; `note`.
        The verdict: whether the published value lies `inside` our interval or `outside`; `not run`; where
        nothing is published `not published here`; and a published value is not judged by runs on `other
        data`, with `other towers` or with `frozen towers`.

    Raises:
        DatasetError: cells that were evaluated on different clips.
    """
    stated, twins = _stated(grid), _twins(_stated(grid))
    reference = load_config(grid.published.preset) if grid.published else None
    groups: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.trains):
        groups.setdefault(cell.label, []).append(cell)
    loaded = {cell.run_dir: Result.load(cell.run_dir) for cell in cells if cell.done}
    check_comparable({str(folder): result for folder, result in loaded.items()})
    rows = []
    for same in groups.values():
        results = [loaded[cell.run_dir] for cell in same if cell.done]
        unlike = _unlike(same[0].config, reference)
        name = same[0].row
        row: dict[str, Any] = {"row": name, "towers": _towers(grid, same[0]), "runs": len(results)}
        for side in SIDES:
            value = stated.get(name, {}).get(f"{side}/R@1")
            row |= {f"{side} {key}": found for key, found in _side(side, value, results, unlike).items()}
        rows.append(row | {"note": twins.get(name, "")})
    return pd.DataFrame(rows)


def _stated(grid: Grid) -> Mapping[str, Mapping[str, float]]:
    """What is published, by row."""
    if grid.published is None:
        return {}
    if grid.published.ablation:
        return ablation(grid.published.ablation).rows
    where = about(grid.published.preset).published
    numbers = {row: published(where[0], model) for row, model in grid.published.models.items() if where}
    return {
        row: {f"{side}/R@1": of["R@1"] for side, of in found.metrics.items()}
        for row, found in numbers.items()
        if found
    }


def _twins(stated: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Rows whose published values are the same in every column: in one table hardly by chance."""
    return {
        row: f"published with the values of {other}, probably a slip"
        for row, values in stated.items()
        for other in stated
        if other != row and stated[other] == values
    }


def _unlike(config: RunConfig, reference: RunConfig | None) -> str | None:
    """Why a cell cannot judge the published value, None where it can."""
    if reference is None:
        return None
    ours, theirs = ((it.data.dataset, it.data.protocol, it.data.test_split) for it in (config, reference))
    if ours != theirs:
        return UNLIKE[0]
    if config.data.features is not None:
        return UNLIKE[1]
    return None if config.towers.name == reference.towers.name else UNLIKE[2]


def _towers(grid: Grid, cell: Cell) -> str:
    return "trained" if cell.base is None or grid.towers is None else f"frozen, of {grid.towers.preset}"


def _side(
    side: str, stated: float | None, results: Sequence[Result], unlike: str | None
) -> dict[str, float | str]:
    value = np.nan if stated is None else stated
    if not results:
        ours = dict.fromkeys(("R@1", "low", "high", "min", "max"), np.nan)
        return {"published": value, **ours, "verdict": "not run"}
    hits, clusters = zip(*(_hits(result, side) for result in results), strict=True)
    mean, low, high = cluster_mean_interval(np.concatenate(hits), np.concatenate(clusters))
    by_run = [of_run.mean() for of_run in hits]
    judged = "inside" if low <= value <= high else "outside"
    verdict = NOT_PUBLISHED if stated is None else unlike or judged
    ours = {"R@1": mean, "low": low, "high": high, "min": min(by_run), "max": max(by_run)}
    return {"published": value, **ours, "verdict": verdict}


def _hits(result: Result, side: str) -> tuple[np.ndarray, np.ndarray]:
    """100 for each query that finds its own first, else 0; and the cluster of each."""
    entries = result.entries[side]
    columns = result.text_to_video[entries.queries] if side == "t2v" else entries.queries
    return 100.0 * (entries.ranks == 1), result.clusters[columns]


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """The table for people: each side's numbers as text, without `note` where there is none."""
    columns: dict[str, Any] = {"row": found["row"], "towers": found["towers"]}
    for side in SIDES:
        rows = found.to_dict("records")
        columns[f"{side} published"] = [_number(row[f"{side} published"], NOT_PUBLISHED) for row in rows]
        columns[f"{side} R@1, 95%"] = [_with_interval(row, side) for row in rows]
        columns[f"{side} runs"] = [_range(row, side) for row in rows]
        columns[f"{side} verdict"] = found[f"{side} verdict"]
    return pd.DataFrame(columns | ({"note": found["note"]} if found["note"].any() else {}))


def _number(value: float, otherwise: str) -> str:
    return otherwise if np.isnan(value) else f"{value:.1f}"


def _with_interval(row: Mapping[str, Any], side: str) -> str:
    value, low, high = (row[f"{side} {key}"] for key in ("R@1", "low", "high"))
    return "not run" if np.isnan(value) else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _range(row: Mapping[str, Any], side: str) -> str:
    low, high = row[f"{side} min"], row[f"{side} max"]
    return "" if np.isnan(low) else f"{low:.1f} to {high:.1f}" if row["runs"] > 1 else "1 run"


def markdown(grid: Grid, cells: Sequence[Cell], found: pd.DataFrame) -> str:
    """The table as Markdown, with what must be known to read it."""
    text = shown(found)
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    rows = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([f"**{grid.title}**", "", *rows, "", *legend(grid, cells)]) + "\n"


def legend(grid: Grid, cells: Sequence[Cell]) -> list[str]:
    """Which data, which towers, where the published values come from: a line each."""
    data, source = cells[0].config.data, _source(grid)
    again = f", {grid.repeats} runs of each" if grid.repeats > 1 else ""
    lines = [
        f"Ours: {' '.join(filter(None, (data.dataset, data.protocol)))}, split {data.test_split}, "
        f"preset {grid.preset}, seeds {', '.join(map(str, grid.seeds))}{again}; R@1 in percent, "
        "mean over the runs, 95% interval over the videos, then the range over the runs."
    ]
    if grid.towers is not None:
        lines.append(
            f"Frozen towers: frame and word features of one training of {grid.towers.preset} for each seed."
        )
    return lines + source


def _source(grid: Grid) -> list[str]:
    where = about(grid.published.preset).published if grid.published else None
    if grid.published is None or where is None:
        return []
    told = ablation(grid.published.ablation) if grid.published.ablation else None
    source = f" ({told.source})" if told else ""
    note = [told.note] if told and told.note else []
    return [f"Published: on {where[0]}{source}. Runs on other data do not judge it.", *note]


def save(grid: Grid, cells: Sequence[Cell], folder: str | Path) -> pd.DataFrame:
    """The table, written to `<folder>/<grid>.csv` and `.md`."""
    folder, found = Path(folder), table(grid, cells)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{grid.name}.csv", found.to_csv(index=False))
    write_text(folder / f"{grid.name}.md", markdown(grid, cells, found))
    return found


@styled
def figure(grid: Grid, found: pd.DataFrame) -> Figure | None:
    """R@1 of each row in both directions: ours with its interval, each run's range, the published value."""
    if found.empty:
        return None
    drawn = Figure(figsize=(9.5, 1.9 + 0.3 * len(found)), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    trained = (found["towers"] == "trained") & (grid.towers is not None)
    for axis, (side, title) in zip(axes, SIDES.items(), strict=True):
        _draw_side(axis, found, trained, side)
        axis.set(title=title, xlabel="R@1 (%)")
    names = found["row"] + np.where(trained, ", towers trained", "") + np.where(found["note"] != "", " *", "")
    axes[0].set_yticks(range(len(found)), names.tolist())
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    if found["note"].any():
        axes[0].plot([], [], " ", label="* published with the same values")
    drawn.suptitle(grid.title, fontweight="bold")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn


def _draw_side(axis: Axes, found: pd.DataFrame, trained: pd.Series, side: str) -> None:
    places = np.arange(len(found))
    for place in places[::2]:
        axis.axhspan(place - 0.5, place + 0.5, color="0.95", linewidth=0, zorder=0)
    value, low, high = (found[f"{side} {key}"].to_numpy(float) for key in ("R@1", "low", "high"))
    runs = [found[f"{side} {key}"].to_numpy(float) for key in ("min", "max")]
    if (found["runs"] > 1).any():
        axis.hlines(places, *runs, color=MIDDLE, linewidth=7, alpha=0.45, label="range over the runs")
    kinds = ((~trained, "o", "ours, 95% interval"), (trained, "s", "ours, towers trained"))
    for chosen, marker, label in kinds:
        if not np.isfinite(value[chosen]).any():
            continue
        errors = np.stack([value - low, high - value])[:, chosen].clip(min=0)
        look: dict[str, Any] = {
            "fmt": marker,
            "color": DARK,
            "markersize": 6,
            "elinewidth": 1.2,
            "capsize": 2,
        }
        axis.errorbar(value[chosen], places[chosen], xerr=errors, label=label, **look)
    stated = found[f"{side} published"].to_numpy(float)
    if np.isfinite(stated).any():
        other = set(found[f"{side} verdict"]) & set(UNLIKE)
        label = f"published ({', '.join(sorted(other))})" if other else "published"
        axis.plot(stated, places, "D", mfc="white", mec="black", markersize=5.5, label=label)
    axis.grid(axis="x")
