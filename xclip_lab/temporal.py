"""`agg_module`: what runs over a video's frame vectors before they are pooled (CLIP4Clip 3.3)."""

from __future__ import annotations

from functools import partial

import torch
from open_clip.model import CLIP
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from xclip_lab.config import TemporalConfig

MASKED = -1e6
"""What the official code adds to the attention of padded keys: finite, so an all-padded row stays finite."""


def added_transformer(width: int, layers: int) -> Transformer:
    """Blocks that are added to the towers: QuickGELU, heads = width / 64, LayerNorm eps 1e-12."""
    norm = partial(LayerNorm, eps=1e-12)
    return Transformer(width, layers, max(1, width // 64), act_layer=QuickGELU, norm_layer=norm)


def key_mask(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Additive attention mask `[B * heads, N, N]` that hides padded keys; `mask` is `[B, N]`, 1 = real."""
    hidden = (1.0 - mask.to(dtype)) * MASKED
    return hidden[:, None, :].expand(-1, mask.shape[1], -1).repeat_interleave(heads, dim=0)


class AggModule(nn.Module):
    """Base of the `agg_module`s: frames `[B, F, D]` and mask `[B, F]` in, frames `[B, F, D]` out.

    Args:
        width: D. positions: rows of the learned frame positions.
    """

    def __init__(self, config: TemporalConfig, width: int, positions: int) -> None:
        super().__init__()

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def start_from_clip(self, clip: CLIP) -> None:
        """Take over what officially starts as a copy of CLIP's text tower."""


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
        self.frame_position_embeddings = _positions(positions, width)
        self.lstm_visual = nn.LSTM(width, width, batch_first=True)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(-1).cpu()
        packed = pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
        self.lstm_visual.flatten_parameters()
        output, _ = pad_packed_sequence(self.lstm_visual(packed)[0], batch_first=True)
        return torch.cat([output, frames[:, output.shape[1] :]], dim=1) + frames

    def start_from_clip(self, clip: CLIP) -> None:
        """Positions start as CLIP's text positions."""
        _copy_positions(self.frame_position_embeddings, clip)


class SeqTransf(AggModule):
    """`seqTransf`: frames plus learned positions through transformer blocks, added to the frames."""

    def __init__(self, config: TemporalConfig, width: int, positions: int) -> None:
        super().__init__(config, width, positions)
        self.frame_position_embeddings = _positions(positions, width)
        self.transformerClip = added_transformer(width, config.layers)
        self.heads = max(1, width // 64)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        positioned = frames + self.frame_position_embeddings.weight[: frames.shape[1]]
        attention_mask = key_mask(mask, self.heads, frames.dtype)
        return self.transformerClip(positioned, attn_mask=attention_mask) + frames

    def start_from_clip(self, clip: CLIP) -> None:
        """Blocks start as the first blocks of CLIP's text transformer, positions as its positions."""
        _copy_positions(self.frame_position_embeddings, clip)
        for ours, theirs in zip(self.transformerClip.resblocks, clip.transformer.resblocks, strict=False):
            ours.load_state_dict(theirs.state_dict())


def _positions(count: int, width: int) -> nn.Embedding:
    """Learned positions with the official initialisation; where CLIP's widths agree its own replace it."""
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding


def _copy_positions(embedding: nn.Embedding, clip: CLIP) -> None:
    with torch.no_grad():
        embedding.weight.copy_(clip.positional_embedding[: embedding.num_embeddings])


AGG_MODULES: dict[str, type[AggModule]] = {"meanP": MeanP, "seqLSTM": SeqLSTM, "seqTransf": SeqTransf}
