"""Re-ranking by what other queries find: dual softmax and QB-Norm, pure functions of matrices.

Some items of a gallery are near to every query (hubs). Both methods lower what many queries want, by the
statistics of the evaluated queries themselves (dual softmax) or of a bank of other queries (QB-Norm).

Rows are queries, columns the gallery: `[T, V]` for text-to-video, the transposed matrices for video-to-text.
What comes out orders each row's gallery and says nothing about a column: it serves one direction only.
`temperature` and `beta` depend on the scale of the similarities; the papers' values are for cosines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from xclip_lab.metrics import MetricError

_BLOCK = 4_000_000  # numbers handled at once: a bank may have a hundred thousand rows


def dual_softmax(similarity: Any, temperature: float = 0.01) -> np.ndarray:
    """Similarity times how much an item belongs to this query among all (CAMoE, Cheng et al. 2021).

    `S * P * Q`, where `P` is the softmax of `S / temperature` over the Q queries of each item. It uses all
    evaluated queries at once (transductive): a query's result depends on which others are asked. As a product
    it is meant for similarities above 0; among those below 0, items that others want more come first.

    Args:
        similarity: `[Q, G]`, queries x gallery. temperature: of the softmax, 0.01 for cosines.

    Returns:
        float64 `[Q, G]`; as the temperature grows it becomes `similarity`.

    Raises:
        MetricError: wrong shape, numbers that are not finite, a temperature that is not above 0 or too small
            for the range of the similarities.

    >>> hub_first = [[0.8, 0.7, 0.1], [0.9, 0.3, 0.2], [0.7, 0.1, 0.6]]
    >>> dual_softmax(hub_first, temperature=0.1).argmax(axis=1).tolist()
    [1, 0, 2]
    """
    scores = _checked("similarity", similarity).astype(np.float64)
    _above_zero("temperature", temperature)
    with np.errstate(over="ignore", under="ignore"):
        prior = np.exp((scores - scores.max(axis=0)) / temperature)
        prior /= prior.sum(axis=0)
    _in_range(prior, f"dual softmax: temperature {temperature:g} is too small", "larger")
    return scores * prior * len(scores)


def qb_norm(
    similarity: Any, bank_similarity: Any, beta: float = 20.0, k: int = 1, theta: int = 1
) -> np.ndarray:
    """Querybank normalisation with the dynamic inverted softmax (Bogolin et al. 2022).

    An item that at least `theta` queries of the bank find among their first `k` is activated. A query whose
    first item is activated gets `exp(beta * S[q, g]) / sum over the bank of exp(beta * B[b, g])`; every other
    row stays as it is. The paper has theta 1; GLSCL's code, whose numbers this gives, has beta 70 and theta 3
    for text-to-video, 5 for video-to-text.

    Args:
        similarity: `[Q, G]`, queries x gallery. bank_similarity: `[B, G]`, the bank's queries with the same
            gallery. The bank must not contain the evaluated queries.
        beta: inverse temperature, 20 for cosines. k, theta: what activates an item.

    Returns:
        float64 `[Q, G]`.

    Raises:
        MetricError: shapes that do not fit, numbers that are not finite, a beta, k or theta that is not above
            0, or a beta too large for the range of the similarities.

    >>> similarity, bank = [[0.8, 0.7], [0.9, 0.2]], [[0.7, 0.1], [0.6, 0.2]]
    >>> qb_norm(similarity, bank, beta=10).argmax(axis=1).tolist()
    [1, 0]
    >>> qb_norm(similarity, bank, beta=10, theta=3).tolist() == similarity
    True
    """
    scores = _checked("similarity", similarity).astype(np.float64)
    bank = _checked("bank_similarity", bank_similarity)
    if bank.shape[1] != scores.shape[1]:
        raise MetricError(
            f"QB-Norm: bank_similarity has {bank.shape[1]} columns and similarity {scores.shape[1]}: "
            "both must look at the same gallery"
        )
    for name, value in (("beta", beta), ("k", k), ("theta", theta)):
        _above_zero(name, value)
    retrieved, log_sum = _bank_statistics(bank, beta, k)
    rows = (retrieved >= theta)[scores.argmax(axis=1)]
    normalised = scores.copy()
    with np.errstate(over="ignore", under="ignore"):
        normalised[rows] = np.exp(beta * scores[rows] - log_sum)
    _in_range(normalised[rows], f"QB-Norm: beta {beta:g} is too large", "smaller")
    return normalised


def _bank_statistics(bank: np.ndarray, beta: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`[G]` each: how many of the bank's queries find an item among their first k, and the log of the sum of
    exp(beta * similarity) over the bank."""
    retrieved = np.zeros(bank.shape[1], dtype=np.int64)
    peak, total = beta * bank.max(axis=0).astype(np.float64), np.zeros(bank.shape[1])
    for block in _row_blocks(bank):
        first = np.argsort(-block, axis=1, kind="stable")[:, :k]
        retrieved += np.bincount(first.ravel(), minlength=len(retrieved))
        total += np.exp(beta * block - peak).sum(axis=0)
    return retrieved, peak + np.log(total)


def _row_blocks(matrix: np.ndarray) -> Iterator[np.ndarray]:
    size = max(1, _BLOCK // matrix.shape[1])
    for start in range(0, len(matrix), size):
        yield matrix[start : start + size].astype(np.float64)


def _checked(name: str, values: Any) -> np.ndarray:
    matrix = np.asarray(values)
    if matrix.ndim != 2 or not matrix.size or not np.issubdtype(matrix.dtype, np.number):
        raise MetricError(
            f"{name}: expected numbers, queries x gallery [Q, G], "
            f"got {matrix.dtype} of shape {list(matrix.shape)}"
        )
    bad = np.argwhere(~np.isfinite(matrix))
    if len(bad):
        row, column = bad[0]
        raise MetricError(
            f"{name} is {matrix[row, column]} at row {row}, column {column}, not a finite number"
        )
    return matrix


def _above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise MetricError(f"{name}: {value!r} is not allowed (expected a number above 0)")


def _in_range(exponentials: np.ndarray, what: str, remedy: str) -> None:
    """Exponentials that became 0 or infinite would be ties that the similarity does not have."""
    if not (np.isfinite(exponentials).all() and (exponentials > 0).all()):
        raise MetricError(
            f"{what} for similarities this far apart (exp() leaves its range); give a {remedy} one"
        )
