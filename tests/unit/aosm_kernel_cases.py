"""Cases of the Triton kernels, run by test_aosm_kernels.py in a process of its own: through Triton's
interpreter on the CPU where TRITON_INTERPRET=1, else on the GPU."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from xclip_lab.aosm import kernels
from xclip_lab.aosm.formula import attend
from xclip_lab.aosm.kernels import Tile, matrix_aosm, vector_aosm
from xclip_lab.aosm.matrices import Matrices
from xclip_lab.errors import ConfigError

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# T, V, W, F, D: none a multiple of its tile. Then tau and the norm of the features: at the last the scores
# lie tens of thousands of temperatures apart, which no common factor of the exponentials survives.
SIZES = {
    "papers": (3, 5, 32, 12, 40, 0.01, 1.0),
    "odd": (3, 5, 20, 7, 24, 1.0, 1.0),
    "sharp": (5, 11, 5, 3, 16, 0.01, 20.0),
}
MODES = list(itertools.product([False, True], repeat=3))  # word mask, frame mask, general matrices
FP32, FP16 = torch.float32, torch.float16
CASES = [("papers", FP32, *mode) for mode in MODES]  # at every mode; elsewhere two that have all between them
CASES += [(name, FP32, *mode) for name in ("odd", "sharp") for mode in (MODES[1], MODES[6])]
CASES += [(name, FP16, *mode) for name in SIZES for mode in (MODES[0], MODES[7])]
EPSILON = {torch.float16: 2**-11, torch.float32: 2**-21}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, and several chunks of the backward, out of few numbers: the interpreter is slow."""
    for table, twice in ((kernels.FORWARD, True), (kernels.BACKWARD, False)):
        for dtype in table:
            monkeypatch.setitem(table, dtype, Tile(64, 32, 16, 4, 2, twice))
    monkeypatch.setattr(kernels, "_CHUNK", 3000)


def formula(
    words: Tensor,
    frames: Tensor,
    matrices: Matrices,
    tau: float,
    word_mask: Tensor | None,
    frame_mask: Tensor | None,
) -> Tensor:
    scores = torch.einsum("twd,vfd->tvwf", words, frames)
    over_words = None if word_mask is None else word_mask[:, None]
    over_frames = None if frame_mask is None else frame_mask[None]
    over_matrix = None if over_words is None else over_words[:, :, None]
    a = attend(scores.transpose(2, 3), matrices.word, tau, over_matrix)
    b = attend(scores, matrices.frame, tau, None if over_frames is None else over_frames[:, :, None])
    return (attend(a, matrices.frame2, tau, over_frames) + attend(b, matrices.word2, tau, over_words)) / 2


def features(count: int, length: int, width: int, norm: float, dtype: torch.dtype) -> Tensor:
    return (normalize(torch.randn(count, length, width), dim=-1) * norm).to(DEVICE, dtype)


def near_identity(size: int, general: bool) -> Tensor:
    return (torch.eye(size) + general * 0.1 * torch.randn(size, size)).to(DEVICE)


def lengths(count: int, most: int, wanted: bool) -> Tensor | None:
    return (torch.arange(most) < torch.randint(1, most + 1, (count, 1))).long().to(DEVICE) if wanted else None


def with_gradients(function, inputs: list[Tensor], dtype: torch.dtype, weights: Tensor) -> list[Tensor]:
    """The result and its gradients, in float64."""
    leaves = [
        tensor.detach().to(dtype if dtype is not None else tensor.dtype).requires_grad_() for tensor in inputs
    ]
    result = function(*leaves)
    return [x.double() for x in (result.detach(), *torch.autograd.grad((result * weights).sum(), leaves))]


def assert_as_good_as_eager(ours, eager, inputs: list[Tensor], weights: Tensor) -> None:
    """Against float64: at most four times the error of the formula in float32 on the same inputs (few near
    ties make most of either, so that by chance one is up to thrice the other), besides what rounding each
    number once may cost: in float16 a gradient returned in the input's own precision, in float32 three bits
    for sums that run in another order where eager happens to be exact."""
    exact = with_gradients(eager, inputs, torch.float64, weights)
    plain = with_gradients(eager, inputs, torch.float32, weights)
    dtypes = (torch.float32, *(tensor.dtype for tensor in inputs))
    made = with_gradients(ours, inputs, None, weights)
    for number, (x, y, z, dtype) in enumerate(zip(made, plain, exact, dtypes, strict=True)):
        error, allowed = (x - z).norm().item(), 4 * (y - z).norm().item() + EPSILON[dtype] * z.norm().item()
        assert error <= allowed, f"output {number}: {error} > {allowed}"


