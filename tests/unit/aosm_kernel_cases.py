"""Cases of the Triton kernels, run by test_aosm_kernels.py in a process of its own: through Triton's
interpreter on the CPU where TRITON_INTERPRET=1, else on the GPU."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from xclip_lab.aosm import blocked, formula, kernels, programs
from xclip_lab.aosm.kernels import Tile, matrix_aosm, vector_aosm
from xclip_lab.aosm.matrices import Matrices
from xclip_lab.errors import ConfigError
from xclip_lab.heads.xclip import XClipConfig, XClipHead
from xclip_lab.tokens import TokenSet

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# T, V, W, F, D: none a multiple of its tile. Then tau and the norm of the features: at the last the scores
# lie tens of thousands of temperatures apart, which no common factor of the exponentials survives.
SIZES = {
    "papers": (3, 5, 32, 12, 40, 0.01, 1.0),
    "odd": (3, 5, 20, 7, 24, 1.0, 1.0),
    "sharp": (5, 11, 5, 3, 16, 0.01, 20.0),
    "one word": (3, 9, 1, 3, 16, 0.01, 1.0),  # and one video more than a tile has
}
MODES = list(itertools.product([False, True], repeat=3))  # word mask, frame mask, general matrices
FP32, FP16 = torch.float32, torch.float16
CASES = [("papers", FP32, *mode) for mode in MODES]  # at every mode; elsewhere two that have all between them
CASES += [(name, FP32, *mode) for name in ("odd", "sharp", "one word") for mode in (MODES[1], MODES[6])]
CASES += [(name, FP16, *mode) for name in SIZES for mode in (MODES[0], MODES[7])]
EPSILON = {torch.float16: 2**-11, torch.float32: 2**-21}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs, and several chunks of the backward, out of few numbers: the interpreter is slow."""
    for table, twice in ((kernels.FORWARD, True), (kernels.BACKWARD, False)):
        for dtype in table:
            monkeypatch.setitem(table, dtype, Tile(64, 32, 16, 4, 2, twice))
    monkeypatch.setattr(kernels, "_CHUNK", 20_000)


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
        lambda w, f, *m: formula.matrix_aosm(w, f, Matrices(*m), tau, *real),
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
        lambda x, y, m: formula.attend(
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
        lambda w, f, *m: formula.matrix_aosm(w, f, Matrices(*m), 0.01),
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


def of_features(function, words: Tensor, frames: Tensor, weights: Tensor, *rest) -> list[Tensor]:
    """The scores, and the gradients of words and frames."""
    leaves = [tensor.clone().requires_grad_() for tensor in (words, frames)]
    scores = function(*leaves, *rest)
    return [scores.detach(), *torch.autograd.grad(scores, leaves, weights)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("where", ["words", "gradient"])
def test_nan_stays_in_its_gradients(tiny, where):
    """Of its text and its video: a tile holds others, whose gradients are as without it."""
    words, frames, matrices = tiny
    weights = torch.randn(5, 6, device=DEVICE)
    weights[1], weights[:, 4] = 0, 0  # so that nothing else comes from that text and that video
    _, of_words, of_frames = of_features(matrix_aosm, words, frames, weights, matrices, 0.01)
    if where == "words":
        words[1, 2, 3] = frames[4, 0, 0] = torch.nan
    else:
        weights[1, 4] = torch.nan
    _, bad_words, bad_frames = of_features(matrix_aosm, words, frames, weights, matrices, 0.01)
    assert bad_words[1].isnan().any()
    assert bad_frames[4].isnan().any()
    if where == "gradient":
        bad_words[1], bad_frames[4] = of_words[1], of_frames[4]
        torch.testing.assert_close([bad_words, bad_frames], [of_words, of_frames], rtol=0, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_a_text_of_padding_alone(tiny):
    """Its scores are NaN; nothing else is, its gradients included."""
    words, frames, matrices = tiny
    word_mask = torch.tensor([4, 0, 2, 256, 1], device=DEVICE)[:, None] > torch.arange(4, device=DEVICE)
    word_mask = word_mask * 256  # any number but 0 is real
    words[2, 3] = torch.nan  # of padding: it goes nowhere
    weights = torch.randn(5, 6, device=DEVICE)
    found = of_features(matrix_aosm, words, frames, weights, matrices, 0.05, word_mask)
    expected = of_features(blocked.matrix_aosm, words, frames, weights, matrices, 0.05, word_mask)
    assert found[0].isnan().any(1).tolist() == [False, True, False, False, False]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("small_tiles")
def test_however_the_features_lie_in_memory(tiny):
    words, frames, matrices = tiny
    weights = torch.randn(6, 5, device=DEVICE).T
    masks = lengths(4, 5, True).T[:, :4], torch.ones(3, 6, device=DEVICE).T
    expected = of_features(matrix_aosm, words, frames, weights.contiguous(), matrices, 0.01, *masks)
    apart = words.mT.contiguous().mT, frames.transpose(0, 1).contiguous().transpose(0, 1)
    across = Matrices(*(matrix.T.contiguous().T for matrix in matrices))
    found = of_features(matrix_aosm, *apart, weights, across, 0.01, *masks)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


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


def test_a_backward_that_fails_says_so_in_the_forward(tiny, monkeypatch):
    """There another way can still be taken."""
    words, frames, matrices = tiny
    monkeypatch.setattr(programs, "backward", None)
    matrix_aosm(words, frames, matrices, 0.01)
    with pytest.raises(kernels.KernelError, match="the Triton kernels fail on"):
        matrix_aosm(words.requires_grad_(), frames, matrices, 0.01)


@pytest.mark.parametrize("backend", ["triton", "triton-fp16"])
def test_the_head_rounds_where_it_may(tiny, monkeypatch, backend):
    """To float16 if that was asked for and no gradient is wanted."""
    words, frames, _ = tiny
    text = TokenSet(words[:, 0], words, torch.ones(5, 4, device=DEVICE))
    video = TokenSet(frames[:, 0], frames, torch.ones(6, 3, device=DEVICE))
    head, seen = XClipHead(XClipConfig(backend=backend), 16, 4, 3).to(DEVICE), []
    score = kernels.matrix_aosm
    monkeypatch.setattr(kernels, "matrix_aosm", lambda w, *rest: seen.append(w.dtype) or score(w, *rest))
    with torch.no_grad():
        rough = head(text, video).logits
    exact = head(text, video).logits
    assert set(seen[:3]) == {FP16 if backend == "triton-fp16" else FP32}
    assert set(seen[3:]) == {FP32}
    torch.testing.assert_close(rough, exact, rtol=0, atol=1e-3)
    assert head.backend_on(words.device) == backend


@pytest.mark.usefixtures("small_tiles")
def test_kernels_are_held_against_the_formula(monkeypatch):
    """What a GPU does before it trusts its compiler."""
    given = (torch.device(DEVICE), torch.float32, (4, 3, 16))
    for flags in MODES:
        kernels.compare(*given, flags[:2], (flags[2], flags[0]))
    with torch.inference_mode():
        kernels.compare(*given, (False, False), (True, False))
    kernels.compare.cache_clear()
    right = kernels.formula.matrix_aosm
    monkeypatch.setattr(kernels.formula, "matrix_aosm", lambda *of: 1.01 * right(*of))
    with pytest.raises(kernels.KernelError, match=r"^the Triton kernels give other numbers than the formula"):
        kernels.compare(*given, (False, True), (True, True))


def test_nothing_to_score(tiny):
    words, frames, matrices = tiny
    assert matrix_aosm(words[:0], frames, matrices, 0.01).shape == (0, 6)
    assert matrix_aosm(words, frames[:0], matrices, 0.01).shape == (5, 0)


def test_bad_input_is_one_line(tiny):
    words, frames, matrices = tiny
    long = torch.zeros(1, 256, 16, device=DEVICE)
    big = torch.eye(256, device=DEVICE)
    for message, arguments in {
        "not bfloat16": (words.bfloat16(), frames.bfloat16(), matrices, 0.01),
        "one precision, not torch.float32 and torch.float16": (words, frames.half(), matrices, 0.01),
        "temperature: 0": (words, frames, matrices, 0),
        "temperature: nan": (words, frames, matrices, float("nan")),
        r"sizes: \[\(4, 4\), \(3, 3\)": (words, frames, matrices._replace(frame=matrices.word), 0.01),
        r"\(6, 3\)\], got": (words, frames, matrices, 0.01, None, torch.ones(5, 3, device=DEVICE)),
        "256 words and 256 frames does not fit": (long, long, Matrices(big, big, big, big), 0.01),
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            matrix_aosm(*arguments)
        assert "\n" not in str(error.value)
