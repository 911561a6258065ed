"""Taps: where a reader may look inside. They change nothing; an attention can have its weights pass one."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import Transformer
from torch import Tensor, nn


class Tap(nn.Module):
    """Identity with a name. A forward hook on it reads the value, and replaces it by what it returns.

    Args:
        shape: the axes of what passes, for example `"[T, V, W, F]"`.
    """

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return self.shape


class TappedAttention(nn.MultiheadAttention):
    """torch's attention, its weights on a tap.

    The fused kernel never forms the weights, so they are computed beside it, and only where somebody hooks
    the tap. Reading changes no number; where a hook replaces the weights, the output is made of its own.
    """

    weights_softmax: Tap

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any):  # type: ignore[override]
        """As torch's, tokens `[B, N, D]`; of its options those that open_clip's blocks give."""
        output = super().forward(query, key, value, **options)
        if not self.weights_softmax._forward_hooks:
            return output
        projected = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        of_query, of_key, of_value = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in projected.chunk(3, -1)
        )
        scores = of_query @ of_key.transpose(-1, -2) / self.head_dim**0.5
        mask = options.get("attn_mask")  # [N, N] or [B * H, N, N]
        if mask is not None:
            scores = scores + (mask if mask.ndim == 2 else mask.unflatten(0, scores.shape[:2]))
        weights = scores.softmax(-1)
        seen = self.weights_softmax(weights)
        if seen is weights:
            return output
        return self.out_proj((seen @ of_value).transpose(1, 2).flatten(2)), None


def tap_attention(transformer: Transformer) -> Transformer:
    """The transformer with a tap `[B, H, N, N]` in each of its blocks, at `attn.weights_softmax`.

    Parameters, their names and their start stay as they are, so the attention modules change class in place.
    """
    for block in transformer.resblocks:
        block.attn.__class__ = TappedAttention
        block.attn.weights_softmax = Tap("[B, H, N, N]: over tokens")
    return transformer