@pytest.mark.parametrize(("name", "dtype", "word_mask", "frame_mask", "general"), CASES)
@pytest.mark.usefixtures("small_tiles")
def test_matrix(name, dtype, word_mask, frame_mask, general):
    texts, videos, words, frames, width, tau, norm = SIZES[name]
    torch.manual_seed(2)  # no near tie, which at a sharp distance one rounding decides, eager's or ours
    inputs = [features(texts, words, width, norm, dtype), features(videos, frames, width, norm, dtype)]
    inputs += [near_identity(size, general) for size in (words, frames, words, frames)]
    real = (lengths(texts, words, word_mask), lengths(videos, frames, frame_mask))
    assert_as_good_as_eager(
        lambda w, f, *m: matrix_aosm(w, f, Matrices(*m), tau, *real),
        lambda w, f, *m: formula(w, f, Matrices(*m), tau, *real),
        inputs,
        torch.randn(texts, videos, device=DEVICE),
    )


@pytest.mark.parametrize(("dtype", "masked", "general"), [(FP32, False, True), (FP16, True, False)])
@pytest.mark.usefixtures("small_tiles")
def test_vector(dtype, masked, general):
    torch.manual_seed(0)
    inputs = [features(5, 12, 24, 1, dtype), features(1, 37, 24, 1, dtype)[0], near_identity(12, general)]
    real = lengths(5, 12, masked)
    assert_as_good_as_eager(
        lambda x, y, m: vector_aosm(x, y, m, 0.01, real),
        lambda x, y, m: attend(
            torch.einsum("and,bd->abn", x, y), m, 0.01, None if real is None else real[:, None]
        ),
        inputs,
        torch.randn(5, 37, device=DEVICE),
    )


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_tiles_as_they_are(dtype):
    """At the papers' sizes; on a GPU with more than one tile each way, and all of D."""
    texts, videos, width = (3, 4, 24) if DEVICE == "cpu" else (70, 130, 512)
    torch.manual_seed(0)
    inputs = [features(texts, 32, width, 1, dtype), features(videos, 12, width, 1, dtype)]
    inputs += [near_identity(size, True) for size in (32, 12, 32, 12)]
    assert_as_good_as_eager(
        lambda w, f, *m: matrix_aosm(w, f, Matrices(*m), 0.01),
        lambda w, f, *m: formula(w, f, Matrices(*m), 0.01, None, None),
        inputs,
        torch.randn(texts, videos, device=DEVICE),
    )


@pytest.fixture
def tiny() -> tuple[Tensor, Tensor, Matrices]:
    torch.manual_seed(0)
    matrices = Matrices(*(near_identity(size, True) for size in (4, 3, 4, 3)))
    return features(5, 4, 16, 1, torch.float32), features(6, 3, 16, 1, torch.float32), matrices


@pytest.mark.usefixtures("small_tiles")
def test_nan_stays_in_its_row_and_column(tiny):
    words, frames, matrices = tiny
    clean = matrix_aosm(words, frames, matrices, 0.01)
    words[1, 2, 3] = frames[4, 0, 0] = torch.nan
    scores = matrix_aosm(words, frames, matrices, 0.01)
    assert scores[1].isnan().all()
    assert scores[:, 4].isnan().all()
    scores[1], scores[:, 4] = clean[1], clean[:, 4]
    torch.testing.assert_close(scores, clean, rtol=0, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_only_the_gradients_that_are_wanted(tiny):
    words, frames, matrices = tiny
    frames.requires_grad_()
    matrix_aosm(words, frames, matrices, 0.01).sum().backward()
    alone = frames.grad
    leaves = [tensor.detach().requires_grad_() for tensor in (words, frames, *matrices)]
    result = matrix_aosm(leaves[0], leaves[1], Matrices(*leaves[2:]), 0.01)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), leaves)[1], alone)
    assert not matrices.word.requires_grad


def test_nothing_to_score(tiny):
    words, frames, matrices = tiny
    assert matrix_aosm(words[:0], frames, matrices, 0.01).shape == (0, 6)
    assert matrix_aosm(words, frames[:0], matrices, 0.01).shape == (5, 0)


def test_bad_input_is_one_line(tiny):
    words, frames, matrices = tiny
    long = torch.zeros(1, 256, 16, device=DEVICE)
    big = torch.eye(256, device=DEVICE)
    for message, arguments in {
        "got bfloat16 words": (words.bfloat16(), frames.bfloat16(), matrices, 0.01),
        "got float32 words and float16 frames": (words, frames.half(), matrices, 0.01),
        "temperature: 0": (words, frames, matrices, 0),
        "temperature: nan": (words, frames, matrices, float("nan")),
        r"sizes: \[\(4, 4\), \(3, 3\)": (words, frames, matrices._replace(frame=matrices.word), 0.01),
        r"\(6, 3\)\], got": (words, frames, matrices, 0.01, None, torch.ones(5, 3, device=DEVICE)),
        "256 words and 256 frames does not fit": (long, long, Matrices(big, big, big, big), 0.01),
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            matrix_aosm(*arguments)
        assert "\n" not in str(error.value)
