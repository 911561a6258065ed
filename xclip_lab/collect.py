"""What a run leaves when it ends, and all runs of a folder as one table."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from xclip_lab import study
from xclip_lab.atomic import write_text
from xclip_lab.checkpoint import load_model
from xclip_lab.config import RunConfig
from xclip_lab.distributed import resolve_device
from xclip_lab.errors import AbsentError, UserError
from xclip_lab.evaluation import evaluate
from xclip_lab.history import read_history
from xclip_lab.result import Result
from xclip_lab.runs import RunSummary, has_result, list_runs, read_json
from xclip_lab.train import FitResult

COST = "cost.json"
ALWAYS = (
    "preset",
    "seed",
    "towers.name",
    "towers.pretrained",
    "temporal.agg_module",
    "head.name",
    "data.dataset",
    "data.protocol",
    "data.features",
    "train.epochs",
    "train.batch_size",
)
"""Settings that the table of `collect` has whether or not they differ."""
_COSTS = ("seconds", "peak_memory_mib", "peak_gpu_memory_mib")
_MIB = 2.0**20


def record(fitted: FitResult, config: RunConfig) -> Result | None:
    """Evaluate a finished training on its test split; the result and `cost.json` go into the run's folder.

    `cost.json` has the `seconds` of training and, of the process that ended it, the peak memory in MiB, on
    the GPU too.

    Returns:
        None, with a line that says so, where the test split is not there.
    """
    try:
        test = study.open_split(config, config.data.test_split)
    except AbsentError as error:
        print(f"not evaluated: {error}")
        return None
    device = resolve_device(config.train.device)
    result = evaluate(load_model(fitted.checkpoint).to(device), test, config)
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    cost = {
        "seconds": fitted.seconds,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB,
        "peak_gpu_memory_mib": torch.cuda.max_memory_allocated() / _MIB if device.type == "cuda" else None,
    }
    write_text(fitted.run_dir / COST, json.dumps(cost, indent=2) + "\n")
    result.save(fitted.run_dir)
    return result


def collect(root: str | Path = "runs") -> pd.DataFrame:
    """Every run that `list_runs` finds, a row each; `to_csv` keeps it.

    Returns:
        Columns `run`, `state` in words (also of a run that failed or is damaged); the settings that differ
        between the runs, and those of `ALWAYS`; `t2v/R@1` and so on with `t2v/R@1 low` and `high` (95%), from
        the run's own result or its evaluation on its test split; `seconds` of training,
        `peak_memory_mib`, `peak_gpu_memory_mib`; the result's stamp as `stamp/...`. What is not known is
        missing (NaN or None).

    Raises:
        RunError: no such folder.
    """
    rows = [_row(Path(root, run.name), run) for run in list_runs(root)]
    keys = dict.fromkeys(key for row in rows for key in row)
    table = pd.DataFrame(rows, columns=sorted(keys, key=_place))
    settings = [key for key in table if key.startswith("config/")]
    dull = [key for key in settings if key.removeprefix("config/") not in ALWAYS and _same(table[key])]
    names = {key: key.removeprefix("config/") for key in settings}
    return table.drop(columns=dull).rename(columns=names)


def _place(key: str) -> int:
    """Where a column stands: name and state, settings, metrics, costs, stamp."""
    starts = (("run", "state"), ("config/",), ("t2v/", "v2t/"), _COSTS, ("stamp/",))
    return next(place for place, start in enumerate(starts) if key.startswith(start))


def _same(column: pd.Series) -> bool:
    return column.map(repr).nunique() <= 1


def _row(folder: Path, run: RunSummary) -> dict[str, Any]:
    try:
        settings = dict(_flat(yaml.safe_load((folder / "config.yaml").read_text())))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError):
        settings = {}
    row = {"run": run.name, "state": run.state} | {f"config/{key}": settings.get(key) for key in ALWAYS}
    row |= {f"config/{key}": value for key, value in settings.items()}
    split = settings.get("data.test_split", "test")
    places = [place for place in (folder, folder / "evaluation" / split) if has_result(place)]
    try:
        return row | (_result(places[0]) if places else {}) | _cost(folder)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return row | {"state": f"{run.state}; the result in {places[0]} is damaged"}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves by their dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _result(place: Path) -> dict[str, Any]:
    metrics = json.loads((place / "metrics.json").read_text())
    row = {f"{side}/{name}": float(value) for side, of in metrics.items() for name, value in of.items()}
    for side, of in read_json(place / "intervals.json").items():
        for name, (low, high) in of.items():
            row |= {f"{side}/{name} low": low, f"{side}/{name} high": high}
    return row | {f"stamp/{key}": value for key, value in _flat(read_json(place / "stamp.json"))}


def _cost(folder: Path) -> dict[str, Any]:
    """`cost.json`; of a run that was not evaluated by `record`, the time alone."""
    cost = read_json(folder / COST)
    with suppress(UserError, IndexError):
        cost.setdefault("seconds", read_history(folder)[-1]["seconds"])
    return {key: cost.get(key) for key in _COSTS}
