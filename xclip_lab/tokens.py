"""The one thing that towers hand to heads: a pooled vector and the tokens it was pooled from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSet:
    """One modality of a batch.

    Attributes:
        pooled: `[B, D]`, the sentence feature, or the mean of a video's frames after `agg_module`.
        tokens: `[B, N, D]`, not normalised: words, or frames.
        mask: `[B, N]`, 1 = real, 0 = padding.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> TokenSet:
        return TokenSet(self.pooled[rows], self.tokens[rows], self.mask[rows])

    def to(self, *args, **kwargs) -> TokenSet:
        """Move the features as `Tensor.to` does; the mask follows to the device and keeps its type."""
        pooled = self.pooled.to(*args, **kwargs)
        return TokenSet(pooled, self.tokens.to(*args, **kwargs), self.mask.to(pooled.device))

    @staticmethod
    def cat(parts: list[TokenSet]) -> TokenSet:
        """Join blocks of rows into one set."""
        return TokenSet(
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.mask for part in parts]),
        )
