"""CLIP4Clip (Luo et al. 2022): one vector a video against the sentence, or a cross transformer a pair."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from open_clip.model import CLIP
from open_clip.transformer import LayerNorm, QuickGELU
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_lab.blocks import (
    EPSILON,
    added_linear,
    added_transformer,
    check_width,
    copy_blocks,
    copy_positions,
    first_positions,
    heads_of,
    key_mask,
    learned_positions,
)
from xclip_lab.errors import ConfigError
from xclip_lab.heads.base import HEADS, Head, HeadOutput
from xclip_lab.ranges import PositiveInt
from xclip_lab.tokens import TokenSet

if TYPE_CHECKING:
    from xclip_lab.config import TemporalConfig


@HEADS.register("clip4clip")
class Clip4ClipHead(Head):
    """The cosine of sentence and video (CLIP4Clip 3.3, parameter-free and sequential type): the `agg_module`
    is the method."""

    pairs_alone = True
    family = "clip4clip"

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        return HeadOutput(normalize(text.pooled, dim=-1) @ video.pooled.T)


@dataclass(frozen=True)
class TightTransfConfig:
    """CLIP4Clip's tight type: `layers` of the cross transformer, rows of its `positions`."""

    name: str = "tightTransf"
    layers: PositiveInt = 4
    positions: PositiveInt = 77


@HEADS.register("tightTransf")
class TightTransfHead(Head):
    """A transformer over the sentence and the frames of each pair (CLIP4Clip 3.3, tight type).

    It costs one pass a pair, and its logit carries no CLIP scale, in training or evaluation. A video without
    a valid frame has a finite score officially.
    """

    config_class = TightTransfConfig
    family = "clip4clip"
    video_tokens = "frames"
    scaled_loss = False
    scaled_similarity = False

    def __init__(self, config: TightTransfConfig, width: int, max_words: int, max_frames: int) -> None:
        super().__init__(config, width, max_words, max_frames)
        if config.positions <= max_frames:
            raise ConfigError(
                f"head.positions: {config.positions} is not allowed with max_frames={max_frames} (the "
                f"sentence and the frames take {max_frames + 1})"
            )
        self.cross = _Cross(config, width)
        self.similarity_dense = added_linear(width, 1)

    @classmethod
    def check(cls, config: Any, temporal: TemporalConfig, width: int | None) -> None:
        """Only `meanP`: the cross transformer sees the frames themselves, in place of an `agg_module`."""
        if temporal.agg_module != "meanP":
            raise ConfigError(
                f"temporal.agg_module: {temporal.agg_module} makes no sense with head.name=tightTransf, "
                "whose cross transformer takes CLIP's frames themselves; set temporal.agg_module=meanP"
            )
        check_width(width, "head.name=tightTransf")

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        texts, videos = len(text), len(video)
        sentences = text.pooled[:, None, None].expand(-1, videos, 1, -1)  # [T, V, 1, D]
        frames = video.tokens[None].expand(texts, -1, -1, -1)  # [T, V, F, D]
        tokens = torch.cat([sentences, frames], dim=2).flatten(0, 1)
        # One mask a video, the sentence's place always real; rows are pairs, text-major.
        mask = torch.cat([video.mask.new_ones(videos, 1), video.mask], dim=1)
        mask = key_mask(mask, heads_of(self.width), tokens.dtype).repeat(texts, 1, 1)
        return HeadOutput(self.similarity_dense(self.cross(tokens, mask)).view(texts, videos))

    def block_on(self, device: torch.device) -> tuple[int, int]:
        """Each pair has the activations of a transformer: ViT-B/32's sizes take 0.4 MB."""
        return 8, 32

    def start_from_clip(self, clip: CLIP) -> None:
        """The cross transformer starts as the first blocks of CLIP's text transformer, with its positions."""
        copy_positions(self.cross.embeddings.position_embeddings, clip.positional_embedding)
        copy_blocks(self.cross.transformer, clip.transformer)


class _Cross(nn.Module):
    """The cross transformer under its official names: embeddings, blocks, pooler."""

    def __init__(self, config: TightTransfConfig, width: int) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config.positions, width)
        self.transformer = added_transformer(width, config.layers)
        self.pooler = nn.Sequential(
            OrderedDict(
                ln_pool=LayerNorm(width, eps=EPSILON),
                dense=added_linear(width, width),
                activation=QuickGELU(),
            )
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """`tokens [B, N, D]`, additive `mask [B * heads, N, N]` -> the first token, pooled `[B, D]`."""
        return self.pooler(self.transformer(self.embeddings(tokens), attn_mask=mask)[:, 0])


class _Embeddings(nn.Module):
    """Positions, and the dropout that follows them."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.position_embeddings = learned_positions(positions, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        return self.dropout(
            tokens + first_positions(self.position_embeddings.weight, count, "tokens of a pair")
        )
