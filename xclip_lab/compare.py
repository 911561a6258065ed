"""Methods beside each other on the generated clips: one model a method and seed, scored level by level."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from xclip_lab import study
from xclip_lab.batching import ClipDataset, FrameStore, preload
from xclip_lab.checkpoint import load_model
from xclip_lab.config import RunConfig
from xclip_lab.cost import scoring_cost
from xclip_lab.evaluation import evaluate
from xclip_lab.result import Result
from xclip_lab.runs import config_hash, prepare_data
from xclip_lab.synthetic import load_truth
from xclip_lab.train import fit

METHODS = (
    "quickstart-meanP",
    "quickstart-seqTransf",
    "quickstart-tightTransf",
    "quickstart",
    "quickstart-clip2video",
    "quickstart-glscl",
    "quickstart-maxsim",
    "quickstart-ti",
    "quickstart-wti",
)
"""The families and baselines: CLIP4Clip three times, X-CLIP, CLIP2Video, GLSCL, then the token-wise ones."""

MIX: dict[str, Any] = {
    "data.root": "data/generated/compare",
    "data.generate": {"train_clips": 3000, "test_clips": 400, "level_shares": [1.0, 1.0, 1.0, 1.0]},
    "train.epochs": 10,
}
"""The clips: all four levels in equal shares, for training and for the test; and how long to train."""


@dataclass(frozen=True)
class Cell:
    """One model of the comparison: its config and the folder of its run."""

    config: RunConfig
    run_dir: Path

    @property
    def result_dir(self) -> Path:
        """Where its evaluation lies, once it is done."""
        return self.run_dir / "evaluation" / self.config.data.test_split

    @property
    def done(self) -> bool:
        """Whether it was trained and evaluated."""
        return (self.result_dir / "metrics.json").is_file()


def cells(
    presets: Sequence[str],
    seeds: Sequence[int],
    overrides: Mapping[str, Any],
    root: str | Path,
    smoke: bool = False,
) -> list[Cell]:
    """Every method with every seed; a run's folder is named after its whole config, so none is done twice.

    Raises:
        ConfigError: as `load_config`.
    """
    mix = {} if smoke else MIX
    configs = [
        study.configure(preset, {**mix, **overrides}, seed, smoke) for seed in seeds for preset in presets
    ]
    return [
        Cell(config, Path(root) / f"{config.preset}_s{config.seed}_{config_hash(config)}")
        for config in configs
    ]


def run(cells: Sequence[Cell], workers: int = 2) -> None:
    """Train and evaluate what is not done, `workers` models at a time, each in its share of the cores.

    Interrupted or killed, the same call goes on: finished cells stay, the others resume at their last step.

    Raises:
        UserError: of the first cell that fails; the cells that run meanwhile are finished first.
    """
    waiting = [cell for cell in cells if not cell.done]
    if not waiting:
        return
    prepare_data(waiting[0].config)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_open_worker, initargs=(waiting[0].config, threads)
    ) as pool:
        running = {pool.submit(_train_and_evaluate, cell): cell for cell in waiting}
        with tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="compare", unit="model") as bar:
            try:
                for future in as_completed(running):
                    future.result()
                    bar.set_postfix_str(running[future].run_dir.name, refresh=False)
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)


# Frames of both splits, decoded once in each worker: all cells have the same clips.
_stores: dict[str, FrameStore] = {}


def _open_worker(config: RunConfig, threads: int) -> None:
    torch.set_num_threads(threads)
    for split in (config.data.train_split, config.data.test_split):
        _stores[split] = preload(ClipDataset(study.open_split(config, split), config), progress=False)


def _train_and_evaluate(cell: Cell) -> None:
    config, data = cell.config, cell.config.data
    train, test = study.open_split(config, data.train_split), study.open_split(config, data.test_split)
    model = study.new_model(config)
    done = fit(model, config, train, cell.run_dir, store=_stores[data.train_split], progress=False)
    trained = load_model(done.checkpoint)
    evaluate(trained, test, config, store=_stores[data.test_split], progress=False).save(cell.result_dir)


def table(cells: Sequence[Cell]) -> pd.DataFrame:
    """A row a method and level: text-to-video R@1 in the full gallery, and what scoring costs.

    Returns:
        Columns `method`, `level` (`all` first), `R@1` (the mean over seeds), `low`, `high` (95%, bootstrapped
        over clips; averaged over seeds), `seed_min`, `seed_max`, `seeds`, `captions`, `gmac` (of 1,000 texts
        with 1,000 videos, after the towers) and `parameters` (beside the towers).
    """
    rows = [row for cell in cells if cell.done for row in _rows(cell)]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    grouped = frame.groupby(["method", "level"], sort=False)
    found = grouped.agg(
        **{"R@1": ("R@1", "mean")},
        low=("low", "mean"),
        high=("high", "mean"),
        seed_min=("R@1", "min"),
        seed_max=("R@1", "max"),
        seeds=("R@1", "size"),
        captions=("captions", "first"),
        gmac=("gmac", "first"),
        parameters=("parameters", "first"),
    )
    return found.reset_index()


def _rows(cell: Cell) -> Iterator[dict[str, Any]]:
    config, result = cell.config, Result.load(cell.result_dir)
    truth = load_truth(config.data.root, config.data.test_split)
    levels = np.array([truth[result.videos[column]].level for column in result.text_to_video])
    model = load_model(cell.run_dir)
    of_towers = sum(parameter.numel() for parameter in model.clip.parameters())
    shared = {
        "method": method_name(config),
        "seed": config.seed,
        "gmac": scoring_cost(model).gmac(1000, 1000),
        "parameters": sum(parameter.numel() for parameter in model.parameters()) - of_towers,
    }
    groups = {"all": np.ones(len(levels), dtype=bool)}
    groups |= {name: levels == level for level, name in study.LEVELS.items() if (levels == level).any()}
    for name, chosen in groups.items():
        metrics, intervals = result.subset(chosen)
        low, high = intervals.get("R@1", (np.nan, np.nan))
        yield shared | {
            "level": name,
            "R@1": metrics["R@1"],
            "low": low,
            "high": high,
            "captions": int(chosen.sum()),
        }


def method_name(config: RunConfig) -> str:
    """A method as the papers call it, such as `CLIP4Clip seqTransf`."""
    names = {"xclip": "X-CLIP", "clip2video": "CLIP2Video", "glscl": "GLSCL", "maxsim": "MaxSim"}
    if config.head.name in ("clip4clip", "tightTransf"):
        tight = config.head.name == "tightTransf"
        return f"CLIP4Clip {'tightTransf' if tight else config.temporal.agg_module}"
    return names.get(config.head.name, config.head.name.upper())
