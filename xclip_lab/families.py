"""What an official state dict says of its model: sizes off the shapes, the rest from options."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from xclip_lab.config import ModelConfig, TowerSizes, model_config_from_dict, to_dict
from xclip_lab.errors import CheckpointError, ConfigError
from xclip_lab.heads import HEADS
from xclip_lab.registry import Registry, did_you_mean
from xclip_lab.validation import check, merge, nest

State = Mapping[str, Tensor]
OfficialConfig = Callable[[State, dict[str, Any]], ModelConfig]
FAMILIES: Registry[OfficialConfig] = Registry("family")
"""Each raises CheckpointError for a state dict that lacks what sizes are read off."""
_OF_DIFFERENCES = ("temporal_proj", "mask_differences")
_TDB_KEY = "type_position_embeddings.weight"
_TEMPORAL_OPTIONS = (*_OF_DIFFERENCES, "mixed_head_masks")
_SIZES = {"layers", "positions", "centers", "queries", "feed_forward"}
"""Settings of heads that the shapes tell."""


def options_of(family: str, state: State = MappingProxyType({})) -> list[str]:
    """What one may tell of a family's model beside its shapes, sorted; of `tdb` where it may have one."""
    heads = [HEADS[name] for name in HEADS.names() if HEADS[name].family == family]
    settings = {field.name for head in heads for field in dataclasses.fields(head.config_class)}
    told = {"agg_module", "max_words", "max_frames", *_TEMPORAL_OPTIONS}
    has_not = () if family == "clip2video" or _TDB_KEY in state else _OF_DIFFERENCES
    return sorted((told | settings) - {*_SIZES, "name", *has_not})


def check_options(family: str, options: Mapping[str, Any], state: State) -> None:
    """Refuse a family that does not exist, or options that its model with this state dict does not have.

    Raises:
        ConfigError: lists what there is.
    """
    _ = FAMILIES[family]
    known = options_of(family, state)
    for key in options:
        if key not in known:
            raise ConfigError(
                f"unknown option {key!r} of {family}{did_you_mean(key, known)} (options: {', '.join(known)}; "
                "sizes are read off the shapes)"
            )


def read_config(state: State, family: str, options: Mapping[str, Any], name: str) -> ModelConfig:
    """The config of an official state dict that is called `name`.

    Raises:
        CheckpointError: it lacks what the family's sizes are read off. ConfigError: an option's value.
    """
    try:
        return FAMILIES[family](state, dict(options))
    except CheckpointError as error:
        raise CheckpointError(f"{name} is no {family} checkpoint: {error}") from error


def count_layers(state: State, prefix: str, blocks: str = "resblocks") -> int:
    """Number of transformer blocks below `prefix`."""
    pattern = re.compile(re.escape(f"{prefix}.{blocks}.") + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, state) if match})


def _layers(state: State, prefix: str, blocks: str = "resblocks") -> int:
    """The same of a transformer that must be there."""
    layers = count_layers(state, prefix, blocks)
    if not layers:
        raise CheckpointError(f"it has no '{prefix}.{blocks}.*'")
    return layers


