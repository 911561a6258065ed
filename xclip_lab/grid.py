"""Grids of an ablation: which settings vary, and the runs that follow from them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from xclip_lab.config import RunConfig, load_config
from xclip_lab.errors import ConfigError
from xclip_lab.preset_files import presets, read_yaml
from xclip_lab.published import ablation
from xclip_lab.ranges import PositiveInt, Seed
from xclip_lab.registry import did_you_mean
from xclip_lab.runs import config_hash, has_result
from xclip_lab.validation import check, merge

_FILE = Path(__file__).parent / "grids.yaml"
_METHOD = ("head.", "temporal.")
"""Settings of what follows the towers: they do not hold for the run that the towers come from."""


class GridError(ConfigError):
    """A grid that does not exist, or a key or value in it that makes no sense."""


@dataclass(frozen=True)
class Towers:
    """Frozen towers for all cells, from one training a seed: `preset` with `overrides`. The cells in the rows
    `also_trained` are there a second time, with towers of their own that train."""

    preset: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    also_trained: Sequence[str] = ()


@dataclass(frozen=True)
class Stated:
    """Where the papers' values lie: `preset`, whose data and towers they were measured with, and `ablation`,
    a table of `published.ablation`, or `models`, a name in `published.yaml` by row."""

    preset: str
    ablation: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A table to be filled. Its rows are all combinations of the axes' values.

    Attributes:
        axes: by name, the values: a list, where the name is a config key such as `head.temperature`, or a
            dict of each value's name and the overrides that make it.
        overrides: for all cells. seeds: of each row. repeats: runs of each row and seed, equal but for what
            the machine does not repeat.
        towers: None where every cell trains its own. published: None where no paper has such a table.
    """

    preset: str
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    name: str = ""
    title: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    repeats: int = 1
    towers: Towers | None = None
    published: Stated | None = None

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """What each row overrides, by its name such as `X-CLIP / meanP`."""
        combinations = itertools.product(*(values.items() for values in self.axes.values()))
        return {
            " / ".join(name for name, _ in chosen): {key: over[key] for _, over in chosen for key in over}
            for chosen in combinations
        }


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        base: the run whose towers it has, frozen. embeds: it is such a run. trains: it has towers of its own
            where the other cells' are frozen. repeat: which of several equal runs, from 1.
    """

    row: str
    preset: str
    overrides: Mapping[str, Any]
    config: RunConfig
    run_dir: Path
    base: Cell | None = None
    embeds: bool = False
    trains: bool = False
    repeat: int = 1

    @property
    def label(self) -> str:
        """What its seeds and repeats have in common."""
        return f"{self.row}, towers trained" if self.trains else self.row

    @property
    def name(self) -> str:
        """For people: its label, seed and repeat."""
        again = f", repeat {self.repeat}" if self.repeat > 1 else ""
        return f"{self.label}, seed {self.config.seed}{again}"

    @property
    def features(self) -> Path:
        """Where what its towers make of the clips lies, if it `embeds`."""
        return self.run_dir / "features"

    @property
    def done(self) -> bool:
        """Whether it was trained and evaluated and, where it `embeds`, its features are all there."""
        return has_result(self.run_dir) and (not self.embeds or (self.features / "complete").is_file())


def grid_names() -> list[str]:
    """The grids that come with the package."""
    return list(_tables())


def load_grid(
    source: str | Path | Mapping[str, Any],
    preset: str | None = None,
    seeds: int | Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
    smoke: bool = False,
) -> Grid:
    """A grid by its name, from a YAML file or from a dict with the keys of `Grid`.

    Beside them it may have `of_preset`, with `overrides` and `towers` that hold for its own preset alone.

    Args:
        preset: in place of the grid's. seeds: one or several, in place of the grid's.
        overrides: for all cells, on top.
        smoke: `study.SMOKE` sizes, in place of the overrides of `of_preset`; two rows and one seed.

    Raises:
        GridError: no such grid, an unknown key, nothing that varies, or an override of what varies.
    """
    values, name = _read(source)
    own = values.pop("of_preset", None) or {}
    _refuse(name, "of_preset", own, ("overrides", "towers"))
    for given in (own, values):
        _refuse(name, "overrides", given.get("overrides") or {})
    if preset in (None, values.get("preset")):
        values["towers"] = values.get("towers") or own.get("towers")
        if not smoke:
            values["overrides"] = merge(own.get("overrides") or {}, values.get("overrides") or {})
    if preset is not None:
        values["preset"] = preset
    if seeds is not None:
        values["seeds"] = [seeds] if isinstance(seeds, int | str) else list(seeds)
    grid = replace(_part(Grid, name, {"title": name, **values}), name=name)
    _check(grid, overrides or {})
    return _resized(grid, overrides or {}, smoke)


def cells(grid: Grid, root: str | Path) -> list[Cell]:
    """Every run of a grid; a run's folder is named after its whole config, so none is ever done twice.

    Raises:
        ConfigError: a setting that `load_config` refuses; names the row.
    """
    found = []
    for seed, repeat in itertools.product(grid.seeds, range(1, grid.repeats + 1)):
        base = None if grid.towers is None else _base(grid, grid.towers, seed, root)
        for row, over in grid.rows.items():
            found.append(_cell(grid, row, over, seed, root, base, repeat=repeat))
            if grid.towers is not None and row in grid.towers.also_trained:
                found.append(_cell(grid, row, over, seed, root, None, repeat=repeat, trains=True))
    return found


def _cell(
    grid: Grid, row: str, over: Mapping[str, Any], seed: int, root: str | Path, base: Cell | None, **what: Any
) -> Cell:
    frozen: dict[str, Any] = {}
    if base is not None:
        weights = base.run_dir / "checkpoints" / "best" / "model.safetensors"
        frozen = {"towers.pretrained": str(weights), "data.features": str(base.features)}
    overrides = {**grid.overrides, **over, **frozen}
    return _made(row, grid.preset, overrides, seed, root, base=base, **what)


def _base(grid: Grid, towers: Towers, seed: int, root: str | Path) -> Cell:
    shared = {key: value for key, value in grid.overrides.items() if not key.startswith(_METHOD)}
    overrides = {**shared, **towers.overrides}
    return _made(f"towers of {towers.preset}", towers.preset, overrides, seed, root, embeds=True)


def _made(
    row: str, preset: str, overrides: Mapping[str, Any], seed: int, root: str | Path, **what: Any
) -> Cell:
    try:
        config = load_config(preset, {**overrides, "seed": seed})
    except ConfigError as error:
        raise GridError(f"{row}: {error}") from error
    cell = Cell(row, preset, overrides, config, Path(), **what)
    again = f"_r{cell.repeat}" if cell.repeat > 1 else ""
    name = f"{config.preset}_s{config.seed}_{config_hash(config)}{again}"
    return replace(cell, run_dir=Path(root) / name)


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return dict(source), re.sub(r"[^\w+-]+", "-", str(source.get("title") or "grid"))  # names files too
    if str(source) in _tables():
        return dict(_tables()[str(source)]), str(source)
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        raise GridError(
            f"unknown grid {str(source)!r}{did_you_mean(str(source), _tables())} "
            f"(known: {', '.join(_tables())}; or a YAML file)"
        )
    try:
        content = read_yaml(path)
    except ConfigError as error:
        raise GridError(str(error)) from error
    if not isinstance(content, dict):
        raise GridError(f"{path} does not hold the keys of a grid, such as preset and axes")
    return content, path.stem


_PLAIN: dict[str, Any] = {"preset": str, "title": str, "repeats": PositiveInt, "ablation": str | None}
"""Values that are no mapping and no list."""


def _part(cls: type, where: str, values: Any) -> Any:
    """A `Grid` or a part of one from plain values."""
    named = {entry.name: entry for entry in fields(cls) if entry.name != "name"}
    _refuse(where, "", values, list(named))
    values = {key: value for key, value in values.items() if value is not None}
    for key, entry in named.items():
        if entry.default is entry.default_factory and not values.get(key):
            raise GridError(f"grid {where}: {key} is missing")
    for key, value in values.items():
        place = f"grid {where}: {key}"
        if key in _PLAIN:
            values[key] = check(place, _PLAIN[key], value)
        elif key in ("seeds", "also_trained"):
            if not isinstance(value, list):
                raise GridError(f"{place}: {value!r} is not a list")
            values[key] = [check(place, Seed, one) if key == "seeds" else _label(one) for one in value]
        elif key in ("towers", "published"):
            values[key] = _part(Towers if key == "towers" else Stated, f"{where}, {key}", value)
        elif key == "axes":
            _refuse(where, key, value)
            values[key] = {str(axis): _axis(where, str(axis), choices) for axis, choices in value.items()}
        else:
            _refuse(where, key, value)
    return cls(**values)


def _refuse(where: str, key: str, values: Any, known: Sequence[str] | None = None) -> None:
    """What is no mapping, or has other keys than the known ones."""
    place = f"grid {where}: {key}" if key else f"grid {where}"
    if not isinstance(values, Mapping):
        raise GridError(f"{place}: {values!r} are no keys with values")
    for name in values:
        if known is not None and name not in known:
            guess = did_you_mean(str(name), known)
            raise GridError(f"{place}: unknown key {name!r}{guess} (known: {', '.join(known)})")


def _axis(name: str, axis: str, choices: Any) -> dict[str, dict[str, Any]]:
    """The overrides of each value of an axis, by the value's name."""
    if isinstance(choices, list) and choices:
        return {_label(value): {axis: value} for value in choices}
    if isinstance(choices, Mapping) and choices and all(isinstance(it, Mapping) for it in choices.values()):
        return {str(label): dict(over) for label, over in choices.items()}
    raise GridError(
        f"grid {name}: axis {axis} is neither a list of values of that key nor a dict of names and overrides"
    )


