"""What each command does, with the same calls as a notebook. Imports are inside: `--help` is quick."""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from xclip_lab.atomic import check_writable
from xclip_lab.errors import ConfigError, DatasetError, first_few

if TYPE_CHECKING:
    from xclip_lab.config import RunConfig
    from xclip_lab.executors import Executor

_QUICKSTART = "00_quickstart"
_BROKEN = 10
"""Videos of a library that are named, where more cannot be read."""
_TOLD_BY_TOWERS = ("name", "architecture", "pretrained", "linear_patch")


def quickstart(arguments: Namespace) -> None:
    """Clips, training, evaluation and figures: the first notebook, from beginning to end."""
    from xclip_lab.config import load_config
    from xclip_lab.runs import execute_notebook

    began = time.monotonic()
    overrides = dict(arguments.overrides)
    if arguments.seed is not None:
        overrides["seed"] = arguments.seed
    config = load_config("quickstart", overrides)
    run_dir = _run_dir(arguments, config)
    overrides.pop("seed", None)
    parameters = {
        "preset": "quickstart",
        "seed": int(config.seed),
        "run_dir": str(run_dir),
        "overrides": overrides,
    }
    executed = execute_notebook(_QUICKSTART, parameters, run_dir)
    there = [name for name in ("figures/", "metrics.json") if (run_dir / name).exists()]
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(
        f"done in {minutes} min {seconds} s. Look into {run_dir}: {', '.join([executed.name, *there])} "
        "(`make lab` opens the notebook)"
    )


def train(arguments: Namespace) -> None:
    """Train as a preset says, or go on where the run stopped. Of several processes the first one speaks."""
    from xclip_lab import study
    from xclip_lab.config import load_config
    from xclip_lab.distributed import first_speaks, joined
    from xclip_lab.official import check_family
    from xclip_lab.runs import prepare_data
    from xclip_lab.train import fit

    config = load_config(arguments.preset, with_shortcuts(arguments, {"train.init": arguments.init}))
    if arguments.family is not None:
        if config.train.init is None:
            raise ConfigError(
                f"--family {arguments.family} belongs to an official file that a training starts from: "
                "give it by --init FILE"
            )
        check_family(arguments.family, config)
    with joined(config.train.device) as ranks, first_speaks(ranks):
        # What can be refused is refused before clips are made.
        ranks.device(config.train.device)
        run_dir = ranks.share(_run_dir(arguments, config) if ranks.first else None)
        model = study.new_model(config) if config.data.dataset == "synthetic" else None
        # One after the other: machines that share a disk make the data once, the others each for itself.
        for its_turn in (ranks.first, ranks.local_rank == 0 and not ranks.first):
            if its_turn:
                prepare_data(config)
            ranks.wait()
        train_set, val_set = study.open_training_splits(config)
        result = fit(model or study.new_model(config), config, train_set, run_dir, val=val_set)
        if result.broken:
            print(f"left out {len(result.broken)} videos; the first: {next(iter(result.broken.values()))}")
        last = result.history[-1]
        if "wait" in last:  # not in the records of older runs
            print(f"steps of the last epoch waited for clips {last['wait']:.0%} of the time")
        print(
            f"trained for {result.steps} steps in {result.seconds:.0f} s; the model is {result.checkpoint}\n"
            f"next: xclip-lab evaluate {run_dir}"
        )


