"""AOSM on a GPU: Triton kernels with a backward of their own. `formula.py` is the definition.

A program scores a tile of texts with a tile of videos and keeps nothing but the result. The backward makes
the scores again, some texts at a time, and writes their gradient; all sums over pairs, for the gradients of
the features and of the matrices, are left to cuBLAS. No atomics, so the same numbers every time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from xclip_lab.aosm import formula
from xclip_lab.aosm.matrices import Matrices, check
from xclip_lab.errors import ConfigError
from xclip_lab.memory import is_out_of_memory

_CHUNK = 2**24  # numbers at a time that the backward writes: 64 MiB
_MOST = 2**14  # numbers of a pair's padded matrix that still fit a program
_CLOSE = 5e-3  # of the norm: float16 gradients err by a tenth of it


class KernelError(ConfigError):
    """The kernels do not compile, do not start or give wrong numbers here, whatever they are given."""


class Tile(NamedTuple):
    """How much a program does: rows of words, columns of frames, how much of D at a time, by how many warps.

    `stages` of D are loaded ahead; `twice` the columns share one reading of the words. Mixing by a learned
    matrix takes registers: then it is half the columns, once. Chosen by what the compiler says of registers
    that spill, not by time on a GPU (`xclip-lab bench aosm_gpu --tiles` tries others).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    twice: bool


FORWARD = {torch.float16: Tile(128, 128, 64, 8, 3, True), torch.float32: Tile(128, 128, 32, 8, 2, False)}
SMALL = Tile(64, 64, 32, 4, 3, False)  # before Hopper and on small Blackwells: the others spill there
BACKWARD = {torch.float16: Tile(64, 128, 64, 8, 2, False), torch.float32: Tile(64, 128, 32, 8, 2, False)}


