"""Where the cells of a sweep run: in processes of this machine, or as jobs of a cluster.

An executor is called with a function and items, and yields each item's number and `workers.Outcome`, as they
are finished. Closing the generator, as Ctrl-C does, ends what still runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from xclip_lab.errors import ConfigError
from xclip_lab.workers import Outcome, attempt, usable_cores, watched

_MONTH = 30 * 24 * 3600.0  # a training may take as long as it likes


class Executor(Protocol):
    """What `sweep.run` runs its cells with."""

    def __call__(
        self, function: Callable[[Any], Any], items: Sequence[Any]
    ) -> Generator[tuple[int, Outcome], None, None]: ...


def local(workers: int | None = None, gpus: Sequence[str] | None = None) -> Executor:
    """This machine: so many processes at a time, each with its share of the cores and, in turn, a GPU.

    Args:
        workers: None for one a GPU, or without any for one a core, four at the most.
        gpus: as CUDA_VISIBLE_DEVICES names them; None for those that this process sees.
    """
    cards = _visible_gpus() if gpus is None else list(gpus)
    count = len(cards) or min(4, usable_cores()) if workers is None else workers
    if count < 1:
        raise ConfigError(f"workers: {count} is not a number of processes")

    def run(
        function: Callable[[Any], Any], items: Sequence[Any]
    ) -> Generator[tuple[int, Outcome], None, None]:
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // count))}
        places = [
            threads | ({"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]} if cards else {})
            for number in range(count)
        ]
        yield from watched(function, items, count, _MONTH, places)

    return run


def _visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def cluster(
    folder: str | Path,
    *,
    cpus: int = 8,
    gpus: int = 1,
    hours: float = 24.0,
    partition: str | None = None,
    at_once: int | None = None,
    system: str = "slurm",
) -> Executor:
    """An array of jobs by submitit: one job a cell. This process waits for them; ended, it cancels them.

    Args:
        folder: for the scripts and logs, on a disk that the machines of the cluster share.
        cpus, gpus, hours: of each job. at_once: how many jobs may run at a time; None for all.
        system: `slurm`, or `local` for jobs on this machine.

    Raises:
        ConfigError: submitit is not installed, or there is no such system here.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("a cluster needs submitit: pip install 'xclip-lab[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder, cluster=system)
    except RuntimeError as error:
        raise ConfigError(f"cluster {system}: {' '.join(str(error).split())}") from error
    settings = {"slurm_partition": partition, "slurm_array_parallelism": at_once}
    executor.update_parameters(
        name="xclip-lab",
        cpus_per_task=cpus,
        gpus_per_node=gpus,
        timeout_min=round(60 * hours),
        slurm_setup=[f"export OMP_NUM_THREADS={cpus}"],
        **{key: value for key, value in settings.items() if value is not None},
    )

    def run(
        function: Callable[[Any], Any], items: Sequence[Any]
    ) -> Generator[tuple[int, Outcome], None, None]:
        waiting = dict(enumerate(executor.map_array(partial(attempt, function), items)))
        try:
            while waiting:
                for index in [index for index, job in waiting.items() if job.done()]:
                    yield index, _outcome(waiting.pop(index))
                time.sleep(0.5)
        finally:
            for job in waiting.values():
                job.cancel()

    return run


def _outcome(job: Any) -> Outcome:
    lost = job.exception()
    if lost is None:
        return job.result()
    reason = next(iter(str(lost).splitlines()), type(lost).__name__)
    return Outcome(error=f"job {job.job_id}: {reason} (log: {job.paths.stderr})")
