"""Transformer blocks that are added to the towers, and the masks that they take."""

from __future__ import annotations

from functools import partial

import torch
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn

from xclip_lab.errors import ConfigError, InputError
from xclip_lab.precision import as_around
from xclip_lab.tap import tap_attention

MASKED = -1e6
"""What the official code adds to the attention of padded keys: finite, so an all-padded row stays finite."""

EPSILON = 1e-12
"""Of every LayerNorm in an added block."""


class _AddedTransformer(Transformer):
    """open_clip's, but that it computes as autocast says and gives the precision that it was given."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, D]` and the additive mask of `key_mask`, `[B * heads, N, N]`, to `[B, N, D]`."""
        with as_around(x.device):
            return super().forward(x, attn_mask=attn_mask).to(x.dtype)


def added_transformer(width: int, layers: int) -> Transformer:
    """Blocks that are added to the towers: QuickGELU, heads = width / 64, LayerNorm eps 1e-12; with taps."""
    norm = partial(LayerNorm, eps=EPSILON)
    return tap_attention(
        _AddedTransformer(width, layers, heads_of(width), act_layer=QuickGELU, norm_layer=norm)
    )


def added_linear(width: int, outputs: int) -> nn.Linear:
    """A linear layer that starts as officially: normal weights of deviation 0.02, no bias."""
    linear = nn.Linear(width, outputs)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def heads_of(width: int) -> int:
    """Attention heads of a block: one for each 64 of the width."""
    return max(1, width // 64)


def check_width(width: int | None, user: str) -> None:
    """Refuse a width that these heads do not divide; `user` is what would use such a block.

    Raises:
        ConfigError: names the nearest widths that fit.
    """
    if width and width % heads_of(width):
        below = width // 64 * 64
        raise ConfigError(
            f"towers.architecture.embed_dim: {width} is not allowed with {user}, whose blocks have a head "
            f"for each 64 of the width (the next that fit: {below}, {below + 64})"
        )


def key_mask(mask: Tensor, heads: int, dtype: torch.dtype, mixed: bool = False) -> Tensor:
    """Additive attention mask `[B * heads, N, N]` that hides padded keys; `mask` is `[B, N]`, 1 = real.

    Args:
        mixed: CLIP2Video's order, in which head h of row b takes the mask of row `(b * heads + h) mod B`
            (ledger 3). With one head it is the right one.
    """
    hidden = ((1.0 - mask.to(dtype)) * MASKED)[:, None, :].expand(-1, mask.shape[1], -1)
    return hidden.repeat(heads, 1, 1) if mixed else hidden.repeat_interleave(heads, dim=0)


def learned_positions(count: int, width: int) -> nn.Embedding:
    """Learned positions with the official initialisation; where CLIP's widths agree its own replace it."""
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding


def first_positions(positions: Tensor, count: int, of: str) -> Tensor:
    """Those of `count` tokens, `[count, D]`, out of learned `positions [N, D]`; `of` is what they are.

    Raises:
        InputError: more tokens than positions.
    """
    if count > len(positions):
        raise InputError(f"{count} {of} are too many: there are {len(positions)} learned positions")
    return positions[:count]


@torch.no_grad()
def copy_positions(embedding: nn.Embedding, positions: Tensor) -> None:
    """Start as the first rows of `positions [N, D]`, as far as there are."""
    rows = positions[: embedding.num_embeddings]
    embedding.weight[: len(rows)] = rows


def copy_blocks(ours: Transformer, theirs: Transformer) -> None:
    """Start as the first blocks of another transformer, as far as it has them."""
    for block, source in zip(ours.resblocks, theirs.resblocks, strict=False):
        block.load_state_dict(source.state_dict())