def available(
    device: torch.device | str, dtype: torch.dtype = torch.float32, words: int = 1, frames: int = 1
) -> str | None:
    """Why the kernels cannot be used on `device`, for features of this precision and pairs of so many words
    and frames, in one line; None where they can."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "the Triton kernels need the package triton, which is not installed"
    if dtype not in FORWARD:
        name = str(dtype).removeprefix("torch.")
        return (
            "the Triton kernels take features in float16 or float32 (bfloat16 is too coarse for AOSM), not "
            f"{name}"
        )
    if _padded(words, False) * _padded(frames, False) > _MOST:
        return (
            f"a matrix of {words} words and {frames} frames does not fit the Triton kernels (128 x 128 does)"
        )
    if "TRITON_INTERPRET" in os.environ and _interpreted():
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the Triton kernels need an NVIDIA GPU, and the device is {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return (
            f"the Triton kernels need compute capability 8.0 (A100 and later), and "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    return None


def _interpreted() -> bool:
    """Whether Triton runs the programs on the CPU: which values of the variable mean so, only it knows."""
    from triton.runtime import JITFunction

    from xclip_lab.aosm import programs

    return not isinstance(programs.forward, JITFunction)


def matrix_aosm(
    words: Tensor,
    frames: Tensor,
    matrices: Matrices,
    temperature: float,
    word_mask: Tensor | None = None,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """As `blocked.matrix_aosm`, but the features must both be float16 or both float32, whose products add up
    in float32, and the result is float32.

    Raises:
        ConfigError: a device, precision, shape or temperature that the kernels do not take.
        KernelError: kernels that fail, or give other numbers than the formula; those of the backward are
            tried too, where a gradient is wanted.
    """
    check(words, frames, matrices, temperature, word_mask, frame_mask)
    length, count = words.shape[1], frames.shape[1]
    for features in (words, frames):
        if reason := available(features.device, features.dtype, length, count):
            raise ConfigError(f"{reason}; use another backend")
    if frames.dtype != words.dtype:
        raise ConfigError(
            f"the Triton kernels take one precision, not {words.dtype} and {frames.dtype}; cast both to one"
        )
    if not len(words) or not len(frames):
        return torch.einsum("twd,vfd->tv", words.float(), frames.float())  # empty, with its gradient
    mixes = _mixes(matrices)
    if words.is_cuda:
        masked = word_mask is not None, frame_mask is not None
        compare(words.device, words.dtype, (length, count, words.shape[2]), masked, mixes)
    wanted = torch.is_grad_enabled()
    return _Aosm.apply(words, frames, *matrices, temperature, word_mask, frame_mask, mixes, wanted)


def vector_aosm(
    tokens: Tensor, pooled: Tensor, mixing: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """As `blocked.vector_aosm`, with the precisions and errors of `matrix_aosm`.

    It is AOSM of videos with one frame: there is nothing to weigh over it, and the two halves are equal.
    """
    check(tokens, pooled[:, None], [mixing], temperature, mask, None)
    return matrix_aosm(tokens, pooled[:, None], Matrices.of_vectors(mixing), temperature, mask)


@cache
def compare(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    masked: tuple[bool, bool],
    mixes: tuple[bool, bool],
) -> None:
    """Hold the kernels, as this GPU's compiler made them for such pairs, against the formula: scores and
    gradients, with matrices that learn and with fixed ones, of random pairs, more than one program takes.
    Once for each program.

    Args:
        sizes: W, F and D. masked: whether there are masks of words and of frames. mixes: as of `_mixes`.

    Raises:
        KernelError: other numbers.
    """
    length, count, width = sizes
    plan, draw = _Plan.cut(FORWARD[dtype], *sizes, *mixes), torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        features = [
            normalize(torch.randn(pairs + 1, of, width, generator=draw), dim=-1).to(device, dtype)
            for pairs, of in ((plan.texts, length), (plan.videos, count))
        ]
        mixings = [
            torch.eye(n) + mix * 0.1 * torch.randn(n, n, generator=draw) / n**0.5
            for n, mix in zip((length, count), mixes, strict=True)
        ]
        masks = [
            torch.arange(of.shape[1], device=device) < torch.arange(len(of), device=device)[:, None] + 1
            if mask
            else None
            for of, mask in zip(features, masked, strict=True)
        ]
        ours = [of.detach().requires_grad_() for of in (*features, *(m.to(device) for m in mixings * 2))]
        right = [of.detach().double().requires_grad_() for of in ours]
        scores = _Aosm.apply(*ours, 0.05, *masks, mixes, True)
        fixed = [of.detach() for of in ours[2:]]
        of_fixed = _Aosm.apply(*ours[:2], *fixed, 0.05, *masks, mixes, True)
        expected = formula.matrix_aosm(right[0], right[1], Matrices(*right[2:]), 0.05, *masks)
        of_all = torch.autograd.grad(expected.sum(), right)
        found = [scores, *torch.autograd.grad(scores.sum(), ours)]
        found += torch.autograd.grad(of_fixed.sum(), ours[:2])
        exact = [expected, *of_all, *of_all[:2]]
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    if not max(errors) < _CLOSE:
        raise KernelError(
            f"the Triton kernels give other numbers than the formula on {device} (relative error "
            f"{max(errors):.1g}); use another backend"
        )


class _Aosm(torch.autograd.Function):
    """`matrix_aosm` of what fits; saves the features only."""

    @staticmethod
    def forward(
        ctx: Any,
        words: Tensor,
        frames: Tensor,
        word: Tensor,
        frame: Tensor,
        word2: Tensor,
        frame2: Tensor,
        temperature: float,
        word_mask: Tensor | None,
        frame_mask: Tensor | None,
        mixes: tuple[bool, bool],
        wanted: bool,
    ) -> Tensor:
        ctx.temperature, ctx.mixes = temperature, mixes
        inputs = _Inputs(
            _real(words, word_mask),
            _real(frames, frame_mask),
            _numbers(word_mask),
            _numbers(frame_mask),
            _corrections(word, word2),
            _corrections(frame, frame2),
        )
        ctx.save_for_backward(*inputs)
        if wanted and any(ctx.needs_input_grad):  # what fails, fails where another way can still be taken
            one, zero = inputs.some(slice(1), slice(1)), torch.zeros(1, 1, device=words.device)
            _backward(one, zero, temperature, ctx.mixes, any(ctx.needs_input_grad[2:6]))
        out = torch.empty(len(words), len(frames), device=words.device)
        plan = _Plan.of(FORWARD, inputs, ctx.mixes)
        plan.launch("forward", *inputs, out, *out.shape, math.log2(math.e) / temperature)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = _Inputs(*ctx.saved_tensors)
        (texts, length, width), (videos, count, _) = inputs.words.shape, inputs.frames.shape
        grad, flat_frames = grad.float().contiguous(), inputs.frames.float().flatten(0, 1)
        needs_words, needs_frames = ctx.needs_input_grad[:2]
        learn = any(ctx.needs_input_grad[2:6])
        of_words = torch.empty_like(inputs.words)
        of_frames = torch.zeros_like(flat_frames)
        of_matrices = [torch.zeros_like(part) for part in (*inputs.of_words, *inputs.of_frames)]
        a_text = videos * (length * count * 4 + 2 * (length + count) if learn else length * count)
        step = max(1, _CHUNK // a_text)
        with torch.autocast(grad.device.type, enabled=False):
            for start in range(0, texts, step):
                part = slice(start, min(start + step, texts))
                some = inputs.some(part, slice(None))
                of_scores, factors = _backward(some, grad[part], ctx.temperature, ctx.mixes, learn)
                of_products = of_scores.view(-1, videos * count)
                if needs_words:
                    of_words[part] = (of_products @ flat_frames).view(-1, length, width)
                if needs_frames:
                    of_frames.addmm_(of_products.T, some.words.float().flatten(0, 1))
                for whole, more in zip(of_matrices, _of_matrices(*factors) if learn else (), strict=False):
                    whole += more
        of_word, of_word2, of_frame, of_frame2 = of_matrices
        of_features = of_words, of_frames.view_as(inputs.frames).to(inputs.frames.dtype)
        grads = (*of_features, of_word, of_frame, of_word2, of_frame2)
        needed = zip(grads, ctx.needs_input_grad[:6], strict=True)
        return *(made if need else None for made, need in needed), None, None, None, None, None


class _Inputs(NamedTuple):
    """What both programs read: features, masks (int8), and what the matrices add to the identity."""

    words: Tensor  # [T, W, D]
    frames: Tensor  # [V, F, D]
    word_mask: Tensor | None  # [T, W]
    frame_mask: Tensor | None  # [V, F]
    of_words: Tensor  # [2, W, W], of either stage
    of_frames: Tensor  # [2, F, F]

    def some(self, texts: slice, videos: slice) -> _Inputs:
        """Of these texts and videos."""
        word_mask = None if self.word_mask is None else self.word_mask[texts]
        frame_mask = None if self.frame_mask is None else self.frame_mask[videos]
        return self._replace(
            words=self.words[texts], frames=self.frames[videos], word_mask=word_mask, frame_mask=frame_mask
        )


def _backward(
    inputs: _Inputs, grad: Tensor, temperature: float, mixes: tuple[bool, bool], learn: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """What `programs.backward` writes: `of_scores` and, if the matrices `learn`, the factors of theirs."""
    (texts, length, _), (videos, count, _) = inputs.words.shape, inputs.frames.shape
    of_scores = grad.new_empty(texts, length, videos, count)
    factors = []
    if learn:
        factors.append(grad.new_empty(3, texts, length, videos, count))
        factors += [grad.new_empty(2, texts * videos, size) for size in (length, count)]
    k = 1 / temperature
    plan = _Plan.of(BACKWARD, inputs, mixes)
    written = of_scores, *(factors or (None, None, None))
    plan.launch("backward", *inputs, grad, *written, texts, videos, k, k * math.log2(math.e))
    return of_scores, factors


def _of_matrices(tiles: Tensor, of_words: Tensor, of_frames: Tensor) -> tuple[Tensor, ...]:
    """The gradients of both word matrices and of both frame matrices."""
    scores, over_words, over_frames = tiles
    of_word = torch.bmm(over_words.flatten(2), scores.flatten(2).mT).sum(0)
    of_frame = over_frames.flatten(0, 2).T @ scores.flatten(0, 2)
    return of_word, of_words[0].T @ of_words[1], of_frame, of_frames[0].T @ of_frames[1]


def _real(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features with 0 as padding, as a NaN there would spread over sums of products."""
    return (features if mask is None else features.masked_fill(~mask.bool()[..., None], 0.0)).contiguous()


