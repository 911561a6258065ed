"""AOSM on a GPU: Triton kernels with a backward of their own. `formula.py` is the definition.

A program scores a tile of texts with a tile of videos and keeps nothing but the result. The backward makes
the scores again, some texts at a time, writes their gradient, and leaves the two products with the features
to cuBLAS: three products in all, no atomics, so the same numbers every time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xclip_lab.aosm.matrices import Matrices, check
from xclip_lab.errors import ConfigError

_CHUNK = 2**23  # numbers of the scores' gradient at a time: 32 MiB
_MOST = 2**14  # numbers of a pair's padded matrix that still fit a program


class Tile(NamedTuple):
    """How much a program does: rows of words, columns of frames, how much of D at a time, by how many warps.

    `stages` of D are loaded ahead; `twice` the columns share one reading of the words. The sizes were chosen
    by what the compiler says of registers and shared memory, not by time on a GPU: `benchmarks/aosm_gpu.py
    --tiles` tries others.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    twice: bool


FORWARD = {torch.float16: Tile(128, 128, 64, 8, 3, True), torch.float32: Tile(128, 128, 32, 8, 2, False)}
SMALL = Tile(64, 64, 32, 4, 2, False)  # where a program has less shared memory than an A100's
BACKWARD = {torch.float16: Tile(64, 128, 64, 8, 2, False), torch.float32: Tile(64, 128, 32, 8, 2, False)}


def available(device: torch.device | str) -> str | None:
    """Why the kernels cannot be used on `device`, in one line; None where they can."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "the Triton kernels need the package triton, which is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
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
            Both float16 or both float32. Products of float16 add up in float32; bfloat16 is refused, as it
            moves one argmax in fifty.
        matrices: the four learned ones. temperature: tau.
        word_mask: `[T, W]`, frame_mask: `[V, F]`, 1 = real; None for the official behaviour.

    Returns:
        `[T, V]`, float32. A NaN in a text or video stays in its row or column.

    Raises:
        ConfigError: a device, precision, shape or temperature that the kernels do not take.
    """
    _refuse(words, frames, matrices, temperature, word_mask, frame_mask)
    if not len(words) or not len(frames):
        return torch.einsum("twd,vfd->tv", words.float(), frames.float())  # empty, with its gradient
    return _Aosm.apply(words, frames, *matrices, temperature, word_mask, frame_mask)


