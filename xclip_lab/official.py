"""Published checkpoint files under one of our presets: to evaluate them, and to start a training from them.

What shapes cannot tell (`agg_module`, the head's settings) comes from the preset and from nowhere else, and
every key of the file must then fit: preset and file cannot disagree in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xclip_lab.checkpoint import fill_officially, load_model, read_official, run_folder_of
from xclip_lab.config import ModelConfig, RunConfig, to_dict
from xclip_lab.errors import CheckpointError, ConfigError
from xclip_lab.families import FAMILIES, count_layers, options_of, read_config
from xclip_lab.heads import HEADS
from xclip_lab.model import Origin, RetrievalModel, official_name
from xclip_lab.pretrained import load_strictly
from xclip_lab.seen import Seen, read_seen

_LENGTHS = {"max_words": "word_logit_weight", "max_frames": "frame_logit_weight"}


def open_official(file: str | Path, family: str, config: RunConfig, migrate: bool = False) -> RetrievalModel:
    """The model of a published file. All sizes and the patch are the file's, all else is the preset's.

    The towers run in fp16 where the file keeps their matrices in it and the preset agrees, else in fp32.

    Args:
        file: `pytorch_model.bin.N`. family: whose code wrote it: clip4clip, xclip, clip2video, glscl.
        config: the preset. migrate: cut X-CLIP's matrices to the preset's lengths, or pad them with the
            identity (ledger 2).

    Raises:
        ConfigError: unknown family, or a preset of another one. CheckpointError: no such file (ledger 16),
            unsafe or damaged, other lengths, or missing, unexpected or mis-sized keys, listed.
    """
    check_family(family, config)
    state = _read(file)
    if not migrate:
        remedy = "--migrate to cut its matrices to the preset's lengths or pad them with the identity"
        _check_lengths(file, state, config, remedy)
    try:
        told = read_config(state, family, _options(family, config), str(file))
        lengths = {name: getattr(config, name) for name in _LENGTHS}
        return fill_officially(_under_preset(told, state, config), state, str(file), family, lengths)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; give a file of that family, and a "
            "preset with the temporal and head settings of its training"
        ) from error


def _options(family: str, config: RunConfig) -> dict[str, Any]:
    """The preset's temporal and head settings, as `load_official` takes them."""
    settings = to_dict(config.temporal) | to_dict(config.head)
    if config.head.name == "tightTransf":
        settings["agg_module"] = "tightTransf"
    known = options_of(family)
    return {key: value for key, value in settings.items() if key in known}


def _under_preset(told: ModelConfig, state: Mapping[str, Tensor], config: RunConfig) -> ModelConfig:
    """What the file tells of its model, with the preset's way to run the towers."""
    sizes = told.towers.architecture
    if sizes is not None and config.towers.architecture is not None:
        sizes = dataclasses.replace(sizes, quick_gelu=config.towers.architecture.quick_gelu)
    towers = dataclasses.replace(
        config.towers,
        name=None,
        architecture=sizes,
        pretrained=None,
        linear_patch=told.towers.linear_patch,
        precision=_precision(state, config),
    )
    layers = count_layers(state, "transformerClip") or config.temporal.layers
    temporal = dataclasses.replace(config.temporal, layers=layers)
    return dataclasses.replace(told, towers=towers, temporal=temporal)


def _precision(state: Mapping[str, Tensor], config: RunConfig) -> Literal["fp32", "fp16"]:
    """fp16 only where it rounds no matrix of the file. Embeddings are in float32 in any case."""
    matrices = [
        value
        for key, value in state.items()
        if key.startswith("clip.") and "embedding" not in key and value.ndim > 1
    ]
    half = all(value.dtype == torch.float16 for value in matrices)
    return "fp16" if half and config.towers.precision == "fp16" else "fp32"


def start_from(config: RunConfig) -> RetrievalModel:
    """A model as configured, with the weights of `train.init` in place of `towers.pretrained`.

    Raises:
        CheckpointError: no such file (ledger 16), unsafe or damaged, other lengths of X-CLIP's matrices, or
            missing, unexpected or mis-sized keys, listed.
    """
    file = Path(str(config.train.init))
    model = RetrievalModel(config.model, load_pretrained=False)
    ours = file.is_dir() or file.suffix == ".safetensors"
    try:
        first = load_model(file) if ours else None
        state = _read(file) if first is None else first.state_dict()
        if model.state_dict().keys() & {f"head.{key}" for key in _LENGTHS.values()}:
            official = {official_name(key): value for key, value in state.items()}
            _check_lengths(file, official, config, _remedy(file, ours, config))
        load_strictly(model, state, str(file), str if ours else official_name)
    except CheckpointError as error:
        raise CheckpointError(
            f"train.init: {error} (a training starts from all weights of the preset's own model)"
        ) from error
    seen = None if first is None else first.origin.seen
    model.origin = Origin(str(config.train.init), selection_split="unknown", seen=seen)
    return model


def seen_before(model: RetrievalModel, config: RunConfig) -> Seen:
    """What the weights that a training starts from have seen, as far as they are of a run of ours."""
    towers = config.towers.pretrained
    if model.origin.seen is None and towers is not None:
        return read_seen(run_folder_of(Path(towers))) or Seen()
    return model.origin.seen or Seen()


def _remedy(file: Path, ours: bool, config: RunConfig) -> str:
    """How a file gets the preset's lengths."""
    first = f"save_official(load_model({str(file)!r}), 'first.bin'), then " if ours else ""
    source = "first.bin" if ours else str(file)
    return (
        f"write one of the preset's lengths: {first}save_official(load_official({source!r}, 'xclip', "
        f"max_words={config.max_words}, max_frames={config.max_frames}), 'other.bin')"
    )


def check_start(model: RetrievalModel, config: RunConfig) -> None:
    """Refuse to train a model that did not start as `train.init` says.

    Raises:
        ConfigError: names both.
    """
    if config.train.init is not None and model.origin.checkpoint != config.train.init:
        raise ConfigError(
            f"train.init: {config.train.init} is not where the model's weights come from "
            f"({model.origin.checkpoint}); create it by study.new_model(config)"
        )


def check_family(family: str, config: RunConfig) -> None:
    """Refuse a family that does not exist, or a preset of another.

    Raises:
        ConfigError: names both.
    """
    _ = FAMILIES[family]
    if HEADS[config.head.name].family != family:
        raise ConfigError(
            f"--family {family}: the preset {config.preset!r} has the head {config.head.name!r}; give a "
            f"preset of {family}"
        )


def _read(file: str | Path) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise CheckpointError(f"no checkpoint file {file}; nothing is put in its place, give its path")
    try:
        return read_official(file)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give a whole state dict, as the official code saves it") from error


def _check_lengths(file: str | Path, state: Mapping[str, Tensor], config: RunConfig, remedy: str) -> None:
    """X-CLIP's matrices have the sizes of its longest caption and video."""
    found = {name: state[key].shape for name, key in _LENGTHS.items() if key in state}
    other = {name: shape[0] for name, shape in found.items() if shape and shape[0] != getattr(config, name)}
    if other:
        here = " and ".join(f"{name} {getattr(config, name)}" for name in other)
        there = " ".join(f"--{name} {length}" for name, length in other.items())
        raise CheckpointError(f"{file} is for other lengths than {here}: give {there}, or {remedy}")
