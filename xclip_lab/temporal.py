"""`agg_module`: what runs over a video's frame vectors before they are pooled (CLIP4Clip, CLIP2Video)."""

from __future__ import annotations

import torch
from open_clip.model import CLIP
from open_clip.transformer import Transformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from xclip_lab.blocks import (
    added_transformer,
    copy_blocks,
    copy_positions,
    first_positions,
    heads_of,
    key_mask,
    learned_positions,
)
from xclip_lab.config import TemporalConfig


class AggModule(nn.Module):
    """Base of the `agg_module`s: frames `[B, F, D]` and mask `[B, F]` in, frames `[B, F, D]` out.

    Args:
        width: D. positions: rows of the learned frame positions.
    """

    def __init__(self, config: TemporalConfig, width: int, positions: int) -> None:
        super().__init__()
        self.config, self.width = config, width

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def attention_mask(self, mask: Tensor) -> Tensor:
        """`[B, N]`, 1 = real, to the additive mask of an added transformer, whose heads may be mixed up."""
        return key_mask(mask, heads_of(self.width), torch.float32, self.config.mixed_head_masks)

    def start_from_clip(self, clip: CLIP) -> None:
        """Take over what officially starts as a copy of CLIP's towers."""


class MeanP(AggModule):
    """`meanP`: frames unchanged."""

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        return frames


class SeqLSTM(AggModule):
    """`seqLSTM`: one LSTM layer over the real frames, added to its input.

    Past a video's own length up to the longest of the batch the output is the frame itself, beyond that twice
    the frame (ledger 14). `frame_position_embeddings` exists in the official checkpoints and is not used.
    """

    def __init__(self, config: TemporalConfig, width: int, positions: int) -> None:
        super().__init__(config, width, positions)
        self.frame_position_embeddings = learned_positions(positions, width)
        self.lstm_visual = nn.LSTM(width, width, batch_first=True)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(-1).cpu()
        packed = pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
        self.lstm_visual.flatten_parameters()
        output, _ = pad_packed_sequence(self.lstm_visual(packed)[0], batch_first=True)
        return torch.cat([output, frames[:, output.shape[1] :]], dim=1) + frames

    def start_from_clip(self, clip: CLIP) -> None:
        """Positions start as CLIP's text positions."""
        copy_positions(self.frame_position_embeddings, clip.positional_embedding)


class SeqTransf(AggModule):
    """`seqTransf`: frames plus learned positions through transformer blocks, added to the frames."""

    def __init__(self, config: TemporalConfig, width: int, positions: int) -> None:
        super().__init__(config, width, positions)
        self.frame_position_embeddings = learned_positions(positions, width)
        self.transformerClip = added_transformer(width, config.layers)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        positioned = frames + first_positions(
            self.frame_position_embeddings.weight, frames.shape[1], "frames"
        )
        return self.transformerClip(positioned, attn_mask=self.attention_mask(mask)) + frames

    def start_from_clip(self, clip: CLIP) -> None:
        """Blocks start as the first blocks of CLIP's text transformer, positions as its positions."""
        copy_positions(self.frame_position_embeddings, clip.positional_embedding)
        copy_blocks(self.transformerClip, clip.transformer)


class TemporalDifference(SeqTransf):
    """`tdb`: between each two frames stands a token for their difference (CLIP2Video 3.2).

    The 2F - 1 tokens f0 d0 f1 d1 ... go through the transformer; the frames' places are read out and added to
    the frames. `temporal_proj` says what a difference becomes first.
    """

    def __init__(self, config: TemporalConfig, width: int, positions: int) -> None:
        super().__init__(config, width, positions)
        self.type_position_embeddings = learned_positions(2, width)
        self.trans_layernorm = nn.LayerNorm(width)
        if config.temporal_proj == "sigmoid_selfA":
            self.frame2t_attention = added_transformer(width, 1)
        elif config.temporal_proj == "sigmoid_mlp":
            self.frame2t_projection = nn.Parameter(width**-0.5 * torch.randn(width, width))

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        return self.with_differences(frames, mask, self.transformerClip)

    def with_differences(self, frames: Tensor, mask: Tensor, transformer: Transformer) -> Tensor:
        """Frames `[B, F, D]` after a transformer that also saw their differences, added to the frames."""
        tokens, token_mask = self.interleave(frames, mask)
        return transformer(tokens, attn_mask=self.attention_mask(token_mask))[:, ::2] + frames

    def interleave(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens `[B, 2F - 1, D]` with positions and types added, and their mask.

        A difference has the position of the earlier frame, and officially its mask too, so that the
        difference with the first padded frame counts; `mask_differences` hides it (ledger 4).
        """
        batch, count, width = frames.shape
        positions = first_positions(self.frame_position_embeddings.weight, count, "frames")
        of_difference, of_frame = self.type_position_embeddings.weight
        tokens = frames.new_empty(batch, 2 * count - 1, width)
        tokens[:, ::2] = frames + positions + of_frame
        tokens[:, 1::2] = self._differences(frames, mask) + positions[:-1] + of_difference
        token_mask = mask.repeat_interleave(2, dim=1)[:, :-1].clone()
        if self.config.mask_differences:
            token_mask[:, 1::2] = mask[:, 1:]
        return tokens, token_mask

    def _differences(self, frames: Tensor, mask: Tensor) -> Tensor:
        """`[B, F - 1, D]`, each the later frame less the earlier one, projected to (-1, 1)."""
        differences = frames[:, 1:] - frames[:, :-1]
        if self.config.temporal_proj == "default" or not differences.shape[1]:
            return differences
        if self.config.temporal_proj == "sigmoid_mlp":
            projected = differences @ self.frame2t_projection
        else:
            positioned = differences + self.frame_position_embeddings.weight[1 : frames.shape[1]]
            projected = self.frame2t_attention(positioned, attn_mask=self.attention_mask(mask[:, 1:]))
        return 2 * self.trans_layernorm(projected).sigmoid() - 1

    def start_from_clip(self, clip: CLIP) -> None:
        """As `seqTransf`; types start as the first two text positions, the projection as visual.proj."""
        super().start_from_clip(clip)
        copy_positions(self.type_position_embeddings, clip.positional_embedding)
        if self.config.temporal_proj == "sigmoid_selfA":
            copy_blocks(self.frame2t_attention, clip.transformer)
        elif self.config.temporal_proj == "sigmoid_mlp":
            start = clip.visual.proj[: self.width]
            with torch.no_grad():
                self.frame2t_projection[: len(start)] = start


AGG_MODULES: dict[str, type[AggModule]] = {
    "meanP": MeanP,
    "seqLSTM": SeqLSTM,
    "seqTransf": SeqTransf,
    "tdb": TemporalDifference,
}
