"""What no single value of a config can show: settings that fit, or do not fit, each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xclip_lab.blocks import check_width
from xclip_lab.errors import ConfigError
from xclip_lab.heads import HEADS

if TYPE_CHECKING:
    from xclip_lab.config import DataConfig, RunConfig

CLIP_POSITIONS = 77
"""Positions of the text tower of every CLIP that open_clip knows by name."""


def refuse_head_as_agg_module(temporal: Any) -> None:
    """The official code counts `tightTransf` among the `agg_module`s; here it is a head.

    Args:
        temporal: plain values, not yet validated.

    Raises:
        ConfigError: says where to name it.
    """
    agg_module = temporal.get("agg_module") if isinstance(temporal, Mapping) else None
    if agg_module in HEADS.names():
        raise ConfigError(f"temporal.agg_module: {agg_module} is a head here; set head.name={agg_module}")


def check_together(config: RunConfig) -> None:
    """Refuse settings that are each allowed and make no sense together.

    Raises:
        ConfigError: names the key to change and what fits.
    """
    towers, train = config.towers, config.train
    if (towers.name is None) == (towers.architecture is None):
        raise ConfigError("towers: give either towers.name or towers.architecture, the other one null")
    sizes = towers.architecture
    positions = sizes.context_length if sizes else CLIP_POSITIONS
    for key, most in (("max_words", min(positions, CLIP_POSITIONS)), ("max_frames", positions)):
        if getattr(config, key) > most:
            raise ConfigError(f"{key}: {getattr(config, key)} is not allowed (there are {most} positions)")
    HEADS[config.head.name].check(config.head, config.temporal, sizes.embed_dim if sizes else None)
    if config.temporal.agg_module in ("seqTransf", "tdb"):
        check_width(sizes.embed_dim if sizes else None, config.temporal.agg_module)
    if train.batch_size % train.accumulate:
        below = train.batch_size // train.accumulate * train.accumulate
        fits = " or ".join(str(size) for size in (below, below + train.accumulate) if size)
        raise ConfigError(
            f"train.accumulate: {train.accumulate} equal parts of train.batch_size {train.batch_size} "
            f"are not possible; a batch of {fits} is"
        )
    if towers.precision == "fp16" and (config.optim.recipe == "modern" or train.precision == "bf16"):
        raise ConfigError(
            "towers.precision: fp16 is the official recipe's way; with optim.recipe=modern or "
            "train.precision=bf16 the weights stay fp32"
        )


def check_training_frames(data: DataConfig) -> None:
    """Refuse to train on kept frames what comes anew every epoch.

    Raises:
        ConfigError: names the two keys.
    """
    kept = next((key for key in ("features", "preload") if getattr(data, key)), None)
    if kept is not None and data.frame_jitter:
        raise ConfigError(
            f"data.frame_jitter: training frames move every epoch, and data.{kept} keeps them; leave out one "
            "of the two (folders of frames, by xclip-lab data prepare --to frames, are quick to read as well)"
        )
    if data.features is not None and data.augment != "none":
        raise ConfigError("data.augment: stored features have no pixels; set it to none")
