"""CLIP2Video written down once more, plainly, as `naive_recipe`: TDB, TAB and their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.unit.naive_recipe import Weights, added, norm, pooled, unit


def differences(frames: Tensor, mask: Tensor, p: Weights, projection: str, mixed: bool) -> Tensor:
    """`[B, F - 1, D]`, what stands between each two frames."""
    count = frames.shape[1]
    if count == 1:
        return frames[:, :0]
    d = torch.stack([frames[:, j + 1] - frames[:, j] for j in range(count - 1)], 1)
    if projection == "default":
        return d
    if projection == "sigmoid_mlp":
        d = d @ p["frame2t_projection"]
    else:
        d = d + p["frame_position_embeddings.weight"][1:count]
        d = added(d, mask[:, 1:], p, "frame2t_attention", 1, mixed)
    return 2 * norm(d, p, "trans_layernorm", 1e-5).sigmoid() - 1


def interleaved(
    frames: Tensor, mask: Tensor, p: Weights, projection: str, mixed: bool = False, repaired: bool = False
) -> tuple[Tensor, Tensor]:
    """f0 d0 f1 d1 ... and the mask. A difference has the earlier frame's; `repaired`: the later one's."""
    d = differences(frames, mask, p, projection, mixed)
    positions, types = p["frame_position_embeddings.weight"], p["type_position_embeddings.weight"]
    tokens, masks = [], []
    for j in range(frames.shape[1]):
        tokens.append(frames[:, j] + positions[j] + types[1])
        masks.append(mask[:, j])
        if j + 1 < frames.shape[1]:
            tokens.append(d[:, j] + positions[j] + types[0])
            masks.append(mask[:, j + 1 if repaired else j])
    return torch.stack(tokens, 1), torch.stack(masks, 1)


def with_differences(frames: Tensor, mask: Tensor, p: Weights, blocks: tuple[str, int], **how) -> Tensor:
    """The frames after the named blocks saw them with their differences, plus the frames."""
    tokens, token_mask = interleaved(frames, mask, p, **how)
    x = added(tokens, token_mask, p, *blocks, mixed=how.get("mixed", False))
    return torch.stack([x[:, 2 * j] + frames[:, j] for j in range(frames.shape[1])], 1)


def tab_tokens(frames: Tensor, mask: Tensor, p: Weights, kind: str, **how) -> tuple[Tensor, Tensor]:
    """What TAB assigns of a video: added tokens of every second frame, then all frames."""
    if kind == "plain":
        return frames, mask
    kept = torch.stack([frames[:, j] for j in range(0, frames.shape[1], 2)], 1)
    kept_mask = torch.stack([mask[:, j] for j in range(0, frames.shape[1], 2)], 1)
    if kind == "TAB_TDB":
        extra = with_differences(kept, kept_mask, p, ("actionClip", 1), **how)
    else:
        positioned = kept + p["frame_position_embeddings.weight"][: kept.shape[1]]
        extra = added(positioned, kept_mask, p, "actionClip", 1, how.get("mixed", False)) + kept
    return torch.cat([extra, frames], 1), torch.cat([kept_mask, mask], 1)


def aligned(tokens: Tensor, mask: Tensor, p: Weights) -> Tensor:
    """TAB's vector: each centre gathers what is assigned to it, less its own embedding."""
    rows = []
    for row, real in zip(tokens, mask, strict=True):
        gathered = [torch.zeros_like(centre) for centre in p["weight_center"]]
        for token, counts in zip(row, real, strict=True):
            shares = torch.stack([token @ centre for centre in p["weight_center"]]).softmax(0)
            for k, share in enumerate(shares):
                gathered[k] = gathered[k] + counts * share * (token - p["emb_center"][k])
        rows.append(unit(torch.stack([unit(z) for z in gathered]).mean(0)))
    return torch.stack(rows)


def clip2video_scores(
    sentences: Tensor,
    words: Tensor,
    text_mask: Tensor,
    frames: Tensor,
    mask: Tensor,
    p: Weights,
    kind: str,
    layers: int,
    **how,
) -> tuple[Tensor, Tensor]:
    """Sentence-video and TAB's scores, `[T, V]` each, under TDB, before the scale."""
    videos = pooled(with_differences(frames, mask, p, ("transformerClip", layers), **how), mask)
    without_start = torch.cat([torch.zeros_like(text_mask[:, :1]), text_mask[:, 1:]], 1)
    texts = aligned(words, without_start, p)
    return unit(sentences) @ videos.T, texts @ aligned(*tab_tokens(frames, mask, p, kind, **how), p).T
