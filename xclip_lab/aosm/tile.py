"""AOSM of one tile of similarities `[t, W, F, v]` at temperature 1, and its gradient written out.

With `E = exp(S)`, `U = M_w S` and `Z = S M_f^T`: `a_f = sum_w E U / sum_w E`, `b_w = sum_f E Z / sum_f E`
(the first stage, eq. 9 to 12), then `a` attends over itself with `M_f2` and `b` with `M_w2` (the second, eq.
13 to 16). One exponential serves both softmaxes of the first stage, as long as the similarities of the tile
do not lie too far apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SAFE = 70.0  # exp(+-70) and sums of it stay well inside float32, which ends at 88 and -87

Masks = tuple[Tensor | None, Tensor | None]


class _First(NamedTuple):
    """The first stage. Each softmax as powers and their sums: over words `[t, W, F, v]`, `[t, F, v]`, over
    frames `[t, W, F, v]`, `[t, W, v]`; `mixed_words` is U, `mixed_frames` Z, the results are `a` and `b`."""

    word_powers: Tensor
    word_sums: Tensor
    frame_powers: Tensor
    frame_sums: Tensor
    mixed_words: Tensor
    mixed_frames: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, scores: Tensor, matrices: Sequence[Tensor], masks: Masks) -> _First:
        real_words, real_frames = masks
        mixed_words, mixed_frames = _over_words(matrices[0], scores), _mix(matrices[1], scores)
        shift = _common_shift(scores)
        if shift is None:
            word_powers, frame_powers = _powers(scores, 1, real_words), _powers(scores, 2, real_frames)
        else:
            word_powers = (scores - shift).exp_() if shift else scores.exp()
            for real in masks:
                if real is not None:
                    word_powers *= real
            frame_powers = word_powers
        word_sums, frame_sums = word_powers.sum(1), frame_powers.sum(2)
        if real_words is not None or real_frames is not None:  # of padding alone there is nothing to sum
            word_sums.masked_fill_(word_sums == 0, 1.0)
            frame_sums.masked_fill_(frame_sums == 0, 1.0)
        a = (word_powers * mixed_words).sum(1).div_(word_sums)
        b = (frame_powers * mixed_frames).sum(2).div_(frame_sums)
        return cls(word_powers, word_sums, frame_powers, frame_sums, mixed_words, mixed_frames, a, b)


class _Attended(NamedTuple):
    """`formula.attend` over axis 1 of `scores [n, N, m]`, and what its gradient needs."""

    value: Tensor
    weights: Tensor
    mixed: Tensor
    scores: Tensor

    @classmethod
    def of(cls, scores: Tensor, mixing: Tensor, real: Tensor | None) -> _Attended:
        if real is None:
            weights = scores.softmax(1)
        else:
            weights = scores.masked_fill(~real, -torch.inf).softmax(1)
            scores = scores.masked_fill(~real, 0.0)
        mixed = _mix(mixing, scores)
        return cls((weights * mixed).sum(1), weights, mixed, scores)

    def gradient(self, mixing: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of the scores and of `mixing`, for `grad [n, m]`."""
        weighted = self.weights * grad[:, None]
        of_scores = _mix(mixing.T, weighted) + weighted * (self.mixed - self.value[:, None])
        return of_scores, torch.bmm(weighted, self.scores.transpose(1, 2)).sum(0)


def matrix_score(scores: Tensor, matrices: Sequence[Tensor], masks: Masks) -> Tensor:
    """The sum (not the mean) of both directions, `[t, v]`; `matrices` as `Matrices`."""
    first = _First.of(scores, matrices, masks)
    sentence_to_frame, video_to_word = _second(first, matrices, masks)
    return sentence_to_frame.value + video_to_word.value


def matrix_gradient(
    scores: Tensor, matrices: Sequence[Tensor], masks: Masks, grad: Tensor, learn: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Of the tile and, where they `learn`, of the four matrices, for `grad [t, v]` of `matrix_score`."""
    word, frame, word2, frame2 = matrices
    first = _First.of(scores, matrices, masks)
    sentence_to_frame, video_to_word = _second(first, matrices, masks)
    of_a, of_frame2 = sentence_to_frame.gradient(frame2, grad)
    of_b, of_word2 = video_to_word.gradient(word2, grad)
    over_words = first.word_powers * (of_a / first.word_sums)[:, None]
    over_frames = first.frame_powers * (of_b / first.frame_sums)[:, :, None]
    of_scores = _over_words(word.T, over_words) + _mix(frame.T, over_frames)
    of_scores.addcmul_(over_words, first.mixed_words - first.a[:, None])
    of_scores.addcmul_(over_frames, first.mixed_frames - first.b[:, :, None])
    if not learn:
        return of_scores, ()
    of_word = torch.bmm(over_words.flatten(2), scores.flatten(2).transpose(1, 2)).sum(0)
    of_frame = torch.bmm(over_frames.flatten(0, 1), scores.flatten(0, 1).transpose(1, 2)).sum(0)
    return of_scores, (of_word, of_frame, of_word2, of_frame2)


def vector_score(scores: Tensor, matrices: Sequence[Tensor], masks: Masks) -> Tensor:
    """`attend` over the words of a tile with one frame, `[t, v]`."""
    return _attended_words(scores, matrices, masks).value


def vector_gradient(
    scores: Tensor, matrices: Sequence[Tensor], masks: Masks, grad: Tensor, learn: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Of the tile and, where it is to `learn`, of the one matrix."""
    of_scores, of_mixing = _attended_words(scores, matrices, masks).gradient(matrices[0], grad)
    return of_scores, (of_mixing,) if learn else ()


def _attended_words(scores: Tensor, matrices: Sequence[Tensor], masks: Masks) -> _Attended:
    return _Attended.of(scores[:, :, 0], matrices[0], None if masks[0] is None else masks[0][:, :, 0])


def _second(first: _First, matrices: Sequence[Tensor], masks: Masks) -> tuple[_Attended, _Attended]:
    real_words, real_frames = masks
    return (
        _Attended.of(first.a, matrices[3], None if real_frames is None else real_frames[:, 0]),
        _Attended.of(first.b, matrices[2], None if real_words is None else real_words[:, :, 0]),
    )


def _mix(matrix: Tensor, scores: Tensor) -> Tensor:
    """`matrix [N, N]` times `scores [..., N, m]`; the identity, as which all of them start, costs nothing."""
    if _is_identity(matrix):
        return scores
    flat = scores.flatten(0, -3)
    return torch.bmm(matrix.expand(len(flat), -1, -1), flat).view_as(scores)  # matmul would copy the scores


def _over_words(matrix: Tensor, scores: Tensor) -> Tensor:
    return _mix(matrix, scores.flatten(2)).view_as(scores)


def _is_identity(matrix: Tensor) -> bool:
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


def _common_shift(scores: Tensor) -> float | None:
    """What brings every score of the tile where `exp` is exact, None where nothing does (or one is NaN)."""
    low, high = (end.item() for end in torch.aminmax(scores))
    if low > -_SAFE and high < _SAFE:
        return 0.0
    return (low + high) / 2 if high - low < 2 * _SAFE else None


def _powers(scores: Tensor, axis: int, real: Tensor | None) -> Tensor:
    if real is not None:
        scores = scores.masked_fill(~real, -torch.inf)
    return (scores - scores.amax(axis, keepdim=True)).exp_()
