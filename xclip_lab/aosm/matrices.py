"""The learned matrices of AOSM, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from xclip_lab.errors import ConfigError

_LEAST = 1e-30
"""Similarities are divided by the temperature in float32, which ends at 3e38."""


class Matrices(NamedTuple):
    """X-CLIP's four, as stored, untransposed: `word` and `word2` `[W, W]`, `frame` and `frame2` `[F, F]`.

    `word` and `frame` mix the similarity matrix (stage 1), `frame2` and `word2` what the first two give.
    """

    word: Tensor
    frame: Tensor
    word2: Tensor
    frame2: Tensor

    @classmethod
    def of_vectors(cls, mixing: Tensor) -> Matrices:
        """Of tokens that meet one vector: a video with a single frame, over which nothing is weighed."""
        one = mixing.new_ones(1, 1)
        return cls(mixing, one, mixing, one)


def check(
    words: Tensor,
    frames: Tensor,
    matrices: Sequence[Tensor],
    temperature: float,
    word_mask: Tensor | None,
    frame_mask: Tensor | None,
) -> None:
    """Refuse what is no AOSM; the arguments are those of `blocked.matrix_aosm`, but that the matrices may be
    the first of the four only.

    Raises:
        ConfigError: a temperature that is not above 0, or sizes or devices that do not fit together.
    """
    if not _LEAST < temperature < math.inf:
        raise ConfigError(f"temperature: {temperature} is not allowed (a number above {_LEAST:.0g})")
    if words.ndim != 3 or frames.ndim != 3 or not all((*words.shape[1:], frames.shape[1])):
        raise ConfigError(
            f"AOSM takes words [T, W, D] and frames [V, F, D] with W, F and D of 1 at least, got "
            f"{list(words.shape)} and {list(frames.shape)}"
        )
    (texts, length, width), (videos, count, _) = words.shape, frames.shape
    sizes = [(length, length), (count, count)] * 2
    expected = [(videos, count, width), *sizes[: len(matrices)]]
    given = [frames, *matrices]
    for mask, shape in ((word_mask, (texts, length)), (frame_mask, (videos, count))):
        if mask is not None:
            given.append(mask)
            expected.append(shape)
    if [tuple(tensor.shape) for tensor in given] != expected:
        raise ConfigError(
            f"AOSM of words {list(words.shape)} and frames {list(frames.shape)} takes matrices and masks of "
            f"these sizes: {expected[1:]}, got {[tuple(tensor.shape) for tensor in given[1:]]}"
        )
    devices = sorted({str(tensor.device) for tensor in (words, *given)})
    if len(devices) > 1:
        raise ConfigError(
            f"AOSM takes features, matrices and masks on one device, got {' and '.join(devices)}"
        )
