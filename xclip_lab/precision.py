"""Which parts of a model follow autocast: transformers do, the towers' and those that are added; all else
computes in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_around: ContextVar[bool] = ContextVar("autocast around the block of `in_float32`", default=False)


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Within the block autocast is off, but where `as_around` turns it on again."""
    before = _around.set(torch.is_autocast_enabled(device.type))
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _around.reset(before)


def as_around(device: torch.device) -> torch.autocast:
    """Autocast as it was around the block of `in_float32`; off where there is none."""
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=_around.get())
