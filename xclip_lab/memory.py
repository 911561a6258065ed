"""What fits into memory, and what goes to the disk. Importing it does not load torch, for those who only look
at files."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.format import open_memmap

from xclip_lab.errors import DatasetError, disk_remedy

if TYPE_CHECKING:
    import torch


def available_memory() -> int | None:
    """Bytes that can be had without swapping, None where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            return next(
                (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
            )
    except OSError:
        return None


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
    """Bytes that can be had on a device, None where nothing tells."""
    if device.type != "cuda":
        return available_memory()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def similarity_matrix(texts: int, videos: int, place: str) -> np.ndarray:
    """Room for all scores, float32 `[T, V]`: in memory, or in a temporary file that goes when the array does.

    Args:
        place: `memory`, `disk`, or `auto`, the disk for what would need more than a quarter of what is free.

    Raises:
        DatasetError: a disk that does not take it.
    """
    free = available_memory()
    if place == "auto":
        place = "disk" if free is not None and texts * videos * 4 > free / 4 else "memory"
    if place == "memory":
        return np.empty((texts, videos), np.float32)
    try:
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:  # the map outlives the name
            matrix = open_memmap(file.name, mode="w+", dtype=np.float32, shape=(texts, videos))
            # A disk that is too full says so now, and not by a signal later.
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            return matrix
    except OSError as error:
        raise DatasetError(
            f"{tempfile.gettempdir()}: {error.strerror or error}, and {texts * videos * 4 / 2**30:.1f} GiB "
            f"of scores are to lie there; {disk_remedy(error)} (TMPDIR), or set evaluation.similarity=memory"
        ) from error
