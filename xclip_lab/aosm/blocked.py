"""Word x frame scores in tiles, with a backward of their own: memory for one tile, however many pairs.

The features are all that is saved; the backward makes each tile's similarities again. A tile is laid out
`[texts, words, frames, videos]`: with the videos innermost every reduction adds whole vectors, and a tile
fits the cache of a core. The temperature goes into the features once, so that within a tile it is 1. The
definition is `formula.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xclip_lab.aosm.formula import pool
from xclip_lab.aosm.matrices import Matrices, check
from xclip_lab.aosm.tile import matrix_gradient, matrix_score, vector_gradient, vector_score
from xclip_lab.parallel import in_threads, workers_on

_CACHE = 400_000  # numbers of a tile on the CPU, 1.6 MB
_DEVICE = 2**25  # and elsewhere
_VIDEOS = 64  # of a tile at most: enough for long vectors

Masks = tuple[Tensor | None, Tensor | None]


class _Kind(NamedTuple):
    """What is made of a tile of similarities.

    Attributes:
        score: `(tile [t, W, F, v], matrices, masks) -> [t, v]`.
        gradient: `(tile, matrices, masks, grad [t, v], learn) -> (of the tile, of each matrix)`, of no
            matrix unless `learn`. The masks are `[t, W, 1, 1]` and `[1, 1, F, v]`, or None.
    """

    score: Callable[[Tensor, Sequence[Tensor], Masks], Tensor]
    gradient: Callable[[Tensor, Sequence[Tensor], Masks, Tensor, bool], tuple[Tensor, Sequence[Tensor]]]


def matrix_aosm(
    words: Tensor,
    frames: Tensor,
    matrices: Matrices,
    temperature: float,
    word_mask: Tensor | None = None,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """Both stages of AOSM on the word x frame matrix of every pair (X-CLIP eq. 9 to 16).

    Args:
        words: `[T, W, D]`, normalised, already times `local_mat_weight`. frames: `[V, F, D]`, normalised.
        matrices: the four learned ones. temperature: tau.
        word_mask: `[T, W]`, frame_mask: `[V, F]`, 1 = real; None for the official behaviour.

    Returns:
        `[T, V]` in the features' precision, at least float32. A NaN in a text or video stays in its row or
        column; a text or video of padding alone has NaN.

    Raises:
        ConfigError: a temperature that is not above 0, or sizes that do not fit together.
    """
    check(words, frames, matrices, temperature, word_mask, frame_mask)
    kind = _Kind(matrix_score, matrix_gradient)
    scores = _tiled(kind, words, frames, matrices, temperature, word_mask, frame_mask)
    return scores * (temperature / 2)


def vector_aosm(
    tokens: Tensor, pooled: Tensor, mixing: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """`formula.attend` over the tokens of each pair (X-CLIP eq. 7 and 8).

    Args:
        tokens: `[A, N, D]`, words or frames, normalised. pooled: `[B, D]`. mixing: `[N, N]`.
        mask: `[A, N]`, 1 = real; None for the official behaviour.

    Returns:
        `[A, B]`, as `matrix_aosm`.
    """
    check(tokens, pooled[:, None], Matrices.of_vectors(mixing), temperature, mask, None)
    kind = _Kind(vector_score, vector_gradient)
    return _tiled(kind, tokens, pooled[:, None], [mixing], temperature, mask, None) * temperature


def matrix_pool(
    words: Tensor,
    frames: Tensor,
    fusion: str,
    word_mask: Tensor | None = None,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """The plain fusions of the word x frame matrix (X-CLIP table 7), such as `mean-max`: first on the matrix,
    then to one number, in both directions. Other arguments and result as of `matrix_aosm`.
    """
    first, second = fusion.split("-")
    kind = _by_autograd(partial(_pool_matrix, first, second))
    return _tiled(kind, words, frames, [], 1.0, word_mask, frame_mask) / 2


def vector_pool(tokens: Tensor, pooled: Tensor, how: str, mask: Tensor | None = None) -> Tensor:
    """`mean` or `max` over the tokens of each pair; other arguments and result as of `vector_aosm`."""
    kind = _by_autograd(partial(_pool_words, how))
    return _tiled(kind, tokens, pooled[:, None], [], 1.0, mask, None)


def _pool_matrix(first: str, second: str, tile: Tensor, matrices: Sequence[Tensor], masks: Masks) -> Tensor:
    """`tile [t, W, F, v]` to `[t, v]`, over words then frames plus over frames then words."""
    words, frames = masks
    per_frame, per_word = _pool(tile, first, 1, words), _pool(tile, first, 2, frames)
    return _pool(per_frame, second, 1, None if frames is None else frames[:, 0]) + _pool(
        per_word, second, 1, None if words is None else words[:, :, 0]
    )


def _pool_words(how: str, tile: Tensor, matrices: Sequence[Tensor], masks: Masks) -> Tensor:
    return _pool(tile, how, 1, masks[0])[:, 0]


def _pool(scores: Tensor, how: str, axis: int, real: Tensor | None) -> Tensor:
    return pool(scores.movedim(axis, -1), how, None if real is None else real.movedim(axis, -1))


def _by_autograd(score: Callable[..., Tensor]) -> _Kind:
    """The kind of a `score` without matrices, whose gradient nobody wrote out."""

    def gradient(tile: Tensor, matrices: Sequence[Tensor], masks: Masks, grad: Tensor, learn: bool):
        with torch.enable_grad():
            leaf = tile.detach().requires_grad_()
            return *torch.autograd.grad(score(leaf, matrices, masks), leaf, grad), []

    return _Kind(score, gradient)


def _tiled(
    kind: _Kind,
    rows: Tensor,
    columns: Tensor,
    matrices: Sequence[Tensor],
    temperature: float,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
) -> Tensor:
    precision = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    rows, columns = rows.to(precision), columns.to(precision)
    if not len(rows) or not len(columns):
        return torch.einsum("twd,vfd->tv", rows, columns)  # empty, with its gradient
    if columns.numel() < rows.numel():  # the smaller is the quicker to scale
        columns = columns / temperature
    else:
        rows = rows / temperature
    if row_mask is not None:  # a padded score is 0 and has no gradient
        rows = rows.masked_fill(~row_mask.bool()[..., None], 0.0)
    if column_mask is not None:
        columns = columns.masked_fill(~column_mask.bool()[..., None], 0.0)
    matrices = [matrix.to(precision) for matrix in matrices]
    return _Tiled.apply(kind, rows, columns, row_mask, column_mask, *matrices)


class _Tiled(torch.autograd.Function):
    """`kind` of `rows [T, W, D]` times `columns [V, F, D]` by tiles, the texts shared out over the cores."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, rows: Tensor, columns: Tensor, *rest: Tensor | None) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(rows, columns, *rest)
        row_mask, column_mask, matrices = rest[0], rest[1], cast(tuple[Tensor, ...], rest[2:])
        layout = _Layout(columns, column_mask)
        scores = rows.new_empty(len(rows), len(columns))

        def work(share: slice) -> None:
            for texts in layout.row_tiles(share, rows.shape[1]):
                flat = rows[texts].flatten(0, 1)
                for videos, of_videos, real in layout.columns:
                    tile = layout.tile(flat @ of_videos.T, rows.shape[1])
                    scores[texts, videos] = kind.score(tile, matrices, (_over_tile(row_mask, texts), real))

        with torch.autocast(rows.device.type, enabled=False):
            for _ in in_threads(work, *_shares(rows)):
                pass
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, row_mask, column_mask, *matrices = ctx.saved_tensors
        (grad,), kind = grads, ctx.kind
        needs_rows, needs_columns = ctx.needs_input_grad[1:3]
        learned = matrices if any(ctx.needs_input_grad[5:]) else []
        layout = _Layout(columns, column_mask, share=3)  # a gradient has several tensors of a tile's size
        of_rows = torch.empty_like(rows)

        def work(share: slice) -> tuple[list[Tensor], list[Tensor]]:
            of_columns = [torch.zeros_like(part) for _, part, _ in layout.columns]
            of_matrices = [torch.zeros_like(matrix) for matrix in learned]
            for texts in layout.row_tiles(share, rows.shape[1]):
                flat = rows[texts].flatten(0, 1)
                of_flat = torch.zeros_like(flat)
                real_rows = _over_tile(row_mask, texts)
                for place, (videos, of_videos, real) in enumerate(layout.columns):
                    tile = layout.tile(flat @ of_videos.T, rows.shape[1])
                    of_tile, more = kind.gradient(
                        tile, matrices, (real_rows, real), grad[texts, videos], bool(learned)
                    )
                    of_products = of_tile.reshape(len(flat), -1)
                    if needs_rows:
                        of_flat.addmm_(of_products, of_videos)
                    if needs_columns:
                        of_columns[place].addmm_(of_products.T, flat)
                    for whole, part in zip(of_matrices, more, strict=True):
                        whole += part
                of_rows[texts] = of_flat.view_as(rows[texts])
            return of_columns, of_matrices

        with torch.autocast(rows.device.type, enabled=False):
            shares = list(in_threads(work, *_shares(rows)))
        of_columns = layout.back(
            [sum(parts) for parts in zip(*(columns for columns, _ in shares), strict=True)]
        )
        of_matrices = [sum(parts) for parts in zip(*(more for _, more in shares), strict=True)]
        return None, of_rows, of_columns, None, None, *(of_matrices or [None] * len(matrices))


