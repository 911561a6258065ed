"""AOSM, attention over the similarity matrix (X-CLIP 3.4), written as it reads. Also the plain fusions that
the paper compares it with. This is the definition; anything faster must equal it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xclip_lab.aosm.matrices import Matrices


def masked_softmax(scores: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Softmax over `dim`; where `mask` (broadcastable, 1 = real) is given, padded entries get weight 0."""
    if mask is not None:
        scores = scores.masked_fill(~mask.bool(), -torch.inf)
    return scores.softmax(dim)


def attend(
    scores: Tensor,
    mixing: Tensor,
    temperature: float,
    mask: Tensor | None = None,
    tap: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Tensor:
    """Attention of a score vector over itself: `sum_k (sum_i softmax_i(x / tau)_i M[i, k]) x_k`.

    With the identity as `mixing` it is a soft maximum: tau -> 0 gives the maximum, tau -> inf the mean.

    Args:
        scores: `[..., N]`. mixing: `[N, N]`, learned. temperature: tau.
        mask: broadcastable to `scores`, 1 = real. Given, padded entries neither weigh nor are weighed; None
            is the official behaviour, in which padding takes part.
        tap: sees the softmax weights `[..., N]` and may replace them.

    Returns:
        `[...]`.

    >>> attend(torch.tensor([0.2, 0.8]), torch.eye(2), temperature=0.01).item()
    0.800000011920929
    """
    weights = tap(masked_softmax(scores / temperature, mask, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask.bool(), 0.0)
    return ((weights @ mixing) * scores).sum(-1)


def matrix_aosm(
    words: Tensor,
    frames: Tensor,
    matrices: Matrices,
    temperature: float,
    word_mask: Tensor | None = None,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """Both stages on the word x frame matrix of every pair (X-CLIP eq. 9 to 16).

    Args:
        words: `[T, W, D]`, normalised, already times `local_mat_weight`. frames: `[V, F, D]`, normalised.
        word_mask: `[T, W]`, frame_mask: `[V, F]`, 1 = real; None for the official behaviour.

    Returns:
        `[T, V]`.
    """
    scores = torch.einsum("twd,vfd->tvwf", words, frames)
    of_words = None if word_mask is None else word_mask[:, None]
    of_frames = None if frame_mask is None else frame_mask[None]
    of_each = [None if mask is None else mask[:, :, None] for mask in (of_words, of_frames)]
    a = attend(scores.mT, matrices.word, temperature, of_each[0])  # [T, V, F]
    b = attend(scores, matrices.frame, temperature, of_each[1])  # [T, V, W]
    sentence_to_frame = attend(a, matrices.frame2, temperature, of_frames)
    video_to_word = attend(b, matrices.word2, temperature, of_words)
    return (sentence_to_frame + video_to_word) / 2


def pool(scores: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """`mean` or `max` of `scores [..., N]` over its last axis, over real entries where `mask` is given."""
    if kind == "max":
        return (scores if mask is None else scores.masked_fill(~mask.bool(), -torch.inf)).amax(-1)
    if mask is None:
        return scores.mean(-1)
    real = mask.to(scores.dtype).expand_as(scores)
    return (scores * real).sum(-1) / real.sum(-1)
