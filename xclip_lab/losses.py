"""The contrastive loss of all four papers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    """Mean of the cross entropies over rows and over columns, targets on the diagonal.

    Args:
        logits: `[B, B]`, text x video, already scaled; text i belongs to video i.

    Returns:
        A scalar, in nats.

    >>> logits = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    >>> round(symmetric_cross_entropy(logits).item(), 4)  # rows 0.1269, 0.6931; columns 0.3133, 0.3133
    0.3616
    """
    targets = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
