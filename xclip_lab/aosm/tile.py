"""AOSM of one tile of similarities `[F, v, t, W]` at temperature 1, and its gradient written out.

Both stages do the same along the words or along the frames: a softmax of the scores weighs them, mixed by a
matrix (`_Weighed`). The first stage makes `a` of the words and `b` of the frames (eq. 9 to 12), then `a`
attends over itself along the frames and `b` along the words (eq. 13 to 16). One exponential serves both
softmaxes of the first stage, as long as the similarities of the tile do not lie too far apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SAFE = 70.0  # exp(+-70) and sums of it stay well inside float32, which ends at 88 and -87
_FRAMES, _WORDS = 0, -1  # axes of a tile

Mixing = Tensor | None
"""A learned matrix, None where it is the identity, as which all of them start: that costs nothing."""
Masks = tuple[Tensor | None, Tensor | None]
"""Real words `[1, 1, t, W]` and frames `[F, v, 1, 1]`, None where all are. Padded scores are 0."""


class _Weighed(NamedTuple):
    """`formula.attend` along the first or last axis of `scores`: `value` has the other axes. The softmax is
    `powers / sums`; `mixed` are the scores times `mixing`."""

    scores: Tensor
    mixing: Mixing
    axis: int
    powers: Tensor
    sums: Tensor
    mixed: Tensor
    value: Tensor

    @classmethod
    def of(cls, scores: Tensor, mixing: Mixing, axis: int, powers: Tensor) -> _Weighed:
        sums = _sum(powers, axis)
        sums.masked_fill_(sums == 0, 1.0)  # of padding alone there is nothing to sum
        mixed = scores if mixing is None else _mix(mixing, scores, axis)
        value = _sum(powers * mixed, axis).div_(sums)
        return cls(scores, mixing, axis, powers, sums, mixed, value)

    @classmethod
    def by_itself(cls, scores: Tensor, mixing: Mixing, axis: int, real: Tensor | None) -> _Weighed:
        """With the softmax of these scores alone."""
        return cls.of(scores, mixing, axis, _powers(scores, axis, real))

    def gradient(self, of_scores: Tensor, grad: Tensor, learn: bool) -> list[Tensor]:
        """For `grad` of `value`: added to `of_scores`; and of the matrix, where it is to `learn`."""
        weights = self.powers * (grad / self.sums).unsqueeze(self.axis)
        if self.mixing is None:
            of_scores += weights
        elif self.axis == _FRAMES:
            of_scores.flatten(1).addmm_(self.mixing.T, weights.flatten(1))
        else:
            of_scores.flatten(0, -2).addmm_(weights.flatten(0, -2), self.mixing)
        of_scores.addcmul_(weights, self.mixed - self.value.unsqueeze(self.axis))
        return [_of_mixing(weights, self.scores, self.axis)] if learn else []


def matrix_score(scores: Tensor, mixings: Sequence[Mixing], masks: Masks) -> Tensor:
    """The sum (not the mean) of both directions, `[v, t]`; `mixings` in the order of `Matrices`."""
    *_, sentence_to_frame, video_to_word = _both_stages(scores, mixings, masks)
    return sentence_to_frame.value + video_to_word.value


def matrix_gradient(
    scores: Tensor, mixings: Sequence[Mixing], masks: Masks, grad: Tensor, learn: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Of the tile and, where they `learn`, of the four matrices, for `grad [v, t]` of `matrix_score`."""
    a, b, sentence_to_frame, video_to_word = _both_stages(scores, mixings, masks)
    of_a, of_b, of_scores = (torch.zeros_like(value) for value in (a.value, b.value, scores))
    of_word2 = video_to_word.gradient(of_b, grad, learn)
    of_frame2 = sentence_to_frame.gradient(of_a, grad, learn)
    of_word, of_frame = a.gradient(of_scores, of_a, learn), b.gradient(of_scores, of_b, learn)
    return of_scores, [*of_word, *of_frame, *of_word2, *of_frame2]


def vector_score(scores: Tensor, mixings: Sequence[Mixing], masks: Masks) -> Tensor:
    """`attend` over the words of a tile with one frame, `[v, t]`."""
    return _of_one_frame(scores, mixings, masks).value


def vector_gradient(
    scores: Tensor, mixings: Sequence[Mixing], masks: Masks, grad: Tensor, learn: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Of the tile and, where it is to `learn`, of the one matrix."""
    of_scores = torch.zeros_like(scores)
    return of_scores, _of_one_frame(scores, mixings, masks).gradient(of_scores[0], grad, learn)


def _both_stages(scores: Tensor, mixings: Sequence[Mixing], masks: Masks) -> tuple[_Weighed, ...]:
    """`a`, `b`, then what each of them becomes."""
    word, frame, word2, frame2 = mixings
    words, frames = masks
    over_words, over_frames = _both_powers(scores, masks)
    a = _Weighed.of(scores, word, _WORDS, over_words)
    b = _Weighed.of(scores, frame, _FRAMES, over_frames)
    of_frames, of_words = None if frames is None else frames[..., 0], None if words is None else words[0]
    return (
        a,
        b,
        _Weighed.by_itself(a.value, frame2, _FRAMES, of_frames),
        _Weighed.by_itself(b.value, word2, _WORDS, of_words),
    )


def _of_one_frame(scores: Tensor, mixings: Sequence[Mixing], masks: Masks) -> _Weighed:
    return _Weighed.by_itself(scores[0], mixings[0], _WORDS, None if masks[0] is None else masks[0][0])


def _mix(mixing: Tensor, scores: Tensor, axis: int) -> Tensor:
    if axis == _FRAMES:
        return (mixing @ scores.flatten(1)).view_as(scores)
    return (scores.flatten(0, -2) @ mixing.T).view_as(scores)


def _of_mixing(weights: Tensor, scores: Tensor, axis: int) -> Tensor:
    if axis == _FRAMES:
        return weights.flatten(1) @ scores.flatten(1).T
    return weights.flatten(0, -2).T @ scores.flatten(0, -2)


def _sum(scores: Tensor, axis: int) -> Tensor:
    # Along the last axis a product with ones is twice as fast as a sum.
    return scores.sum(0) if axis == _FRAMES else scores @ scores.new_ones(scores.shape[-1])


def _both_powers(scores: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
    """Numerators of the first stage's softmaxes, along the words and along the frames: one, if it can be."""
    shift = _common_shift(scores)
    if shift is None:
        return _powers(scores, _WORDS, masks[0]), _powers(scores, _FRAMES, masks[1])
    powers = (scores - shift).exp_() if shift else scores.exp()
    for real in masks:
        if real is not None:
            powers *= real
    return powers, powers


def _common_shift(scores: Tensor) -> float | None:
    """What brings every score of the tile where `exp` is exact, None where nothing does (or one is NaN)."""
    low, high = (end.item() for end in torch.aminmax(scores))
    if low > -_SAFE and high < _SAFE:
        return 0.0
    return (low + high) / 2 if high - low < 2 * _SAFE else None


def _powers(scores: Tensor, axis: int, real: Tensor | None) -> Tensor:
    """Numerators of a softmax along one axis."""
    if real is not None:
        scores = scores.masked_fill(~real, -torch.inf)
    return (scores - scores.amax(axis, keepdim=True)).exp_()
