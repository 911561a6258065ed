"""Which parts of a model follow autocast: the towers do, and the transformers that are added to them
(`blocks`); all else computes in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_bfloat16: ContextVar[bool] = ContextVar(
    "autocast to bfloat16 around the block of `in_float32`", default=False
)


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Within the block autocast is off, but where `as_around` turns it on again."""
    to_bfloat16 = torch.get_autocast_dtype(device.type) == torch.bfloat16
    before = _bfloat16.set(torch.is_autocast_enabled(device.type) and to_bfloat16)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _bfloat16.reset(before)


def as_around(device: torch.device) -> AbstractContextManager[object]:
    """Autocast as it was around the block of `in_float32`, if to bfloat16: float16 holds no mask of -1e6."""
    return torch.autocast(device.type, torch.bfloat16) if _bfloat16.get() else nullcontext()
