"""CLIP2Video (Fang et al. 2021): the temporal alignment block, TAB, beside the sentence-video score."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_lab.blocks import added_transformer, check_width, copy_blocks, first_positions
from xclip_lab.errors import ConfigError
from xclip_lab.heads.base import HEADS, Head, HeadOutput, Tap, masked_frame_mean
from xclip_lab.ranges import ClosedUnitInterval, PositiveInt
from xclip_lab.tokens import TokenSet

if TYPE_CHECKING:
    from xclip_lab.config import TemporalConfig
    from xclip_lab.temporal import AggModule, SeqTransf, TemporalDifference

TAB = "tab"
"""The name of TAB's vector in `TokenSet.extra`."""


@dataclass(frozen=True)
class Clip2VideoConfig:
    """CLIP2Video's settings.

    `center_proj`: which tokens TAB adds to a video's frames before it assigns them to centres: none
    (`plain`); every second frame through a layer of its own (`TAB`); that layer over those frames and their
    differences (`TAB_TDB`, as released). null leaves TAB out. `centers` is K, shared by texts and videos.
    `center_weight` is the weight w of the sentence-video score and loss; TAB has 1 - w.
    """

    name: str = "clip2video"
    center_proj: Literal["plain", "TAB", "TAB_TDB"] | None = "TAB_TDB"
    centers: PositiveInt = 5
    center_weight: ClosedUnitInterval = 0.5


@HEADS.register("clip2video")
class Clip2VideoHead(Head):
    """The head. TDB, the other half of CLIP2Video, is the `agg_module` `tdb`."""

    pairs_alone = True
    config_class = Clip2VideoConfig
    family = "clip2video"
    official = MappingProxyType({"temporal.mixed_head_masks": True})
    video_tokens = "frames"

    def __init__(self, config: Clip2VideoConfig, width: int, max_words: int, max_frames: int) -> None:
        super().__init__(config, width, max_words, max_frames)
        if config.center_proj:
            self.weight_center = nn.Parameter(torch.randn(config.centers, width) / 8)
            self.emb_center = nn.Parameter(torch.randn(config.centers, width) / 8)
        if config.center_proj in ("TAB", "TAB_TDB"):
            self.actionClip = added_transformer(width, 1)
        self.word_assignment_softmax = Tap("[T, W, K]: over centres")
        self.frame_assignment_softmax = Tap("[V, N, K]: over centres; the added tokens follow the frames")
        self.sentence_score = Tap("[T, V]")
        self.tab_score = Tap("[T, V]")

    @classmethod
    def check(cls, config: Any, temporal: TemporalConfig, width: int | None) -> None:
        """TAB's added tokens use parts of the `agg_module`."""
        needs = {"TAB": ("seqLSTM", "seqTransf", "tdb"), "TAB_TDB": ("tdb",)}.get(config.center_proj)
        if needs and temporal.agg_module not in needs:
            part = "frame positions" if config.center_proj == "TAB" else "difference tokens"
            raise ConfigError(
                f"head.center_proj: {config.center_proj} uses the {part} of temporal.agg_module and "
                f"{temporal.agg_module} has none; set it to {' or '.join(needs)}, or head.center_proj=plain"
            )
        if needs:
            check_width(width, f"head.center_proj={config.center_proj}")

    def join(self, temporal: AggModule) -> None:
        """Official checkpoints hold TDB's LayerNorm even where nothing uses it."""
        if not hasattr(temporal, "trans_layernorm"):
            self.trans_layernorm = nn.LayerNorm(self.width)

    def start_from_clip(self, clip: CLIP) -> None:
        """TAB's layer starts as the first block of CLIP's text transformer."""
        if hasattr(self, "actionClip"):
            copy_blocks(self.actionClip, clip.transformer)

    def encode_text(self, text: TokenSet) -> TokenSet:
        """Adds TAB's vector; the start mark is no word to it."""
        if not self.config.center_proj:
            return text
        mask = text.mask.clone()
        mask[:, 0] = 0
        aligned = self._align(text.tokens, mask, self.word_assignment_softmax)
        return TokenSet(text.pooled, text.tokens, text.mask, {TAB: aligned})

    def encode_video(self, frames: Tensor, mask: Tensor, temporal: AggModule) -> TokenSet:
        """Adds TAB's vector, of the frames before `agg_module` and the tokens added to them."""
        pooled = masked_frame_mean(temporal(frames, mask), mask)
        if not self.config.center_proj:
            return TokenSet(pooled, frames, mask)
        tokens, token_mask = self.with_added_tokens(frames, mask, temporal)
        aligned = self._align(tokens, token_mask, self.frame_assignment_softmax)
        return TokenSet(pooled, frames, mask, {TAB: aligned})

    def with_added_tokens(self, frames: Tensor, mask: Tensor, temporal: AggModule) -> tuple[Tensor, Tensor]:
        """TAB's tokens of a video (CLIP2Video 3.3): all frames as they are, then every second frame in the
        context of the others. `[B, N, D]` and their mask `[B, N]`."""
        if self.config.center_proj == "plain":
            return frames, mask
        kept, kept_mask = frames[:, ::2], mask[:, ::2]
        if self.config.center_proj == "TAB_TDB":
            added = cast("TemporalDifference", temporal).with_differences(kept, kept_mask, self.actionClip)
        else:
            positions = cast("SeqTransf", temporal).frame_position_embeddings.weight
            positioned = kept + first_positions(positions, kept.shape[1], "frames")
            added = self.actionClip(positioned, attn_mask=temporal.attention_mask(kept_mask)) + kept
        return torch.cat([frames, added], dim=1), torch.cat([mask, kept_mask], dim=1)

    def _align(self, tokens: Tensor, mask: Tensor, softmax: Tap) -> Tensor:
        """Soft assignment of `tokens [B, N, D]` to the centres and the mean of what each gathers (3.3)."""
        weights = softmax((tokens @ self.weight_center.T).softmax(-1))
        weights = weights * mask.to(weights.dtype).unsqueeze(-1)
        gathered = weights.transpose(1, 2) @ tokens - weights.sum(1).unsqueeze(-1) * self.emb_center
        return normalize(normalize(gathered, dim=-1).mean(1), dim=-1)

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        """Logits before CLIP's scale; the loss contrasts both scores with the weights of the sum."""
        main = self.sentence_score(normalize(text.pooled, dim=-1) @ video.pooled.T)
        if not self.config.center_proj:
            return HeadOutput(main)
        tab = self.tab_score(text.extra[TAB] @ video.extra[TAB].T)
        weight = float(self.config.center_weight)
        return HeadOutput(
            weight * main + (1 - weight) * tab,
            contrasted={"sentence_video_loss": (weight, main), "tab_loss": (1 - weight, tab)},
        )
