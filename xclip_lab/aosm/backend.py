"""Who computes AOSM: the formula as it reads, tiles in torch, or a GPU's kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch

from xclip_lab.errors import ConfigError

Backend = Literal["formula", "blocked", "triton"]
Choice = Literal["auto", "formula", "blocked", "triton"]


def choose(asked: str, device: torch.device) -> Backend:
    """The backend for features on `device`: as asked; of `auto` the fastest that works there.

    Raises:
        ConfigError: another name, or kernels where they cannot run, with the reason.
    """
    if asked == "formula":
        return "formula"
    if asked == "blocked" or (asked == "auto" and device.type != "cuda"):
        return "blocked"
    if asked not in get_args(Choice):
        raise ConfigError(f"backend: {asked!r} is not one of {', '.join(get_args(Choice))}")
    hindrance = tiles("triton").available(device)
    if hindrance and asked == "triton":
        raise ConfigError(f"backend: triton cannot be used: {hindrance}; take auto or blocked")
    return "blocked" if hindrance else "triton"


def tiles(backend: Backend) -> ModuleType:
    """The module with `matrix_aosm` and `vector_aosm`."""
    if backend == "triton":
        from xclip_lab.aosm import kernels  # brings a compiler along, for which most machines have no use

        return kernels
    from xclip_lab.aosm import blocked

    return blocked