def _label(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _check(grid: Grid, overrides: Mapping[str, Any]) -> None:
    where, varied = f"grid {grid.name}", {"seed": "seeds"}
    for axis, choices in grid.axes.items():
        for key in {key for over in choices.values() for key in over}:
            if key in varied:
                raise GridError(f"{where}: axis {axis} sets {key}, which {varied[key]} sets")
            varied[key] = f"axis {axis}"
    for key in overrides:
        if key in varied:
            raise GridError(f"{key}: it varies in the {where}; leave it out")
    if not grid.seeds or len(set(grid.seeds)) < len(grid.seeds):
        raise GridError(f"{where}: seeds {grid.seeds}: name one or more, each once")
    for row in grid.towers.also_trained if grid.towers else ():
        if row not in grid.rows:
            raise GridError(f"{where}: also_trained: no row {row!r}{did_you_mean(row, grid.rows)}")
    if grid.published and grid.published.preset not in presets():
        guess = did_you_mean(grid.published.preset, presets())
        raise GridError(f"{where}: published: no preset {grid.published.preset!r}{guess}")
    if grid.published and grid.published.ablation:
        ablation(grid.published.ablation)


def _resized(grid: Grid, overrides: Mapping[str, Any], smoke: bool) -> Grid:
    """With the overrides of the call and, for a trial, small."""
    if not smoke:
        return replace(grid, overrides={**grid.overrides, **overrides})
    from xclip_lab.study import SMOKE

    few = {axis: dict(list(choices.items())[:2]) for axis, choices in grid.axes.items()}
    for axis in list(few)[1:]:
        few[axis] = dict(list(few[axis].items())[:1])
    small = replace(grid, axes=few, seeds=grid.seeds[:1], overrides={**SMOKE, **grid.overrides, **overrides})
    if grid.towers is None:
        return small
    kept = [row for row in grid.towers.also_trained if row in small.rows]
    return replace(small, towers=replace(grid.towers, also_trained=kept))


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    content = yaml.safe_load(_FILE.read_text())
    return {name: merge(content["common"], grid) for name, grid in content["grids"].items()}