def evaluate(arguments: Namespace) -> None:
    """Retrieval metrics of a run, a checkpoint, an official file or a fresh model. Of several processes the
    first one speaks and saves."""
    import xclip_lab
    from xclip_lab import study
    from xclip_lab.config import load_config
    from xclip_lab.distributed import first_speaks, joined
    from xclip_lab.runs import evaluation_name, keep_metrics, result_dir

    file, settings = _what_to_evaluate(arguments)
    shortcuts = {"evaluation.rerank": arguments.rerank, "evaluation.query_bank": arguments.query_bank}
    config = load_config(settings, with_shortcuts(arguments, shortcuts))
    with joined(config.train.device) as ranks, first_speaks(ranks):
        split = arguments.split or config.data.test_split
        dataset = study.open_split(config, split)
        if file is not None:
            _refuse_model_keys(arguments.overrides, file, official=arguments.official is not None)
        model, opened = study.open_model(file, config, arguments.family or "", arguments.migrate)
        _refuse_contradictions(arguments.overrides, config, opened, file)
        name = evaluation_name(opened, model.origin.run, split)
        place = Path(arguments.out or result_dir(file, opened, name))
        if ranks.first:
            check_writable(place, " for the result")
        ranks.share_weights(model)
        result = xclip_lab.evaluate(model, dataset, opened, backend=arguments.backend, ranks=ranks)
        print(result)
        if ranks.first:
            print(f"saved in {result.save(place)}")
            keep_metrics(place, model.origin.run, opened, split)


def _what_to_evaluate(arguments: Namespace) -> tuple[Path | None, str | Path]:
    """The model's file, None for a fresh one; the preset's name or the path of the settings."""
    from xclip_lab.checkpoint import find_model_file, run_folder_of

    trained, official, preset = arguments.run_or_checkpoint, arguments.official, arguments.preset
    if official is not None:
        if trained is not None:
            raise ConfigError(f"evaluate either {trained} or --official {official}, not both")
        if arguments.family is None or preset is None:
            raise ConfigError(
                "--official FILE needs --family F, whose code wrote it, and --preset P, for the data and for "
                "what the file's shapes cannot tell"
            )
        return Path(official), preset
    if arguments.family is not None or arguments.migrate:
        raise ConfigError("--family and --migrate belong to an official file: give it by --official FILE")
    if trained is None and preset is None:
        raise ConfigError(
            "nothing to evaluate: name a run folder or checkpoint, an official file by --official, or a "
            "fresh model by --preset"
        )
    file = None if trained is None else find_model_file(trained)
    folder = None if file is None else run_folder_of(file)
    settings = preset or (folder and folder / "config.yaml")
    if settings is None:
        raise ConfigError(f"{file} lies in no run folder; give its settings by --preset")
    return file, settings


def with_shortcuts(arguments: Namespace, shortcuts: Mapping[str, str | None]) -> dict[str, str]:
    """The keys given as options, with those that have an option of their own."""
    given = {key: value for key, value in shortcuts.items() if value is not None}
    return {**arguments.overrides, **given}


def _refuse_model_keys(keys: Iterable[str], file: Path, official: bool) -> None:
    """A checkpoint of ours holds all of its model, an official one the sizes and weights of its towers."""
    from xclip_lab.config import ModelConfig

    for key in keys:
        section, _, rest = key.partition(".")
        if official and section == "towers" and rest.split(".")[0] in _TOLD_BY_TOWERS:
            raise ConfigError(f"{key}: the weights and shapes in {file} tell that; leave it out")
        if not official and section in {field.name for field in dataclasses.fields(ModelConfig)}:
            instead = "give evaluate --backend" if key == "head.backend" else "train another one"
            raise ConfigError(f"{key}: {file} holds the model with its own settings; {instead}")


def _refuse_contradictions(
    keys: Iterable[str], given: RunConfig, opened: RunConfig, file: Path | None
) -> None:
    """Sizes and precision are an official file's: what was given must be what it has."""
    for key in keys:
        wanted, found = attrgetter(key)(given), attrgetter(key)(opened)
        if wanted != found:
            raise ConfigError(f"{key}: {wanted} was given but {file} has {found}; leave it out")