def vector_aosm(
    tokens: Tensor, pooled: Tensor, mixing: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """`formula.attend` over the tokens of each pair (X-CLIP eq. 7, 8).

    That is AOSM of videos with one frame: there is nothing to weigh over it, and the two halves are equal.

    Args:
        tokens: `[A, N, D]`, words or frames, normalised. pooled: `[B, D]`. mixing: `[N, N]`.
        mask: `[A, N]`, 1 = real; None for the official behaviour.

    Returns:
        `[A, B]`, as `matrix_aosm`.
    """
    return matrix_aosm(tokens, pooled[:, None], Matrices.of_vectors(mixing), temperature, mask)


def _refuse(
    words: Tensor,
    frames: Tensor,
    matrices: Matrices,
    temperature: float,
    word_mask: Tensor | None,
    frame_mask: Tensor | None,
) -> None:
    if reason := available(words.device):
        raise ConfigError(f"{reason}; use another backend")
    if words.dtype not in FORWARD or frames.dtype != words.dtype:
        raise ConfigError(
            f"the Triton kernels take features in float16 or float32, got {_name(words)} words and "
            f"{_name(frames)} frames; convert both (bfloat16 is too coarse for AOSM: it moves maxima)"
        )
    check(words, frames, matrices, temperature, word_mask, frame_mask)
    length, count = words.shape[1], frames.shape[1]
    if _padded(length, False) * _padded(count, False) > _MOST:
        raise ConfigError(
            f"a matrix of {length} words and {count} frames does not fit the Triton kernels (128 x 128 "
            "does); use another backend"
        )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class _Aosm(torch.autograd.Function):
    """Saves the features, not the scores."""

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
    ) -> Tensor:
        words, frames = words.contiguous(), frames.contiguous()
        of_words, of_frames = _corrections(word, word2), _corrections(frame, frame2)
        mixes = torch.stack((of_words.any(), of_frames.any())).tolist()  # one wait for the device
        masks = tuple(
            None if mask is None else mask.to(torch.int8).contiguous() for mask in (word_mask, frame_mask)
        )
        ctx.save_for_backward(words, frames, *masks, of_words, of_frames)
        ctx.temperature, ctx.mixes = temperature, mixes
        out = words.new_empty(len(words), len(frames), dtype=torch.float32)
        plan = _Plan.of(FORWARD[words.dtype], words, frames, *mixes)
        plan.launch(
            "forward", len(words), words, frames, *masks, of_words, of_frames, out,
            len(words), len(frames), math.log2(math.e) / temperature,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        words, frames, word_mask, frame_mask, of_words, of_frames = ctx.saved_tensors
        needs_words, needs_frames, *needs_matrices = ctx.needs_input_grad[:6]
        learn_words = needs_matrices[0] or needs_matrices[2]
        learn_frames = needs_matrices[1] or needs_matrices[3]
        (texts, length, width), (videos, count, _) = words.shape, frames.shape
        grad, k = grad.float().contiguous(), 1 / ctx.temperature
        mixes = (ctx.mixes[0] or learn_words, ctx.mixes[1] or learn_frames)
        plan = _Plan.of(BACKWARD[words.dtype], words, frames, *mixes)
        flat_frames = frames.float().flatten(0, 1)
        grad_words = torch.empty_like(words)
        grad_frames = torch.zeros_like(flat_frames)
        grad_word, grad_frame = torch.zeros_like(of_words), torch.zeros_like(of_frames)
        step = max(1, _CHUNK // (length * videos * count * plan.texts)) * plan.texts
        with torch.autocast(words.device.type, enabled=False):
            for start in range(0, texts, step):
                part = slice(start, min(start + step, texts))
                size = part.stop - start
                programs = plan.programs(size)
                of_scores = grad.new_empty(size * length, videos * count)
                word_parts = grad.new_empty(programs, *of_words.shape) if learn_words else None
                frame_parts = grad.new_empty(programs, *of_frames.shape) if learn_frames else None
                plan.launch(
                    "backward", size, words[part], frames,
                    None if word_mask is None else word_mask[part], frame_mask, of_words, of_frames,
                    grad[part], of_scores, word_parts, frame_parts, size, videos, k, k * math.log2(math.e),
                )  # fmt: skip
                if needs_words:
                    grad_words[part] = (of_scores @ flat_frames).view(size, length, width)
                if needs_frames:
                    grad_frames.addmm_(of_scores.T, words[part].float().flatten(0, 1))
                if word_parts is not None:
                    grad_word += word_parts.sum(0)
                if frame_parts is not None:
                    grad_frame += frame_parts.sum(0)
        of_features = (grad_words, grad_frames.view_as(frames).to(frames.dtype))
        grads = (*of_features, grad_word[0], grad_frame[0], grad_word[1], grad_frame[1])
        return (
            *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:6], strict=True)),
            None,
            None,
            None,
        )


def _corrections(first: Tensor, second: Tensor) -> Tensor:
    """`[2, N, N]`: what the matrices add to the identity."""
    matrices = torch.stack((first, second)).float()
    return matrices - torch.eye(matrices.shape[-1], device=matrices.device)


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
    all_videos: int
    constants: dict[str, int | bool]

    @classmethod
    def of(cls, tile: Tile, words: Tensor, frames: Tensor, mix_words: bool, mix_frames: bool) -> _Plan:
        (_, length, width), (videos, count, _) = words.shape, frames.shape
        if words.is_cuda and _shared_memory(words.device) < 160_000:
            tile = SMALL
        word_slots, frame_slots = _padded(length, mix_words), _padded(count, mix_frames)
        columns = tile.columns // 2 if mix_words or mix_frames else tile.columns  # mixing takes registers
        texts = max(1, tile.rows // word_slots)
        per = max(1, columns // frame_slots)
        while texts * word_slots * per * frame_slots > tile.rows * columns and texts * per > 1:
            texts, per = (texts // 2, per) if texts > 1 else (texts, per // 2)
        constants = {
            "W": length,
            "F": count,
            "D": width,
            "BT": texts,
            "BV": per,
            "WP": word_slots,
            "FP": frame_slots,
        }
        depth = min(tile.depth, _padded(width, True))
        constants |= {"BD": depth, "MIX_WORDS": mix_words, "MIX_FRAMES": mix_frames, "TWICE": tile.twice}
        return cls(tile, texts, per, videos, constants)

    def programs(self, texts: int) -> int:
        return -(-texts // self.texts) * -(-self.all_videos // (self.videos << self.tile.twice))

    def launch(self, name: str, texts: int, *arguments: Any) -> None:
        device = arguments[0].device
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        try:
            from xclip_lab.aosm import programs

            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                getattr(programs, name)[(self.programs(texts),)](*arguments, **self.constants, **options)
        except Exception as error:  # no C compiler, a driver that is too old, more than a program may have
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"the Triton kernels fail on {device}: {reason}; use another backend"
            ) from error
