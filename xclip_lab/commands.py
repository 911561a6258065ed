"""What each command does, with the same calls as a notebook. Imports are inside: `--help` is quick."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xclip_lab.errors import ConfigError

if TYPE_CHECKING:
    from xclip_lab.config import RunConfig
    from xclip_lab.model import RetrievalModel

_QUICKSTART = "00_quickstart"
_OF_THE_MODEL = ("towers", "temporal", "head", "max_words", "max_frames")


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
    there = [name for name in ("figures", "metrics.json") if (run_dir / name).exists()]
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(
        f"done in {minutes} min {seconds} s. Look into {run_dir}: {', '.join([executed.name, *there])} "
        "(`make lab` opens the notebook)"
    )


def train(arguments: Namespace) -> None:
    """Train as a preset says, or go on where the run stopped."""
    from xclip_lab.config import load_config
    from xclip_lab.datasets import load_dataset
    from xclip_lab.model import create_model
    from xclip_lab.resume import seed_everything
    from xclip_lab.runs import prepare_data
    from xclip_lab.train import fit

    config = load_config(arguments.preset, arguments.overrides)
    data = config.data
    run_dir = _run_dir(arguments, config)
    prepare_data(config)
    train_set = load_dataset(data.dataset, data.train_split, data.root, data.protocol)
    val_set = load_dataset(data.dataset, data.val_split, data.root, data.protocol) if data.val_split else None
    seed_everything(config.seed)
    result = fit(create_model(config), config, train_set, run_dir, val=val_set)
    if result.broken:
        print(f"left out {len(result.broken)} videos; the first: {next(iter(result.broken.values()))}")
    print(
        f"trained for {result.steps} steps in {result.seconds:.0f} s; the model is {result.checkpoint}\n"
        f"next: xclip-lab evaluate {run_dir}"
    )


def evaluate(arguments: Namespace) -> None:
    """Retrieval metrics of a run, a checkpoint or a fresh model."""
    import xclip_lab
    from xclip_lab.datasets import load_dataset
    from xclip_lab.train import resolve_device

    if arguments.run_or_checkpoint is not None:
        model, config, source, folder = _trained(arguments)
    elif arguments.preset is not None:
        model, config, source = _fresh(arguments)
        folder = None
    else:
        raise ConfigError(
            "nothing to evaluate: name a run folder or checkpoint, or a fresh model by --preset"
        )
    data = config.data
    split = arguments.split or data.test_split
    dataset = load_dataset(data.dataset, split, data.root, data.protocol)
    result = xclip_lab.evaluate(model.to(resolve_device(config.train.device)), dataset, config, **source)
    print(f"checkpoint {result.stamp['checkpoint']}\n{result}")
    out = arguments.out or (folder and folder / "evaluation" / split)
    print(f"saved in {result.save(out)}" if out else "not saved; --out DIR saves it")


def _trained(arguments: Namespace) -> tuple[RetrievalModel, RunConfig, dict[str, Any], Path | None]:
    """The model, its settings, where it came from, and its run folder where it lies in one."""
    from xclip_lab.checkpoint import find_model_file, load_model
    from xclip_lab.config import load_config

    file = find_model_file(arguments.run_or_checkpoint)
    # <run>/checkpoints/best/model.safetensors; `resolve` would lose the name `best`.
    runs = [folder for folder in file.absolute().parents[:3] if (folder / "config.yaml").is_file()]
    folder = runs[0] if runs else None
    settings = arguments.preset or (folder and folder / "config.yaml")
    if settings is None:
        raise ConfigError(f"{file} lies in no run folder; give its settings by --preset")
    config = load_config(settings, arguments.overrides)
    for key in arguments.overrides:
        if key.split(".")[0] in _OF_THE_MODEL:
            raise ConfigError(f"{key}: {file} holds the model with its own settings; train another one")
    stamp = file.parent / "stamp.json"
    selection = json.loads(stamp.read_text())["selection_split"] if stamp.is_file() else None
    return load_model(file), config, {"checkpoint": file, "selection_split": selection}, folder


def _fresh(arguments: Namespace) -> tuple[RetrievalModel, RunConfig, dict[str, Any]]:
    """An untrained model of a preset; the stamp says so."""
    from xclip_lab.config import load_config
    from xclip_lab.model import create_model
    from xclip_lab.resume import seed_everything

    config = load_config(arguments.preset, arguments.overrides)
    seed_everything(config.seed)
    towers = config.towers.pretrained or "random weights"
    return create_model(config), config, {"checkpoint": f"none: an untrained model (towers: {towers})"}


def data_generate(arguments: Namespace) -> None:
    """Make captioned clips."""
    from xclip_lab.config import load_config
    from xclip_lab.runs import prepare_data

    overrides = {f"data.generate.{key}": value for key, value in arguments.overrides.items()}
    if arguments.root is not None:
        overrides["data.root"] = arguments.root
    config = load_config("quickstart", overrides)
    prepare_data(config)
    print(f"clips in {config.data.root}")


def runs(arguments: Namespace) -> None:
    """A table of runs."""
    from xclip_lab.runs import list_runs

    shown = [("t2v", "R@1"), ("t2v", "R@5"), ("t2v", "MdR"), ("v2t", "R@1")]
    rows = [["run", "preset", "state", *(f"{side}/{name}" for side, name in shown)]]
    for run in list_runs(arguments.root):
        values = [run.metrics.get(side, {}).get(name) for side, name in shown]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        rows.append([run.name, run.preset, run.state, *cells])
    _print_table(rows)


def presets(arguments: Namespace) -> None:
    """A table of presets."""
    from xclip_lab.config import load_config
    from xclip_lab.config import presets as all_presets

    rows = [
        ["preset", "dataset", "towers", "weights", "agg_module", "head", "batch", "epochs", "words/frames"]
    ]
    for name in all_presets():
        config = load_config(name)
        towers, architecture = config.towers, config.towers.architecture
        size = f"patch {architecture.patch_size}, width {architecture.vision_width}" if architecture else ""
        rows.append(
            [
                name,
                config.data.dataset,
                towers.name or size,
                towers.pretrained or "from scratch",
                config.temporal.agg_module,
                config.head.name,
                str(config.train.batch_size),
                str(config.train.epochs),
                f"{config.max_words}/{config.max_frames}",
            ]
        )
    _print_table(rows)


def _run_dir(arguments: Namespace, config: RunConfig) -> Path:
    """The run's folder, said aloud."""
    from xclip_lab.runs import new_run_dir

    run_dir = Path(arguments.run_dir) if arguments.run_dir else new_run_dir(config)
    print(f"run folder {run_dir}", flush=True)
    return run_dir


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
