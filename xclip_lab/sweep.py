"""Sweeps: every cell of a grid as an executed notebook in a process of its own, none ever twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from xclip_lab import study
from xclip_lab.atomic import write_text
from xclip_lab.executors import Executor, local
from xclip_lab.grid import Cell
from xclip_lab.runs import FAILED, RunError, execute_notebook, has_result, prepare_data

NOTEBOOK = "20_train"
"""Trains, evaluates and records one cell."""


def run(cells: Sequence[Cell], executor: Executor | None = None) -> dict[str, str]:
    """Train and evaluate what is not done; cells whose frozen towers are missing wait for these.

    A cell that fails does not stop the others: its folder keeps the notebook with the error, and `failed.txt`
    its reason. Interrupted or killed, the same call goes on: finished cells stay, the others go on at their
    last checkpoint, failed ones are tried again.

    Args:
        executor: where the cells run; None for this machine.

    Returns:
        Why, in a line, by the name of each cell that is not done.

    Raises:
        UserError: the data of a cell cannot be used; nothing has been started then.
    """
    bases = [cell.base for cell in cells if cell.base is not None]
    everything = {cell.run_dir: cell for cell in (*bases, *cells)}
    waiting = {folder: cell for folder, cell in everything.items() if not cell.done}
    _check_data(list(waiting.values()))
    failed: dict[Path, str] = {}
    with _progress(len(everything), len(everything) - len(waiting)) as bar:
        for phase in _phases(list(waiting.values())):
            lost = {
                cell.run_dir: f"the run of its towers failed: {cell.base.run_dir}"
                for cell in phase
                if cell.base is not None and cell.base.run_dir in failed
            }
            able = [cell for cell in phase if cell.run_dir not in lost]
            failed |= lost | _run_all(able, executor or local(), bar)
    return {waiting[folder].name: reason for folder, reason in failed.items()}


def raise_failures(failed: dict[str, str]) -> None:
    """The end of a sweep.

    Raises:
        RunError: some cells failed; one line with the first reason.
    """
    if failed:
        name, reason = next(iter(failed.items()))
        raise RunError(
            f"cells failed: {len(failed)}, such as {name}: {reason}; the same command tries them again, and "
            "`failed.txt` in the folder of each says why"
        )


def run_cell(cell: Cell) -> None:
    """One cell, from its training to its result and, where others need them, its towers' features.

    Raises:
        RunError: a cell of the notebook failed, or there was nothing to evaluate.
    """
    (cell.run_dir / FAILED).unlink(missing_ok=True)
    if not has_result(cell.run_dir):
        parameters = {
            "preset": str(cell.preset),
            "seed": int(cell.config.seed),
            "run_dir": str(cell.run_dir),
            "overrides": dict(cell.overrides),
        }
        executed = execute_notebook(NOTEBOOK, parameters, cell.run_dir, progress=False)
        if not has_result(cell.run_dir):
            raise RunError(f"there is no test split to evaluate on (see {executed})")
    if cell.embeds:
        _embed(cell)


def _embed(cell: Cell) -> None:
    from xclip_lab.checkpoint import load_model
    from xclip_lab.distributed import resolve_device
    from xclip_lab.features import embed

    model = load_model(cell.run_dir).to(resolve_device(cell.config.train.device))
    for dataset in study.open_splits(cell.config):
        embed(model, dataset, cell.config, cell.features, progress=False)
    write_text(cell.features / "complete", "")


def _phases(waiting: Sequence[Cell]) -> list[list[Cell]]:
    """What can run at once; frozen towers must be there before what stands on them."""
    if not any(cell.embeds for cell in waiting):
        return [list(waiting)]
    return [[cell for cell in waiting if (cell.base is None) is alone] for alone in (True, False)]


def _check_data(waiting: Sequence[Cell]) -> None:
    """Make what is generated and look at the annotations, once for all cells that share them."""
    for config in {repr(cell.config.data.root): cell.config for cell in reversed(waiting)}.values():
        prepare_data(config)
        study.open_training_splits(config)
        study.open_split(config, config.data.test_split)


def _run_all(cells: Sequence[Cell], executor: Executor, bar: tqdm) -> dict[Path, str]:
    failed = {}
    with closing(executor(run_cell, cells)) as outcomes:
        for index, outcome in outcomes:
            cell = cells[index]
            bar.update()
            if outcome.error is not None:
                failed[cell.run_dir] = outcome.error
                cell.run_dir.mkdir(parents=True, exist_ok=True)
                write_text(cell.run_dir / FAILED, outcome.error + "\n")
                bar.set_postfix(failed=len(failed), refresh=False)
                bar.write(f"failed: {cell.name}: {outcome.error}")
    return failed


@contextmanager
def _progress(total: int, done: int) -> Iterator[tqdm]:
    """A bar over the cells, drawn anew every few seconds: a cell takes minutes."""
    over = threading.Event()
    with tqdm(total=total, initial=done, desc="sweep", unit="cell", smoothing=0) as bar:

        def refresh() -> None:
            while not over.wait(5.0):
                bar.refresh()

        threading.Thread(target=refresh, daemon=True).start()
        try:
            yield bar
        finally:
            over.set()
