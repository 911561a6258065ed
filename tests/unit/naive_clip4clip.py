"""CLIP4Clip's tight type written down once more, pair by pair, as `naive_recipe` does."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.unit.naive_recipe import Weights, added, linear, norm, quick_gelu


def tight_scores(sentences: Tensor, frames: Tensor, mask: Tensor, p: Weights, layers: int) -> Tensor:
    """`[T, V]` of `sentences [T, D]` with `frames [V, F, D]`, whose real ones `mask` tells."""
    positions = p["cross.embeddings.position_embeddings.weight"][: 1 + frames.shape[1]]
    scores = []
    for sentence in sentences:
        for video, real in zip(frames, mask, strict=True):
            tokens = torch.cat([sentence[None], video]) + positions
            seen = torch.cat([torch.ones(1), real])
            first = added(tokens[None], seen[None], p, "cross.transformer", layers)[0, 0]
            inner = linear(norm(first, p, "cross.pooler.ln_pool", 1e-12), p, "cross.pooler.dense")
            scores.append(linear(quick_gelu(inner), p, "similarity_dense")[0])
    return torch.stack(scores).view(len(sentences), len(frames))
