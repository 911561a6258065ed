"""GLSCL written down once more, plainly, as `naive_recipe`: queries, scores and auxiliary losses."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.unit.naive_recipe import Weights, attention, linear, norm, unit

HEADS = 8


def decoded(queries: Tensor, tokens: Tensor, p: Weights, name: str, layers: int) -> Tensor:
    """`queries [Q, D]` through a post-norm decoder that sees all of `tokens [B, N, D]`, padding too."""
    x, nothing = queries.expand(len(tokens), -1, -1), torch.zeros(1, 1, 1, 1)
    for layer in range(layers):
        q = f"{name}.layers.{layer}"
        x = norm(x + attention(x, x, p, f"{q}.self_attn", HEADS, nothing), p, f"{q}.norm1", 1e-5)
        seen = attention(x, tokens, p, f"{q}.multihead_attn", HEADS, nothing)
        x = norm(x + seen, p, f"{q}.norm2", 1e-5)
        inner = linear(x, p, f"{q}.linear1").clamp(min=0)
        x = norm(x + linear(inner, p, f"{q}.linear2"), p, f"{q}.norm3", 1e-5)
    return unit(x)


def queries_of(
    words: Tensor, frames: Tensor, p: Weights, layers: int, query_share: bool, cross_att_share: bool
) -> tuple[Tensor, Tensor]:
    """Those of texts and of videos, `[B, Q, D]` each."""
    of_text = p["spatial_queries"] if query_share else p["noun_queries"]
    video_decoder = "transformer_decoder_noun" if cross_att_share else "transformer_decoder_spatial"
    texts = decoded(of_text, words, p, "transformer_decoder_noun", layers)
    return texts, decoded(p["spatial_queries"], frames, p, video_decoder, layers)


def global_scores(sentences: Tensor, frames: Tensor, mask: Tensor, temp: float) -> Tensor:
    scores = []
    for sentence in sentences:
        for video, real in zip(frames, mask, strict=True):
            weights = torch.stack([sentence @ frame / temp for frame in video]).softmax(0) * real
            scores.append(unit(sentence) @ unit(sum(w * f for w, f in zip(weights, video, strict=True))))
    return torch.stack(scores).view(len(sentences), len(frames))


def local_scores(texts: Tensor, videos: Tensor) -> Tensor:
    """The mean over queries of the products of matching ones."""
    rows = [[sum(q @ r for q, r in zip(t, v, strict=True)) / len(t) for v in videos] for t in texts]
    return torch.stack([torch.stack(row) for row in rows])


def inter_consistency(texts: Tensor, videos: Tensor, beta: float) -> Tensor:
    batch, queries, width = texts.shape
    apart = (sum(texts) / batch - sum(videos) / batch).pow(2).sum() / (queries * width)
    overlap = sum(
        (sum(texts[b, q] @ videos[b, q] for b in range(batch)) / queries - 0.75) ** 2 for q in range(queries)
    )
    return apart + beta * overlap


def intra_diversity(videos: Tensor) -> Tensor:
    """Margin 0.1, along rows and columns of the batch mean of the queries' products."""
    gram, total = sum(v @ v.T for v in videos) / len(videos), videos.new_zeros(())
    count = len(gram)
    for q in range(count):
        for other in range(count):
            if q != other:
                total = total + (0.1 - gram[q, q] + gram[q, other]).clamp(min=0)
                total = total + (0.1 - gram[q, q] + gram[other, q]).clamp(min=0)
    return total / (count * (count - 1))
