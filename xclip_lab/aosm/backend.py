"""Who computes AOSM: the formula as it reads, tiles in torch, or a GPU's kernels."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import torch

from xclip_lab.aosm import kernels
from xclip_lab.errors import ConfigError

Backend = Literal["formula", "blocked", "triton", "triton-fp16"]
"""`triton` leaves the features as they are. `triton-fp16` rounds them to float16 where no gradient is wanted:
meant to be faster; logits move a little, and close ranks may change."""
Choice = Literal["auto", "formula", "blocked", "triton", "triton-fp16"]


def choose(asked: str, device: torch.device, dtype: torch.dtype, words: int, frames: int) -> Backend:
    """The backend for features on `device`: as asked; of `auto` the kernels where they run,
    else the tiles.

    Args:
        dtype: of the features. words, frames: of a pair.

    Raises:
        ConfigError: another name, or kernels where they cannot run, with the reason.
    """
    if asked not in get_args(Choice):
        raise ConfigError(f"backend: {asked!r} is not one of {', '.join(get_args(Choice))}")
    if asked == "formula":
        return "formula"
    if asked == "blocked" or (asked == "auto" and device.type != "cuda"):
        return "blocked"
    hindrance = kernels.available(device, dtype, words, frames)
    if asked == "auto":
        if hindrance:
            warnings.warn(f"AOSM is computed in tiles: {hindrance}", stacklevel=2)
        return "blocked" if hindrance else "triton"
    if hindrance:
        raise ConfigError(f"backend: {asked} cannot be used: {hindrance}; take auto or blocked")
    return "triton" if asked == "triton" else "triton-fp16"
