"""The learned matrices of AOSM."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Matrices(NamedTuple):
    """X-CLIP's four, as stored, untransposed: `word` and `word2` `[W, W]`, `frame` and `frame2` `[F, F]`.

    `word` and `frame` mix the similarity matrix (stage 1), `frame2` and `word2` what the first two give.
    """

    word: Tensor
    frame: Tensor
    word2: Tensor
    frame2: Tensor