def _size(state: State, key: str, axis: int = 0, dimensions: int = 2) -> int:
    """The length along one axis of a tensor that must have so many dimensions, none of them empty."""
    if key not in state:
        raise CheckpointError(f"it has no {key!r}")
    shape = list(state[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"its {key!r} has the size {shape} and not {dimensions} dimensions above 0")
    return shape[axis]


def _tower_sizes(state: State) -> TowerSizes:
    """The towers' sizes from the shapes of an official state dict (keys start with `clip.`)."""
    patch = _size(state, "clip.visual.conv1.weight", 3, dimensions=4)
    grid = round(max(1, _size(state, "clip.visual.positional_embedding") - 1) ** 0.5)
    vision_width = _size(state, "clip.visual.conv1.weight", dimensions=4)
    text_width = _size(state, "clip.token_embedding.weight", 1)
    return TowerSizes(
        embed_dim=_size(state, "clip.text_projection", 1),
        image_size=grid * patch,
        patch_size=patch,
        vision_width=vision_width,
        vision_layers=_layers(state, "clip.visual.transformer"),
        vision_heads=max(1, vision_width // 64),
        text_width=text_width,
        text_layers=_layers(state, "clip.transformer"),
        text_heads=max(1, text_width // 64),
        context_length=_size(state, "clip.positional_embedding"),
        vocab_size=_size(state, "clip.token_embedding.weight"),
    )


def _config(
    state: State,
    options: dict[str, Any],
    agg_module: str,
    head: dict[str, Any],
) -> ModelConfig:
    """Common to all: what options say goes over what the family does officially."""
    temporal = {"temporal_proj": _projection(state)} if _TDB_KEY in state else {}
    temporal |= {key: options.pop(key) for key in _TEMPORAL_OPTIONS if key in options}
    patch = "3d" if "clip.visual.conv2.weight" in state else "2d"
    sizes = _tower_sizes(state)
    lengths = {name: head.pop(name, min(usual, sizes.context_length)) for name, usual in _LENGTHS}
    values: dict[str, Any] = {}
    for key, value in HEADS[head["name"]].official.items():
        values = merge(values, nest(key, value))
    told = {
        "towers": {
            "name": None,
            "pretrained": None,
            "architecture": to_dict(sizes),
            "linear_patch": patch,
        },
        "temporal": {
            "agg_module": agg_module,
            "layers": count_layers(state, "transformerClip") or 1,
            **temporal,
        },
        "head": head | options,
        **lengths,
    }
    return model_config_from_dict(merge(values, told))


_LENGTHS = (("max_words", 32), ("max_frames", 12))
"""Of a model whose weights do not tell for how many words and frames it was trained."""
_USUAL = ("meanP", "seqLSTM", "seqTransf")


def _agg_module(state: State, options: dict[str, Any], *more: str) -> str:
    """As the option says, else as the keys tell. `more`: what a family has beside the usual."""
    if count_layers(state, "transformerClip"):
        by_keys = "tdb" if _TDB_KEY in state else "seqTransf"
    else:
        by_keys = "seqLSTM" if any(key.startswith("lstm_visual.") for key in state) else "meanP"
    told = options.pop("agg_module", None)
    return by_keys if told in (None, by_keys) else check("agg_module", Literal[(*_USUAL, *more)], told)


def _projection(state: State) -> str:
    """`temporal_proj` of a model with `tdb`."""
    if "frame2t_projection" in state:
        return "sigmoid_mlp"
    return "sigmoid_selfA" if count_layers(state, "frame2t_attention") else "default"


@FAMILIES.register("clip4clip")
def _clip4clip(state: State, options: dict[str, Any]) -> ModelConfig:
    if options.get("agg_module") is None and any(key.startswith("cross.") for key in state):
        options["agg_module"] = "tightTransf"
    agg_module = _agg_module(state, options, "tightTransf")
    if agg_module != "tightTransf":
        return _config(state, options, agg_module, {"name": "clip4clip"})
    layers = _layers(state, "cross.transformer")
    positions = _size(state, "cross.embeddings.position_embeddings.weight")
    head = {"name": "tightTransf", "layers": layers, "positions": positions}
    return _config(state, options, "meanP", head | {"max_frames": max(1, min(12, positions - 1))})


@FAMILIES.register("xclip")
def _xclip(state: State, options: dict[str, Any]) -> ModelConfig:
    lengths = {"max_words": "word_logit_weight", "max_frames": "frame_logit_weight"}
    head = {name: _size(state, key) for name, key in lengths.items()}
    return _config(state, options, _agg_module(state, options), {"name": "xclip", **head})


@FAMILIES.register("clip2video")
def _clip2video(state: State, options: dict[str, Any]) -> ModelConfig:
    agg_module = _agg_module(state, options, "tdb")
    head: dict[str, Any] = {"name": "clip2video", "center_proj": None}
    if "weight_center" in state:
        with_layer = "TAB_TDB" if agg_module == "tdb" else "TAB"
        head["center_proj"] = with_layer if count_layers(state, "actionClip") else "plain"
        head["centers"] = _size(state, "weight_center")
    return _config(state, options, agg_module, head)


@FAMILIES.register("glscl")
def _glscl(state: State, options: dict[str, Any]) -> ModelConfig:
    head: dict[str, Any] = {
        "name": "glscl",
        "queries": _size(state, "spatial_queries"),
        "layers": _layers(state, "transformer_decoder_noun", "layers"),
        "feed_forward": _size(state, "decoder_layer_noun.linear1.weight"),
    }
    return _config(state, options, _agg_module(state, options), head)
