"""The one thing that towers hand to heads: a pooled vector and the tokens it was pooled from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSet:
    """One modality of a batch.

    Attributes:
        pooled: `[B, D]`, the sentence feature, or the mean of a video's frames after `agg_module`.
        tokens: `[B, N, D]`, not normalised: words, or frames.
        mask: `[B, N]`, 1 = real, 0 = padding.
        extra: `[B, ...]` each: what else a head computes of one modality alone, such as GLSCL's queries.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> TokenSet:
        return self.map(lambda value: value[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenSet:
        """The set with `function` applied to each of its tensors."""
        extra = {name: function(value) for name, value in self.extra.items()}
        return TokenSet(function(self.pooled), function(self.tokens), function(self.mask), extra)

    def to(self, *args, **kwargs) -> TokenSet:
        """Move the features as `Tensor.to` does; the mask follows to the device and keeps its type."""
        moved = self.map(lambda value: value.to(*args, **kwargs))
        return TokenSet(moved.pooled, moved.tokens, self.mask.to(moved.pooled.device), moved.extra)

    @staticmethod
    def cat(parts: list[TokenSet]) -> TokenSet:
        """Join blocks of rows into one set."""
        return TokenSet(
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.mask for part in parts]),
            {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra},
        )