class _Layout:
    """The videos in tiles: `columns` holds their slice, features `[F * v, D]` and mask `[1, 1, F, v]`."""

    def __init__(self, columns: Tensor, mask: Tensor | None, share: int = 1) -> None:
        self.frames = columns.shape[1]
        self.size = (_CACHE if columns.device.type == "cpu" else _DEVICE) // share
        self.columns = []
        for start in range(0, len(columns), _VIDEOS):
            videos = slice(start, start + _VIDEOS)
            laid = columns[videos].transpose(0, 1).flatten(0, 1)
            real = None if mask is None else mask[videos].T.bool()[None, None]
            self.columns.append((videos, laid, real))

    def row_tiles(self, share: slice, words: int) -> list[slice]:
        """The texts of a share, as many at a time as a tile holds."""
        count = max(1, self.size // (words * self.frames * _VIDEOS))
        return [slice(at, min(at + count, share.stop)) for at in range(share.start, share.stop, count)]

    def tile(self, products: Tensor, words: int) -> Tensor:
        """`[t * W, F * v]` as `[t, W, F, v]`."""
        return products.view(-1, words, self.frames, products.shape[1] // self.frames)

    def back(self, parts: list[Tensor]) -> Tensor:
        """Tiles `[F * v, D]` as `[V, F, D]`."""
        return torch.cat([part.unflatten(0, (self.frames, -1)).transpose(0, 1) for part in parts])


def _over_tile(mask: Tensor | None, texts: slice) -> Tensor | None:
    return None if mask is None else mask[texts].bool()[:, :, None, None]


def _shares(rows: Tensor) -> tuple[list[slice], int]:
    """The texts in equal shares, one a worker; which share a text is in depends on nothing else."""
    workers = min(workers_on(rows.device), len(rows))
    ends = [len(rows) * part // workers for part in range(workers + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)], workers
