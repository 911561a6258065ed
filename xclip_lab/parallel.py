"""All cores for operations too small to fill them: a Python thread a core, each with one torch thread.

On small blocks that beats one pool of torch threads, which meets at a barrier after every operation. Beyond
some threads Python's lock and the memory of so many blocks cost more than they give: then each has several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_MOST = 16

Job = TypeVar("Job")
Made = TypeVar("Made")


def workers_on(device: torch.device) -> int:
    """How many jobs to do at a time: on the CPU one a torch thread, 16 at most; one on a device that is
    parallel itself.

    Within a job it is the job's part of the threads, mostly 1: what is nested in it stays in its thread.
    """
    return min(torch.get_num_threads(), _MOST) if device.type == "cpu" else 1


def in_threads(function: Callable[[Job], Made], jobs: Iterable[Job], workers: int) -> Iterator[Made]:
    """`function` of each job, in the jobs' order, `workers` at a time, gradients on or off as in the caller.

    An error or an interrupt ends it once the running jobs have ended; the others are not begun.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    before = torch.get_num_threads()
    with_grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def work(job: Job) -> Made:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(with_grad),
        ):  # a thread has its own switches
            return function(job)

    of_each = max(1, before // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(of_each,))
    try:
        yield from pool.map(work, jobs)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the number is also kept for the process as a whole
