"""What test_sweep.py runs in other processes; quick to import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from xclip_lab.errors import TrainingError


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def place_of(own: Path) -> tuple[int, str, str]:
    """Where an item ran; two of them run at once."""
    own.touch()
    wait_until(lambda: len(list(own.parent.glob("item-*"))) == 2, 60)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]


def behave(what: str) -> str:
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "refuse":
        raise TrainingError("the loss is nan")
    return os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
