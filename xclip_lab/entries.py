"""What is compared: results by name, each of one training or of the seeds of one model."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from xclip_lab import study
from xclip_lab.clips import ClipDataset
from xclip_lab.config import RunConfig, load_config
from xclip_lab.errors import AbsentError, DatasetError
from xclip_lab.grid import Cell
from xclip_lab.guards import check_comparable
from xclip_lab.provenance import dataset_fingerprint
from xclip_lab.registry import did_you_mean
from xclip_lab.result import Result, ResultError
from xclip_lab.runs import RunError, has_result

Folders = str | Sequence[str]
Checkpoints = Sequence[Folders] | Mapping[str, Folders]


@dataclass(frozen=True)
class Entry:
    """What stands under one name.

    Attributes:
        results: of one training, or of several seeds. run_dir, config: of the first one's run, None where the
            result lies outside of a run.
    """

    results: list[Result]
    run_dir: Path | None
    config: RunConfig | None


def open_entries(checkpoints: Checkpoints) -> dict[str, Entry]:
    """Results to compare, by a name each: as given, else of its method, else of its run.

    Args:
        checkpoints: two or more run folders or folders of results, in a list, or by name in a dict. A pattern
            (`runs/x_s*`) or a list of folders stands for the seeds of one model.

    Raises:
        RunError: fewer than two, one named twice, or a pattern that fits nothing. ResultError: a folder
        without a result. DatasetError: results of unlike protocols.
    """
    if len(checkpoints) < 2:
        raise RunError("name two or more runs to compare")
    named = isinstance(checkpoints, Mapping)
    written = list(checkpoints.values() if isinstance(checkpoints, Mapping) else checkpoints)
    found = [_entry(one) for one in written]
    choices = [tuple(checkpoints)] if named else zip(*map(_names, written, found), strict=True)
    names = next((some for some in choices if len(set(some)) == len(found)), None)
    if names is None:
        raise RunError(f"a run is named twice: {', '.join(map(str, written))}")
    entries = dict(zip(map(str, names), found, strict=True))
    check_trainings({name: entry.results for name, entry in entries.items()})
    return entries


def check_trainings(results: Mapping[str, Sequence[Result]]) -> None:
    """Refuse results of unlike protocols or galleries.

    Raises:
        DatasetError: says whose.
    """
    numbered = {
        name if len(side) == 1 else f"{name} (training {number})": result
        for name, side in results.items()
        for number, result in enumerate(side, 1)
    }
    check_comparable(numbered)


def _names(checkpoint: Folders, entry: Entry) -> tuple[str, str, str]:
    """What it may be called: by its method, by its run, and as it was written."""
    written = checkpoint if isinstance(checkpoint, str) else ", ".join(checkpoint)
    if entry.config is None or entry.run_dir is None:
        return (written,) * 3
    return method_name(entry.config), entry.run_dir.name, written


def _entry(checkpoint: Folders) -> Entry:
    folders = sorted(glob.glob(checkpoint)) if isinstance(checkpoint, str) else list(checkpoint)
    if not folders:
        raise RunError(f"no folder {checkpoint}; name a run or a result of `xclip-lab evaluate`")
    first = Path(folders[0]).absolute()
    run_dir = next((path for path in (first, *first.parents[:4]) if (path / "config.yaml").is_file()), None)
    config = load_config(run_dir / "config.yaml") if run_dir else None
    return Entry([_load(Path(folder)) for folder in folders], run_dir, config)


def _load(folder: Path) -> Result:
    """A folder's own result, or that of the run that it is."""
    for found in (folder, folder / "evaluation" / "test"):
        if has_result(found):
            return Result.load(found)
    raise ResultError(f"no result in {folder}; `xclip-lab evaluate {folder}` makes one")


def rows_of(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The run folders of a grid's cells by what they are seeds of, as `open_entries` takes them."""
    rows: dict[str, list[str]] = {}
    for cell in cells:
        rows.setdefault(cell.label, []).append(str(cell.run_dir))
    return rows


def folder_of(checkpoints: Checkpoints) -> Path:
    """Where a comparison lies: `runs/comparison_<hash>`, another for each choice of runs."""
    return Path("runs") / f"comparison_{hashlib.sha256(repr(checkpoints).encode()).hexdigest()[:8]}"


def open_clips(entries: Mapping[str, Entry], overrides: Mapping[str, Any]) -> ClipDataset | None:
    """The clips that were searched: the data of the first run, `overrides` on top.

    None, and a line that says so, where no result lies in a run and `overrides` name no data, or the data are
    not there: the numbers need none.

    Raises:
        DatasetError: other clips lie there now.
    """
    run_dir = next((entry.run_dir for entry in entries.values() if entry.run_dir), None)
    if run_dir is None and "data.dataset" not in overrides:
        print("no frames: the results lie in no run; name data.dataset and data.root in overrides")
        return None
    stamp = next(iter(entries.values())).results[0].stamp
    config = load_config(run_dir / "config.yaml" if run_dir else "quickstart", overrides)
    try:
        dataset = study.open_split(config, stamp["split"])
    except AbsentError as error:
        print(f"no frames: {error}")
        return None
    if dataset_fingerprint(dataset) != stamp["dataset_fingerprint"]:
        raise DatasetError(f"{dataset.root} holds other clips than were searched; name theirs: data.root=...")
    return ClipDataset(dataset, config)


def choose(entries: Mapping[str, Entry], pair: Sequence[str]) -> dict[str, Result]:
    """Two models by name, each by its first training; of an empty `pair` the two with the highest R@1.

    Raises:
        RunError: not two, or a name that is not there.
    """
    recalls = {
        name: mean(result.metrics["t2v"]["R@1"] for result in entry.results)
        for name, entry in entries.items()
    }
    chosen = list(pair) or sorted(recalls, key=recalls.__getitem__, reverse=True)[:2]
    unknown = [name for name in chosen if name not in entries]
    if unknown or len(set(chosen)) != 2:
        known = ", ".join(entries)
        wrong = f"no {unknown[0]!r}{did_you_mean(unknown[0], entries)}" if unknown else "name two"
        raise RunError(f"pair: {wrong} (there are {known})")
    return {name: entries[name].results[0] for name in chosen}


def method_name(config: RunConfig) -> str:
    """A method as the papers call it, such as `CLIP4Clip seqTransf`."""
    names = {"xclip": "X-CLIP", "clip2video": "CLIP2Video", "glscl": "GLSCL", "maxsim": "MaxSim"}
    if config.head.name in ("clip4clip", "tightTransf"):
        tight = config.head.name == "tightTransf"
        return f"CLIP4Clip {'tightTransf' if tight else config.temporal.agg_module}"
    return names.get(config.head.name, config.head.name.upper())
