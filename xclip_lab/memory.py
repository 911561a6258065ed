"""What fits into memory, and what goes to the disk. Importing it does not load torch, for those who only look
at files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.format import open_memmap

from xclip_lab.errors import ConfigError, UserError, writing

if TYPE_CHECKING:
    import torch


def available_memory() -> int | None:
    """Bytes that can be had on this machine without swapping, and within the limits that a container or Slurm
    sets; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    machine = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([*machine, *_room_in_groups()], default=None)


def _room_in_groups(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """What each control group with a limit that this process is in, however far up, leaves it."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, place = line.split(":", 2)
        if not controllers:  # version 2
            top, limit, used, unused = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            unused = "total_inactive_file"
        else:
            continue
        folder = top / place.lstrip("/")  # in a container it may not be there: its own group is then `top`
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            try:
                most, taken = (int((group / name).read_text()) for name in (limit, used))
                # What files were read into is given up on demand.
                cached = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # without a limit: there is no such file, or it says "max"
                continue
            yield max(0, most - taken + int(cached.get(unused, 0)))


@contextmanager
def room_for(full: Callable[[], UserError]) -> Iterator[None]:
    """Within the block a full memory is the error that `full` makes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise full() from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways in which torch and Python say that memory is full.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    """
    told = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can have on a device, None where nothing tells. On the CPU the processes of a
    machine have equal parts."""
    if device.type != "cuda":
        return _own_memory()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _own_memory() -> int | None:
    """An equal part of `available_memory` for each process that torchrun started on this machine."""
    available = available_memory()
    return available and available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def similarity_matrix(texts: int, videos: int, place: str, copies: int = 0, instead: str = "") -> np.ndarray:
    """Room for all scores, float32 `[T, V]`: in memory, or in a temporary file that goes when the array does.

    Args:
        place: `memory`, `disk`, or `auto`, the disk for what would need more than a quarter of what is free.
            Processes of one machine have equal parts of it. copies: how many times as much will be needed
            in memory beside it; then `auto` is `memory`. instead: what else to do about a full disk.

    Raises:
        ConfigError: a memory that is too small. DatasetError: a disk that does not take it.
    """
    size, free = texts * videos * 4, _own_memory()
    told = f"{size / 2**30:.1f} GiB of scores"
    if place == "auto":
        place = "disk" if free is not None and size > free / 4 and not copies else "memory"
    if place == "memory":
        try:
            if free is not None and size * (1 + copies) > free:
                raise MemoryError
            return np.empty((texts, videos), np.float32)
        except MemoryError as error:
            remedy = "leave evaluation.rerank out" if copies else "set it to auto, disk or none"
            times = f", {1 + copies} times over," if copies else ""
            raise ConfigError(
                f"evaluation.similarity: {told}{times} do not fit into memory; {remedy}"
            ) from error
    with (
        writing(tempfile.gettempdir(), f" (TMPDIR) for {told}{instead}"),
        tempfile.NamedTemporaryFile(suffix=".npy") as file,  # the map outlives the name
    ):
        matrix = open_memmap(file.name, mode="w+", dtype=np.float32, shape=(texts, videos))
        reserve(file.fileno())
        return matrix


def reserve(file: int) -> None:
    """Take the room of a file that is to be mapped: a disk that is too full says so now, and not by a signal
    later. Where the system knows no such call (macOS), it does nothing."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, os.fstat(file).st_size)
