"""What an official state dict says of its model: sizes off the shapes, the rest from options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from xclip_lab.config import ModelConfig, TowerSizes, model_config_from_dict, to_dict
from xclip_lab.registry import Registry

State = Mapping[str, Tensor]
OfficialConfig = Callable[[State, dict[str, Any]], ModelConfig]
FAMILIES: Registry[OfficialConfig] = Registry("family")
_TEMPORAL_OPTIONS = ("temporal_proj", "mask_differences", "mixed_head_masks")


def tower_sizes(state: State) -> TowerSizes:
    """The towers' sizes from the shapes of an official state dict (keys start with `clip.`)."""
    conv = state["clip.visual.conv1.weight"]
    grid = round((state["clip.visual.positional_embedding"].shape[0] - 1) ** 0.5)
    text_width = state["clip.token_embedding.weight"].shape[1]
    return TowerSizes(
        embed_dim=state["clip.text_projection"].shape[1],
        image_size=grid * conv.shape[-1],
        patch_size=conv.shape[-1],
        vision_width=conv.shape[0],
        vision_layers=count_layers(state, "clip.visual.transformer"),
        vision_heads=max(1, conv.shape[0] // 64),
        text_width=text_width,
        text_layers=count_layers(state, "clip.transformer"),
        text_heads=max(1, text_width // 64),
        context_length=state["clip.positional_embedding"].shape[0],
        vocab_size=state["clip.token_embedding.weight"].shape[0],
    )


def count_layers(state: State, prefix: str, blocks: str = "resblocks") -> int:
    """Number of transformer blocks below `prefix`."""
    pattern = re.compile(re.escape(f"{prefix}.{blocks}.") + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, state) if match})


def _config(
    state: State,
    options: dict[str, Any],
    agg_module: str,
    head: dict[str, Any],
    towers: Mapping[str, Any] | None = None,
    **temporal: Any,
) -> ModelConfig:
    """Common to all: what options say goes over what the family does officially."""
    temporal |= {key: options.pop(key) for key in _TEMPORAL_OPTIONS if key in options}
    patch = "3d" if "clip.visual.conv2.weight" in state else "2d"
    sizes = tower_sizes(state)
    lengths = {name: head.pop(name, min(usual, sizes.context_length)) for name, usual in _LENGTHS}
    return model_config_from_dict(
        {
            "towers": {
                "name": None,
                "pretrained": None,
                "architecture": to_dict(sizes),
                "linear_patch": patch,
                **(towers or {}),
            },
            "temporal": {
                "agg_module": agg_module,
                "layers": count_layers(state, "transformerClip") or 1,
                **temporal,
            },
            "head": head | options,
            **lengths,
        }
    )


_LENGTHS = (("max_words", 32), ("max_frames", 12))
"""Of a model whose weights do not tell for how many words and frames it was trained."""


def _agg_module_of(state: State) -> str:
    if count_layers(state, "transformerClip"):
        return "tdb" if "type_position_embeddings.weight" in state else "seqTransf"
    return "seqLSTM" if any(key.startswith("lstm_visual.") for key in state) else "meanP"


@FAMILIES.register("clip4clip")
def _clip4clip(state: State, options: dict[str, Any]) -> ModelConfig:
    tight = any(key.startswith("cross.") for key in state)
    agg_module = options.pop("agg_module", None) or ("tightTransf" if tight else _agg_module_of(state))
    if agg_module != "tightTransf":
        return _config(state, options, agg_module, {"name": "clip4clip"})
    layers = count_layers(state, "cross.transformer")
    positions = len(state["cross.embeddings.position_embeddings.weight"])
    return _config(state, options, "meanP", {"name": "tightTransf", "layers": layers, "positions": positions})


@FAMILIES.register("xclip")
def _xclip(state: State, options: dict[str, Any]) -> ModelConfig:
    agg_module = options.pop("agg_module", None) or _agg_module_of(state)
    words, frames = len(state["word_logit_weight"]), len(state["frame_logit_weight"])
    return _config(state, options, agg_module, {"name": "xclip", "max_words": words, "max_frames": frames})


@FAMILIES.register("clip2video")
def _clip2video(state: State, options: dict[str, Any]) -> ModelConfig:
    agg_module = options.pop("agg_module", None) or _agg_module_of(state)
    projection = "sigmoid_selfA" if count_layers(state, "frame2t_attention") else "default"
    projection = "sigmoid_mlp" if "frame2t_projection" in state else projection
    center_proj = None
    if "weight_center" in state:
        with_layer = "TAB_TDB" if agg_module == "tdb" else "TAB"
        center_proj = with_layer if count_layers(state, "actionClip") else "plain"
    center_proj = options.pop("center_proj", center_proj)
    head: dict[str, Any] = {"name": "clip2video", "center_proj": center_proj}
    if center_proj:
        head["centers"] = len(state["weight_center"])
    return _config(state, options, agg_module, head, temporal_proj=projection, mixed_head_masks=True)


@FAMILIES.register("glscl")
def _glscl(state: State, options: dict[str, Any]) -> ModelConfig:
    agg_module = options.pop("agg_module", None) or _agg_module_of(state)
    flags: dict[str, Any] = {
        key: bool(options.pop(key)) for key in ("query_share", "cross_att_share") if key in options
    }
    head: dict[str, Any] = {
        "name": "glscl",
        "queries": len(state["spatial_queries"]),
        "layers": count_layers(state, "transformer_decoder_noun", "layers"),
        "feed_forward": len(state["decoder_layer_noun.linear1.weight"]),
        **flags,
    }
    towers = {"mask_padded_words": True, "freeze_conv1": True}
    return _config(state, options, agg_module, head, towers)
