"""What no single value of a config can show: settings that fit, or do not fit, each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xclip_lab.blocks import check_width
from xclip_lab.datasets import DATASETS
from xclip_lab.datasets.base import PROTOCOLS, SPLITS, Source
from xclip_lab.datasets.reading import asked_for
from xclip_lab.errors import AbsentError, ConfigError, DatasetError
from xclip_lab.heads import HEADS
from xclip_lab.pretrained import unknown_weights
from xclip_lab.registry import did_you_mean

if TYPE_CHECKING:
    from xclip_lab.config import DataConfig, RunConfig

_DEVICES = ("auto", "cpu", "cuda", "mps")
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
    most = {"max_words": min(positions, CLIP_POSITIONS)}
    width = sizes.embed_dim if sizes else None
    HEADS[config.head.name].check(config.head, config.temporal, width)
    if config.temporal.agg_module in ("seqTransf", "tdb"):
        check_width(width, config.temporal.agg_module)
        most["max_frames"] = positions
    elif getattr(config.head, "center_proj", None) == "TAB":  # it gives them to every second frame
        most["max_frames"] = 2 * positions
    for key, limit in most.items():
        if getattr(config, key) > limit:
            raise ConfigError(
                f"{key}: {getattr(config, key)} is not allowed (there are positions for {limit})"
            )
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
    _check_device(train.device)
    _check_splits(config.data)
    if config.data.dataset == "synthetic":
        from xclip_lab.synthetic.plan import check  # the package around it imports the config

        check(config.data.generate)


def _check_device(name: str) -> None:
    """Any that torch knows: a run of another machine's device can be evaluated here."""
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError:
        raise ConfigError(
            f"train.device: {name!r} is not allowed (allowed: {', '.join(_DEVICES)} and, of several, such as "
            f"cuda:1{did_you_mean(name, _DEVICES)})"
        ) from None


def _check_splits(data: DataConfig) -> None:
    if data.dataset not in ("folder", "synthetic", *PROTOCOLS):
        return
    own = (split for rules in PROTOCOLS.get(data.dataset, {}).values() for split in rules.splits)
    # The usual ones in any case: `val` may mean `test`, and presets name all three.
    known = [*dict.fromkeys((*SPLITS, *own))]
    for key in ("train_split", "val_split", "test_split"):
        split = getattr(data, key)
        if split is not None and split not in known:
            near = did_you_mean(split, known)
            raise ConfigError(f"data.{key}: {split!r} is not allowed (allowed: {', '.join(known)}{near})")


def check_names(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Refuse a dataset, a protocol or weights that nobody knows, where they are `given` here and now. What a
    file of a run says may have been true elsewhere: its weights were on another machine, its dataset is read
    by a module that is not imported.

    Args:
        given: nested plain values.

    Raises:
        ConfigError: says what there is, and the nearest.
    """
    data, towers = (given.get(section) or {} for section in ("data", "towers"))
    if data.keys() & {"dataset", "protocol"}:
        _check_protocol(config.data)
    pretrained = config.towers.pretrained
    # What is written as a path may yet come to be there, as in a sweep.
    if (
        "pretrained" in towers
        and pretrained
        and not Path(pretrained).suffix
        and Path(pretrained).name == pretrained
    ):
        wrong = unknown_weights(pretrained, config.towers.name)
        if wrong:
            raise ConfigError(wrong)


def _check_protocol(data: DataConfig) -> None:
    try:
        DATASETS[data.dataset]
    except ConfigError as error:
        raise ConfigError(f"data.dataset: {error}") from None
    try:
        if data.dataset in PROTOCOLS:
            asked_for(data.dataset, Source(Path(), "test", data.protocol))
    except AbsentError:  # the protocol is there, without this split
        pass
    except DatasetError as error:
        raise ConfigError(f"data.protocol: {error}") from None


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
