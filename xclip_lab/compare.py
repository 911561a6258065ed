"""Methods beside each other on the generated clips: one model a method and seed, scored level by level."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from xclip_lab import study
from xclip_lab.checkpoint import load_model
from xclip_lab.clips import ClipDataset, FrameStore, preload
from xclip_lab.config import RunConfig
from xclip_lab.cost import scoring_cost
from xclip_lab.evaluation import evaluate
from xclip_lab.guards import check_comparable
from xclip_lab.result import Result
from xclip_lab.runs import RunError, config_hash, prepare_data
from xclip_lab.stats import cluster_mean_interval
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
        """Where its evaluation lies, once it is done: a folder that no other command writes to."""
        return self.run_dir / "compare"

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
        RunError: a process died, as it does when the memory is full.
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
                    _finish(future, running[future])
                    bar.set_postfix_str(running[future].run_dir.name, refresh=False)
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)


def _finish(future: Future[None], cell: Cell) -> None:
    try:
        future.result()
    except BrokenProcessPool as error:
        raise RunError(
            f"a process that trained {cell.run_dir.name} or a model beside it died, as it does when the "
            "memory is full; take fewer workers and start again to go on"
        ) from error


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

    All methods answer the same captions, so a method's gain over the first one is paired: caption by caption.
    The intervals are bootstrapped over clips, with each caption's hits averaged over the seeds. They say what
    other captions would give, not what other seeds would: for that stand `seed_min` and `seed_max`.

    Returns:
        Columns `method`, `level` (`all` first), `captions`, `seeds`; `R@1` with its 95% interval `low`,
        `high`, and its range over seeds; `gain`, `gain_low`, `gain_high` over the first method, in points;
        `gmac` (of 1,000 texts with 1,000 videos, after the towers) and `parameters` (beside the towers).

    Raises:
        DatasetError: cells that were evaluated on different clips.
    """
    methods: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.done:
            methods.setdefault(method_name(cell.config), []).append(cell)
    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None
    loaded = {str(cell.run_dir): Result.load(cell.result_dir) for same in methods.values() for cell in same}
    if loaded:
        check_comparable(loaded)
    for name, same in methods.items():
        results = [loaded[str(cell.run_dir)] for cell in same]
        hits = np.stack([100.0 * (result.ranks["t2v"] == 1) for result in results])  # [seeds, captions]
        reference = hits.mean(0) if reference is None else reference
        of_method = {"method": name, "seeds": len(results), **_size(same[0])}
        rows += [of_method | row for row in _level_rows(same[0].config, results[0], hits, reference)]
    return pd.DataFrame(rows)


def _size(cell: Cell) -> dict[str, float]:
    model = load_model(cell.run_dir)
    of_towers = sum(parameter.numel() for parameter in model.clip.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    return {"gmac": scoring_cost(model).gmac(1000, 1000), "parameters": everything - of_towers}


def _level_rows(
    config: RunConfig, result: Result, hits: np.ndarray, reference: np.ndarray
) -> Iterator[dict[str, Any]]:
    """R@1 of all captions and of each level, from the `hits [seeds, captions]` of one method, in percent."""
    truth = load_truth(config.data.root, config.data.test_split)
    levels = np.array([truth[result.videos[column]].level for column in result.text_to_video])
    clusters = result.clusters[result.text_to_video]
    groups = {"all": np.ones(len(levels), dtype=bool)}
    groups |= {name: levels == level for level, name in study.LEVELS.items() if (levels == level).any()}
    for name, chosen in groups.items():
        own, by_seed = hits[:, chosen].mean(0), hits[:, chosen].mean(1)
        recall = cluster_mean_interval(own, clusters[chosen])
        gain = cluster_mean_interval(own - reference[chosen], clusters[chosen])
        yield {
            "level": name,
            "captions": int(chosen.sum()),
            "R@1": recall.value,
            "low": recall.low,
            "high": recall.high,
            "seed_min": by_seed.min(),
            "seed_max": by_seed.max(),
            "gain": gain.value,
            "gain_low": gain.low,
            "gain_high": gain.high,
        }


def method_name(config: RunConfig) -> str:
    """A method as the papers call it, such as `CLIP4Clip seqTransf`."""
    names = {"xclip": "X-CLIP", "clip2video": "CLIP2Video", "glscl": "GLSCL", "maxsim": "MaxSim"}
    if config.head.name in ("clip4clip", "tightTransf"):
        tight = config.head.name == "tightTransf"
        return f"CLIP4Clip {'tightTransf' if tight else config.temporal.agg_module}"
    return names.get(config.head.name, config.head.name.upper())