def embed(arguments: Namespace) -> None:
    """Store what the towers make of captions and frames."""
    from xclip_lab import study
    from xclip_lab.checkpoint import find_model_file, run_folder_of
    from xclip_lab.config import load_config
    from xclip_lab.features import embed as store_features
    from xclip_lab.features import left_out

    trained = arguments.run_or_checkpoint
    file = None if trained is None else find_model_file(trained)
    folder = None if file is None else run_folder_of(file)
    settings = arguments.preset or (folder and folder / "config.yaml")
    if settings is None:
        raise ConfigError("nothing to embed with: name a run folder or checkpoint, or a preset by --preset")
    if file is not None:
        _refuse_model_keys(arguments.overrides, file, official=False)
    model, config = study.open_model(file, load_config(settings, arguments.overrides))
    for dataset in study.open_splits(config, arguments.split):
        place = store_features(model, dataset, config, arguments.out, arguments.precision)
        lost = left_out(place)
        without = f", without {len(lost)} that cannot be read: {first_few(lost)}" if lost else ""
        print(f"{dataset.split}: {len(dataset)} captions, {len(dataset.videos)} videos{without} in {place}")
    print(f"next: train what follows the towers with --data.features {arguments.out}")


def search(arguments: Namespace) -> None:
    """The videos of a folder that a sentence finds."""
    from xclip_lab import study
    from xclip_lab.config import load_config
    from xclip_lab.errors import CheckpointError
    from xclip_lab.found import file_name
    from xclip_lab.plots import save_figure
    from xclip_lab.search import ZERO_SHOT, ZERO_SHOT_SETTINGS, check_query, open_library

    if not Path(arguments.folder).is_dir():
        raise DatasetError(f"{arguments.folder}: no such folder; name the one that your videos lie in")
    own = (arguments.run_or_checkpoint, arguments.official, arguments.preset)
    file, settings = _what_to_evaluate(arguments) if any(own) else (None, ZERO_SHOT)
    usual = {} if any(own) else ZERO_SHOT_SETTINGS
    config = load_config(settings, {**usual, **arguments.overrides})
    if file is not None:
        _refuse_model_keys(arguments.overrides, file, official=arguments.official is not None)
    try:
        model, opened = study.open_model(file, config, arguments.family or "", arguments.migrate)
    except CheckpointError as error:
        if file is not None:
            raise
        raise CheckpointError(f"{error}: --towers.pretrained FILE, or a trained model by --run RUN") from None
    _refuse_contradictions(arguments.overrides, config, opened, file)
    check_query(arguments.query, arguments.top, opened.max_words)
    check_writable(arguments.out, " for the figure (--out)")
    library = open_library(arguments.folder, model, opened, arguments.index)
    print(f"{len(library)} videos, {library.embedded} of them embedded now")
    broken = list(library.broken.values())
    for reason in broken[:_BROKEN]:
        print(f"left out: {reason}")
    if len(broken) > _BROKEN:
        print(f"left out: {len(broken) - _BROKEN} more that cannot be read")
    found = library.search(arguments.query, arguments.top)
    print(f"\u201c{found.query}\u201d: {found.scoring}")
    table = found.table()
    _print_table([list(table), *table.astype(str).to_numpy().tolist()])
    name = file_name(found.query)
    save_figure(found.show(), arguments.out, name)
    print(f"frames: {Path(arguments.out, name)}.png and .pdf")


def sweep(arguments: Namespace) -> None:
    """Every cell of a grid, and the table that they fill."""
    from xclip_lab import plots, tables
    from xclip_lab import sweep as sweeps
    from xclip_lab.grid import cells, load_grid
    from xclip_lab.runs import collect

    seeds = None if arguments.seeds is None else _numbers("--seeds", arguments.seeds)
    grid = load_grid(arguments.grid, arguments.preset, seeds, arguments.overrides, arguments.smoke)
    root = Path(arguments.run_dir)
    every = cells(grid, root)
    for cell in every if arguments.dry_run else ():
        print(f"{'done' if cell.done else 'to do':<6} {cell.name:<40} {cell.run_dir}")
    executor, failed = _executor(arguments), {}
    check_writable(root, " for the runs (--run-dir)")
    try:
        if not arguments.dry_run:
            failed = sweeps.run(every, executor)
    finally:
        found = tables.save(grid, every, root / "tables")
        text = tables.shown(found)
        _print_table([list(text.columns), *text.to_numpy().tolist()])
        print("", *tables.legend(grid, every), sep="\n")
    if found["runs"].any():
        plots.save_figure(tables.figure(grid, found), root / "tables" / "figures", grid.name)
        collect(root).to_csv(root / "runs.csv", index=False)
    print(f"saved in {root / 'tables'}")
    sweeps.raise_failures(failed)


