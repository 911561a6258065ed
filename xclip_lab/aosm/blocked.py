"""Word x frame scores in tiles, with a backward of their own: memory for one tile, however many pairs.

The features are all that is saved; the backward makes each tile's similarities again. A tile is laid out
`[frames, videos, texts, words]` and fits the cache of a core: frames outermost and words innermost, mixing
either by a learned matrix is one product of matrices. The temperature goes into the features once, so that
within a tile it is 1. The definition is `formula.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xclip_lab.aosm.formula import pool
from xclip_lab.aosm.matrices import Matrices, check
from xclip_lab.aosm.tile import Masks, Mixing, matrix_gradient, matrix_score, vector_gradient, vector_score
from xclip_lab.parallel import in_threads, workers_on

_CACHE = 400_000  # numbers of a tile on the CPU, 1.6 MB
_DEVICE = 2**25  # and elsewhere
_VIDEOS = 64  # of a tile at most: enough for long vectors


class _Kind(NamedTuple):
    """What is made of a tile of similarities.

    Attributes:
        score: `(tile [F, v, t, W], mixings, masks) -> [v, t]`.
        gradient: `(tile, mixings, masks, grad [v, t], learn) -> (of the tile, of each matrix)`, of no
            matrix unless `learn`.
    """

    score: Callable[[Tensor, Sequence[Mixing], Masks], Tensor]
    gradient: Callable[[Tensor, Sequence[Mixing], Masks, Tensor, bool], tuple[Tensor, Sequence[Tensor]]]


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
        column; a text or video of padding alone has NaN (of `matrix_pool` and `vector_pool`: what its pooling
        makes of nothing).

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
    check(tokens, pooled[:, None], [mixing], temperature, mask, None)
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
    check(words, frames, [], 1.0, word_mask, frame_mask)
    first, second = fusion.split("-")
    kind = _by_autograd(partial(_pool_matrix, first, second))
    return _tiled(kind, words, frames, [], 1.0, word_mask, frame_mask) / 2


def vector_pool(tokens: Tensor, pooled: Tensor, how: str, mask: Tensor | None = None) -> Tensor:
    """`mean` or `max` over the tokens of each pair; other arguments and result as of `vector_aosm`."""
    check(tokens, pooled[:, None], [], 1.0, mask, None)
    kind = _by_autograd(partial(_pool_words, how))
    return _tiled(kind, tokens, pooled[:, None], [], 1.0, mask, None)


def _pool_matrix(first: str, second: str, tile: Tensor, mixings: Sequence[Mixing], masks: Masks) -> Tensor:
    """`tile [F, v, t, W]` to `[v, t]`, over words then frames plus over frames then words."""
    words, frames = masks
    per_frame, per_word = pool(tile, first, words), _pool_frames(tile, first, frames)
    return _pool_frames(per_frame, second, None if frames is None else frames[..., 0]) + pool(
        per_word, second, None if words is None else words[0]
    )


def _pool_frames(scores: Tensor, how: str, real: Tensor | None) -> Tensor:
    return pool(scores.movedim(0, -1), how, None if real is None else real.movedim(0, -1))


def _pool_words(how: str, tile: Tensor, mixings: Sequence[Mixing], masks: Masks) -> Tensor:
    return pool(tile, how, masks[0])[0]


def _by_autograd(score: Callable[..., Tensor]) -> _Kind:
    """The kind of a `score` without matrices, whose gradient nobody wrote out."""

    def gradient(tile: Tensor, mixings: Sequence[Mixing], masks: Masks, grad: Tensor, learn: bool):
        with torch.enable_grad():
            leaf = tile.detach().requires_grad_()
            return *torch.autograd.grad(score(leaf, mixings, masks), leaf, grad), []

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
    # Contiguous, or gradients could not be added up in place.
    rows, columns = rows.to(precision).contiguous(), columns.to(precision).contiguous()
    if not len(rows) or not len(columns):
        return torch.einsum("twd,vfd->tv", rows, columns)  # empty, with its gradient
    matrices = [matrix.to(precision) for matrix in matrices]
    return _Tiled.apply(kind, temperature, rows, columns, row_mask, column_mask, *matrices)


class _Tiled(torch.autograd.Function):
    """`kind` of `rows [T, W, D]` times `columns [V, F, D]` by tiles, the texts shared out over the cores."""

    @staticmethod
    def forward(
        ctx: Any, kind: _Kind, temperature: float, rows: Tensor, columns: Tensor, *rest: Tensor | None
    ) -> Tensor:
        ctx.kind, ctx.temperature = kind, temperature
        ctx.save_for_backward(rows, columns, *rest)
        scores = rows.new_empty(len(rows), len(columns))
        row_mask, column_mask, *matrices = rest
        tiles = _Tiles(rows, columns, row_mask, column_mask, temperature)
        mixings = _mixings(cast(list[Tensor], matrices))

        def work(share: slice) -> None:
            for videos, laid, real_frames in tiles.columns():
                for texts, flat, real_words in tiles.rows(share):
                    tile = tiles.products(laid, flat)
                    scores[texts, videos] = kind.score(tile, mixings, (real_words, real_frames)).T

        with torch.autocast(rows.device.type, enabled=False):
            for _ in in_threads(work, *_shares(rows)):
                pass
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, row_mask, column_mask, *matrices = ctx.saved_tensors
        needs_rows, needs_columns = ctx.needs_input_grad[2:4]
        learned = matrices if any(ctx.needs_input_grad[6:]) else []
        tiles = _Tiles(rows, columns, row_mask, column_mask, ctx.temperature, backward=True)
        mixings, of_rows = _mixings(matrices), torch.zeros_like(rows) if needs_rows else None

        def work(share: slice) -> list[Tensor]:
            of_columns = torch.zeros_like(columns if needs_columns else columns[:0])
            of_matrices = [torch.zeros_like(matrix) for matrix in learned]
            for videos, laid, real_frames in tiles.columns():
                of_laid = torch.zeros_like(laid)
                for texts, flat, real_words in tiles.rows(share):
                    masks, grad = (real_words, real_frames), grads[0][texts, videos].T
                    of_tile, more = ctx.kind.gradient(
                        tiles.products(laid, flat), mixings, masks, grad, bool(learned)
                    )
                    for real in masks:  # a NaN of padding alone ends here
                        if real is not None:
                            of_tile.masked_fill_(~real, 0.0)
                    of_products = of_tile.reshape(len(laid), -1)
                    if of_rows is not None:
                        of_rows[texts].flatten(0, 1).addmm_(of_products.T, laid)
                    if needs_columns:
                        of_laid.addmm_(of_products, flat)
                    for whole, part in zip(of_matrices, more, strict=True):
                        whole += part
                if needs_columns:
                    of_columns[videos] = tiles.back(of_laid)
            return [of_columns, *of_matrices]

        with torch.autocast(rows.device.type, enabled=False):
            sums, *others = in_threads(work, *_shares(rows))
        for more in others:
            for whole, part in zip(sums, more, strict=True):
                whole += part
        of_columns, *of_matrices = sums
        none = (None for _ in matrices)
        return None, None, of_rows, of_columns if needs_columns else None, None, None, *(of_matrices or none)


class _Tiles:
    """How `rows [T, W, D]` and `columns [V, F, D]`, divided by the temperature, are cut. Padding is 0."""

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        row_mask: Tensor | None,
        column_mask: Tensor | None,
        temperature: float,
        backward: bool = False,
    ) -> None:
        self._rows, self._columns, self._temperature = rows, columns, temperature
        self._row_mask, self._column_mask = row_mask, column_mask
        size = _CACHE if columns.device.type == "cpu" else _DEVICE
        size //= 2 if backward else 1  # it has twice as many tensors of a tile's size
        self._texts = max(1, size // (rows.shape[1] * columns.shape[1] * _VIDEOS))

    def columns(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Which videos, their frames `[F * v, D]` and mask."""
        for start in range(0, len(self._columns), _VIDEOS):
            videos = slice(start, start + _VIDEOS)
            laid, real = (self._columns[videos] / self._temperature).transpose(0, 1), None
            if self._column_mask is not None:
                real = self._column_mask[videos].T.bool()
                laid = laid.masked_fill(~real[..., None], 0.0)
                real = real[..., None, None]
            yield videos, laid.flatten(0, 1), real

    def back(self, of_laid: Tensor) -> Tensor:
        """A gradient `[F * v, D]` as `[v, F, D]`."""
        return of_laid.unflatten(0, (self._columns.shape[1], -1)).transpose(0, 1) / self._temperature

    def rows(self, share: slice) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Which texts of a share, their words `[t * W, D]` and mask."""
        for start in range(share.start, share.stop, self._texts):
            texts = slice(start, min(start + self._texts, share.stop))
            words, real = self._rows[texts], None
            if self._row_mask is not None:
                real = self._row_mask[texts].bool()
                words = words.masked_fill(~real[..., None], 0.0)
                real = real[None, None]
            yield texts, words.flatten(0, 1), real

    def products(self, laid: Tensor, flat: Tensor) -> Tensor:
        """The tile `[F, v, t, W]`."""
        (_, words, _), frames = self._rows.shape, self._columns.shape[1]
        return (laid @ flat.T).view(frames, len(laid) // frames, -1, words)


def _mixings(matrices: Sequence[Tensor]) -> list[Mixing]:
    """The matrices, None for those that are the identity."""
    return [None if torch.equal(matrix, torch.eye(len(matrix)).to(matrix)) else matrix for matrix in matrices]


def _shares(rows: Tensor) -> tuple[list[slice], int]:
    """The texts in equal shares, one a worker; which share a text is in depends on nothing else."""
    workers = min(workers_on(rows.device), len(rows))
    ends = [len(rows) * part // workers for part in range(workers + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)], workers
