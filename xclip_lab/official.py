"""Published checkpoint files under one of our presets: to evaluate them, and to start a training from them.

What shapes cannot tell (`agg_module`, the head's settings) comes from the preset and from nowhere else, and
every key of the file must then fit: preset and file cannot disagree in silence.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from xclip_lab.checkpoint import fill_officially, load_model, migrate_lengths
from xclip_lab.config import RunConfig
from xclip_lab.errors import CheckpointError, ConfigError
from xclip_lab.families import FAMILIES, count_layers, tower_sizes
from xclip_lab.heads import HEADS
from xclip_lab.model import Origin, RetrievalModel, official_name
from xclip_lab.pretrained import load_strictly, read_state_dict

_LENGTHS = {"max_words": "word_logit_weight", "max_frames": "frame_logit_weight"}


def open_official(file: str | Path, family: str, config: RunConfig, migrate: bool = False) -> RetrievalModel:
    """The model of a published file. The towers' sizes are the file's, all else is the preset's.

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
    try:
        sizes = tower_sizes(state)
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{file} is no {family} checkpoint: it holds no CLIP towers ({error}); give a file that the "
            "official code saved"
        ) from error
    if migrate:
        state = migrate_lengths(state, config.max_words, config.max_frames)
    _check_lengths(file, state, config)
    if config.towers.architecture is not None:
        sizes = dataclasses.replace(sizes, quick_gelu=config.towers.architecture.quick_gelu)
    towers = dataclasses.replace(config.towers, name=None, architecture=sizes, pretrained=None)
    layers = count_layers(state, "transformerClip") or config.temporal.layers
    temporal = dataclasses.replace(config.temporal, layers=layers)
    built = dataclasses.replace(config.model, towers=towers, temporal=temporal)
    try:
        model = fill_officially(built, state, str(file))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; give the family, and a preset with the temporal and head settings, of its training"
        ) from error
    model.origin = Origin(f"{file} (official {family})", selection_split="unknown")
    return model.eval()


def start_from(config: RunConfig) -> RetrievalModel:
    """A model as configured, with the weights of `train.init` in place of `towers.pretrained`.

    Raises:
        CheckpointError: no such file (ledger 16), unsafe or damaged, or missing, unexpected or mis-sized
            keys, listed.
    """
    file = Path(str(config.train.init))
    model = RetrievalModel(config.model, load_pretrained=False)
    ours = file.is_dir() or file.suffix == ".safetensors"
    try:
        state = load_model(file).state_dict() if ours else _read(file)
        load_strictly(model, state, str(file), str if ours else official_name)
    except CheckpointError as error:
        raise CheckpointError(
            f"train.init: {error} (a training starts from all weights of the preset's own model)"
        ) from error
    model.origin = Origin(str(config.train.init), selection_split="unknown")
    return model


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about pickles that are not its own
            return {key: value.float() for key, value in read_state_dict(file).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give a whole state dict, as the official code saves it") from error


def _check_lengths(file: str | Path, state: Mapping[str, Tensor], config: RunConfig) -> None:
    """X-CLIP's matrices have the sizes of its longest caption and video."""
    other = {name: len(state[key]) for name, key in _LENGTHS.items() if key in state}
    other = {name: length for name, length in other.items() if length != getattr(config, name)}
    if other:
        here = " and ".join(f"{name} {getattr(config, name)}" for name in other)
        there = " ".join(f"--{name} {length}" for name, length in other.items())
        raise CheckpointError(
            f"{file} is for other lengths than {here}: give {there}, or --migrate to cut its matrices to the "
            "preset's lengths or pad them with the identity"
        )