def _executor(arguments: Namespace) -> Executor:
    from xclip_lab.executors import cluster, local

    options = ("partition", "cpus", "gpus", "hours")
    given = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    if arguments.slurm:
        return cluster(Path(arguments.run_dir) / "slurm", at_once=arguments.workers, **given)
    if given:
        raise ConfigError(f"--{next(iter(given))} belongs to a cluster: give --slurm as well")
    return local(arguments.workers)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of numbers such as 0,1") from None


def runs(arguments: Namespace) -> None:
    """A table of runs."""
    from xclip_lab.runs import list_runs

    shown = [("t2v", "R@1"), ("t2v", "R@5"), ("t2v", "MdR"), ("v2t", "R@1")]
    rows = [["run", "preset", "data", "state", *(f"{side}/{name}" for side, name in shown)]]
    for run in list_runs(arguments.root):
        values = [run.metrics.get(side, {}).get(name) for side, name in shown]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        rows.append([run.name, run.preset, run.data, run.state, *cells])
    _print_table(rows)


_MARKS = {None: "", "ours": "*", "B/32": "+"}
"""Of values that no script of the authors has, by `preset_files.About.values`."""


def bench(arguments: Namespace) -> None:
    """One benchmark, or the list of them."""
    from xclip_lab.bench import benchmarks, run

    if arguments.name is None:
        _print_table([["benchmark", "measures"], *map(list, benchmarks().items())])
    else:
        run(arguments.name, arguments.rest)


def presets(arguments: Namespace) -> None:
    """A table of presets, as their files have them."""
    from xclip_lab.preset_files import about
    from xclip_lab.preset_files import presets as all_presets
    from xclip_lab.published import published

    rows = [["preset", "dataset", "ViT", "batch", "epochs", "words/frames", "paper R@1", "stands for"]]
    for name, values in all_presets().items():
        data, train, told = values["data"], values["train"], about(name)
        stated = published(*told.published) if told.published else None
        mark = _MARKS[told.values]
        own = "own videos" if data["dataset"] == "folder" else "generated clips"
        rows.append(
            [
                name,
                " ".join(filter(None, (data["dataset"], data.get("protocol")))),
                _backbone(values["towers"]["name"]),
                f"{train['batch_size']}{mark}",
                f"{train['epochs']}{mark}",
                f"{values['max_words']}/{values['max_frames']}",
                f"{stated.metrics['t2v']['R@1']:.1f}" if stated else "-",
                told.script or own,
            ]
        )
    _print_table(rows)
    print(
        "\n* ours: the authors published no training code, only evaluation; learning rates are ours too"
        "\n+ of the authors' script for ViT-B/32: there is none for ViT-B/16"
    )


def _backbone(name: str | None) -> str:
    """`B/32` for `ViT-B-32-quickgelu`; towers without a name are ours."""
    return "/".join(name.split("-")[1:3]) if name else "own"


def _run_dir(arguments: Namespace, config: RunConfig) -> Path:
    """The run's folder, said aloud."""
    from xclip_lab.runs import RunError, new_run_dir

    run_dir = Path(arguments.run_dir) if arguments.run_dir else new_run_dir(config)
    if arguments.run_dir:
        check_writable(run_dir, " for the run", RunError)
    print(f"run folder {run_dir}", flush=True)
    return run_dir


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