def _numbers(mask: Tensor | None) -> Tensor | None:
    """A mask as a program reads it; what is not 0 is real."""
    return None if mask is None else mask.bool().to(torch.int8)


def _mixes(matrices: Matrices) -> tuple[bool, bool]:
    """Whether the matrices of the words are not the identity, and those of the frames."""
    pairs = (matrices.word, matrices.word2), (matrices.frame, matrices.frame2)
    words, frames = torch.stack([_corrections(*pair).any() for pair in pairs]).tolist()  # one wait
    return words, frames


def _corrections(first: Tensor, second: Tensor) -> Tensor:
    """`[2, N, N]`: what the matrices add to the identity."""
    matrices = torch.stack((first, second)).float()
    return matrices - torch.eye(matrices.shape[-1], dtype=torch.float32, device=matrices.device)


def _padded(count: int, product: bool) -> int:
    """The next power of two; at least 16 where a matrix of that size is a factor on the tensor cores."""
    return max(16 if product else 1, 1 << (count - 1).bit_length())


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class _Plan(NamedTuple):
    """How one launch cuts the work. `texts`, `videos` of a program; the rest are the programs' constants."""

    tile: Tile
    texts: int
    videos: int
    constants: dict[str, int | bool]

    @classmethod
    def of(cls, tiles: dict[torch.dtype, Tile], inputs: _Inputs, mixes: tuple[bool, bool]) -> _Plan:
        words, frames = inputs[:2]
        tile = tiles[words.dtype]
        if words.is_cuda and _shared_memory(words.device) < 200_000:
            tile = SMALL
        return cls.cut(tile, words.shape[1], frames.shape[1], words.shape[2], *mixes)

    @classmethod
    def cut(cls, tile: Tile, length: int, count: int, width: int, mix_words: bool, mix_frames: bool) -> _Plan:
        """For pairs of `length` words and `count` frames of `width` numbers."""
        word_slots, frame_slots = _padded(length, mix_words), _padded(count, mix_frames)
        if mix_words or mix_frames:  # mixing takes registers
            tile = tile._replace(columns=tile.columns // 2, twice=False)
        texts = max(1, tile.rows // word_slots)
        videos = max(1, tile.columns // frame_slots)
        while texts * word_slots * videos * frame_slots > tile.rows * tile.columns and texts * videos > 1:
            texts, videos = (texts // 2, videos) if texts > 1 else (texts, videos // 2)
        constants = {"W": length, "F": count, "D": width, "BT": texts, "BV": videos}
        constants |= {"WP": word_slots, "FP": frame_slots, "BD": min(tile.depth, _padded(width, True))}
        constants |= {"MIX_WORDS": mix_words, "MIX_FRAMES": mix_frames}
        return cls(tile, texts, videos << tile.twice, constants)

    def launch(self, name: str, words: Tensor, frames: Tensor, *arguments: Any) -> None:
        device, constants = words.device, dict(self.constants)
        if name == "forward":
            constants["TWICE"] = self.tile.twice
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        count = -(-len(words) // self.texts) * -(-len(frames) // self.videos)
        try:
            from xclip_lab.aosm import programs

            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                getattr(programs, name)[(count,)](words, frames, *arguments, **constants, **options)
        except Exception as error:  # no C compiler, a driver that is too old, more than a program may have
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise KernelError(
                f"the Triton kernels fail on {device}: {reason}; use another backend"
            ) from error
