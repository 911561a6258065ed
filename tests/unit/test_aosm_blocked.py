"""AOSM in tiles is the formula: scores and gradients, in every mode, however sharp and however large."""

import importlib.util
from itertools import product

import pytest
import torch
from torch.nn.functional import normalize

from tests.unit.tiny import tiny
from xclip_lab.aosm import blocked, kernels, tile
from xclip_lab.aosm.formula import attend, pool
from xclip_lab.aosm.formula import matrix_aosm as formula
from xclip_lab.aosm.matrices import Matrices
from xclip_lab.errors import ConfigError
from xclip_lab.heads import xclip
from xclip_lab.model import computed_by
from xclip_lab.tokens import TokenSet

MASKS = [(), ("words",), ("frames",), ("words", "frames")]


class Case:
    """Features, matrices and masks, all random."""

    def __init__(self, sizes, general, masks=(), dtype=torch.float64, length=1.0):
        torch.manual_seed(0)
        texts, videos, count, frames, width = sizes
        self.words = length * normalize(torch.randn(texts, count, width, dtype=dtype), dim=-1)
        self.frames = normalize(torch.randn(videos, frames, width, dtype=dtype), dim=-1)
        self.pooled = normalize(torch.randn(videos, width, dtype=dtype), dim=-1)
        self.matrices = Matrices(
            *(
                torch.eye(n, dtype=dtype) + general * torch.randn(n, n, dtype=dtype)
                for n in (count, frames, count, frames)
            )
        )
        self.word_mask = _mask(texts, count) if "words" in masks else None
        self.frame_mask = _mask(videos, frames) if "frames" in masks else None
        self.weight = torch.randn(texts, videos, dtype=dtype)

    def of(self, function, *inputs):
        """The result, and the gradients of a weighted sum of it."""
        leaves = [value.clone().requires_grad_() for value in inputs]
        result = function(*leaves)
        return [result.detach(), *torch.autograd.grad((result * self.weight).sum(), leaves)]

    def matrix(self, function, tau):
        masks = (self.word_mask, self.frame_mask)
        return self.of(
            lambda w, f, *m: function(w, f, Matrices(*m), tau, *masks),
            self.words,
            self.frames,
            *self.matrices,
        )

    def vector(self, function, tau):
        return self.of(
            lambda t, p, m: function(t, p, m, tau, self.word_mask),
            self.words,
            self.pooled,
            self.matrices.word,
        )


def random_features(seed, rows, length):
    torch.manual_seed(seed)
    tokens = torch.randn(rows, length, 32, dtype=torch.float64)
    return TokenSet(normalize(tokens.mean(1), dim=-1), tokens, _mask(rows, length))


def _mask(rows, length):
    return (torch.arange(length) < torch.randint(1, length + 1, (rows, 1))).long()


def whole_vector(tokens, pooled, mixing, tau, mask):
    scores = torch.einsum("twd,vd->tvw", tokens, pooled)
    return attend(scores, mixing, tau, None if mask is None else mask[:, None])


def assert_same(found, expected, largest):
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).abs().max() <= largest * right.abs().max()


@pytest.mark.parametrize(
    ("masks", "general", "sharpness"), list(product(MASKS, [0, 0.1], [(0.01, 1), (1.0, 1), (0.001, 3)]))
)
def test_equals_the_formula_in_every_mode(masks, general, sharpness):
    tau, length = sharpness
    case = Case((7, 150, 9, 5, 16), general, masks, length=length)
    assert_same(case.matrix(blocked.matrix_aosm, tau), case.matrix(formula, tau), 1e-12)
    assert_same(case.vector(blocked.vector_aosm, tau), case.vector(whole_vector, tau), 1e-12)


def test_gradcheck():
    case = Case((2, 3, 4, 3, 5), 0.1, ("words", "frames"))
    leaves = [value.requires_grad_() for value in (case.words, case.frames, *case.matrices)]
    masks = (case.word_mask, case.frame_mask)
    assert torch.autograd.gradcheck(
        lambda w, f, *m: blocked.matrix_aosm(w, f, Matrices(*m), 0.1, *masks), leaves
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 4), (1, 300, 32, 12, 8), (5, 3, 3, 7, 8)])
def test_odd_sizes(sizes):
    case = Case(sizes, 0.1)
    assert_same(case.matrix(blocked.matrix_aosm, 0.05), case.matrix(formula, 0.05), 1e-12)


def test_features_of_any_layout():
    case = Case((5, 70, 6, 3, 8), 0.1)
    expected = case.matrix(formula, 0.05)
    words, frames = (value.transpose(0, 1).contiguous() for value in (case.words, case.frames))
    leaves = [
        words.requires_grad_(),
        frames.requires_grad_(),
        *(m.clone().requires_grad_() for m in case.matrices),
    ]
    scores = blocked.matrix_aosm(words.transpose(0, 1), frames.transpose(0, 1), Matrices(*leaves[2:]), 0.05)
    found = torch.autograd.grad((scores * case.weight).sum(), leaves)
    right = [expected[1].transpose(0, 1), expected[2].transpose(0, 1), *expected[3:]]
    assert_same([scores, *found], [expected[0], *right], 1e-12)


def test_float32_errs_no_more_than_twice_what_the_formula_does():
    exact, single = Case((20, 140, 32, 12, 64), 0.05), Case((20, 140, 32, 12, 64), 0.05, dtype=torch.float32)
    single.words, single.frames = exact.words.float(), exact.frames.float()
    single.matrices, single.weight = Matrices(*(m.float() for m in exact.matrices)), exact.weight.float()
    right = exact.matrix(formula, 0.01)
    for ours, eager, truth in zip(
        single.matrix(blocked.matrix_aosm, 0.01), single.matrix(formula, 0.01), right, strict=True
    ):
        assert (ours - truth).norm() <= 2 * (eager - truth).norm()


@pytest.mark.parametrize("far", [0.5, 1.2, 1.9, 40.0])
def test_float32_is_finite_however_far_apart(far):
    """One exponential for both softmaxes, then one with a shift, then one for each."""
    case = Case((3, 4, 5, 3, 8), 0.05, dtype=torch.float32, length=far)
    assert_same(case.matrix(blocked.matrix_aosm, 0.01), case.matrix(formula, 0.01), 1e-4)


def test_what_is_no_aosm_is_refused_in_one_line():
    case = Case((3, 4, 5, 3, 8), 0.1)
    words, frames, matrices = case.words, case.frames, case.matrices
    for tau in (0.0, -1.0, torch.nan):
        with pytest.raises(ConfigError, match=f"^temperature: {tau} is not allowed"):
            blocked.matrix_aosm(words, frames, matrices, tau)
        with pytest.raises(ConfigError, match=f"^temperature: {tau} is not allowed"):
            blocked.vector_aosm(words, case.pooled, matrices.word, tau)
    for wrong in (words[0], words[:, :0]):
        with pytest.raises(ConfigError, match=r"takes words \[T, W, D\] and frames .*, got \["):
            blocked.matrix_aosm(wrong, frames, matrices, 0.1)
    with pytest.raises(ConfigError, match=r"takes matrices and masks of these sizes: .* got \[\(3, 3\)"):
        blocked.matrix_aosm(words, frames, matrices._replace(word=matrices.frame), 0.1)
    with pytest.raises(ConfigError, match="takes matrices and masks"):
        blocked.vector_aosm(words, case.pooled, matrices.word, 0.1, torch.ones(2, 5))
    with pytest.raises(ConfigError, match=r"sizes: \[\(5, 5\)\], got \[\(3, 3\)\]$"):
        blocked.vector_aosm(words, case.pooled, matrices.frame, 0.1)
    with pytest.raises(ConfigError, match=r"AOSM of words .* takes matrices and masks"):
        blocked.matrix_pool(words, frames[..., :2], "max-mean")


@pytest.mark.parametrize(("texts", "videos"), [(0, 4), (3, 0)])
def test_nothing_to_score(texts, videos):
    case = Case((3, 4, 5, 3, 8), 0.1)
    words, frames = (value.requires_grad_() for value in (case.words, case.frames))
    scores = blocked.matrix_aosm(words[:texts], frames[:videos], case.matrices, 0.1)
    assert scores.shape == (texts, videos)
    scores.sum().backward()
    assert not words.grad.any()
    assert not frames.grad.any()


@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_padding_alone_stay_in_their_row_and_column(masked):
    case = Case((5, 6, 5, 3, 8), 0.1, ("words", "frames") if masked else ())
    clean = blocked.matrix_aosm(case.words, case.frames, case.matrices, 0.01, case.word_mask, case.frame_mask)
    case.words[1, 0, 3] = case.frames[4, 0, 0] = torch.nan
    if masked:
        case.word_mask[2] = 0
        case.words[3, case.word_mask[3] == 0] = torch.nan  # padding is never looked at
    arguments = (case.words, case.frames, case.matrices, 0.01, case.word_mask, case.frame_mask)
    scores = blocked.matrix_aosm(*arguments)
    torch.testing.assert_close(scores, formula(*arguments), equal_nan=True)
    lost = torch.zeros_like(scores, dtype=torch.bool)
    lost[[1, 2] if masked else [1]] = lost[:, 4] = True
    assert torch.equal(scores.isnan(), lost)
    torch.testing.assert_close(scores[~lost], clean[~lost])


def test_padding_alone_leaves_the_other_gradients_finite():
    case = Case((5, 6, 5, 3, 8), 0.1, ("words", "frames"))
    case.word_mask[2] = case.frame_mask[4] = 0
    case.weight[2] = case.weight[:, 4] = 0
    right = case.matrix(formula, 0.05)
    case.words[3, case.word_mask[3] == 0] = torch.nan  # padding is never looked at
    ours = case.matrix(blocked.matrix_aosm, 0.05)
    assert right[1].isfinite().all()
    assert_same(ours[1:3], right[1:3], 1e-12)


def test_features_with_a_common_direction(monkeypatch):
    """As CLIP's have: all scores lie near 1, and the exponential is shifted."""
    case = Case((3, 70, 5, 3, 8), 0.05)
    base = torch.randn(8, dtype=torch.float64)
    case.words, case.frames = (normalize(0.1 * of + base, dim=-1) for of in (case.words, case.frames))
    shifts = []
    found_shift = tile._common_shift
    monkeypatch.setattr(
        tile, "_common_shift", lambda scores: shifts.append(found_shift(scores)) or shifts[-1]
    )
    assert_same(case.matrix(blocked.matrix_aosm, 0.01), case.matrix(formula, 0.01), 1e-12)
    assert all(shift is not None and shift > 50 for shift in shifts)


def test_only_the_gradients_that_are_wanted(monkeypatch):
    case = Case((5, 6, 5, 3, 8), 0.1)
    all_of_them = case.matrix(blocked.matrix_aosm, 0.05)
    frames = case.frames.clone().requires_grad_()
    learned = []
    monkeypatch.setattr(tile, "_of_mixing", lambda *given: learned.append(given))
    scores = blocked.matrix_aosm(case.words, frames, case.matrices, 0.05)
    (scores * case.weight).sum().backward()
    torch.testing.assert_close(frames.grad, all_of_them[2])
    assert not learned


def test_a_second_derivative_is_refused():
    case = Case((3, 4, 5, 3, 8), 0.1)
    words = case.words.requires_grad_()
    scores = blocked.matrix_aosm(words, case.frames, case.matrices, 0.05)
    (gradient,) = torch.autograd.grad(scores.square().sum(), words, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_it_runs_within_does_not_count(threads, around):
    case = Case((10, 20, 6, 4, 8), 0.1, dtype=torch.float32)
    frames = case.frames.transpose(0, 1).contiguous().transpose(0, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = blocked.matrix_aosm(case.words, case.frames, case.matrices, 0.01)
        with around():
            found = blocked.matrix_aosm(case.words, frames, case.matrices, 0.01)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)


def test_the_three_ways_of_the_exponential_are_taken():
    scores = torch.tensor([-60.0, 60.0])
    assert tile._common_shift(scores) == 0.0
    assert tile._common_shift(scores + 100) == 100.0
    assert tile._common_shift(scores * 2) is None
    assert tile._common_shift(scores * torch.nan) is None


def test_half_precision_features_are_computed_in_float32():
    case = Case((3, 4, 5, 3, 8), 0.05, dtype=torch.float32)
    words, frames = case.words.half(), case.frames.half()
    found = blocked.matrix_aosm(words, frames, case.matrices, 0.01)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, formula(words.float(), frames.float(), case.matrices, 0.01), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_count(threads):
    case = Case((10, 20, 6, 4, 8), 0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = case.matrix(blocked.matrix_aosm, 0.05)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_same(found, case.matrix(formula, 0.05), 1e-12)


@pytest.mark.parametrize("fusion", ["aosm", "mean-mean", "max-max", "max-mean", "mean-max"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_head_gives_the_same_by_either_backend(fusion, masked):
    settings = {"head.fusion": fusion, "head.mask_padding": masked, "temporal.agg_module": "meanP"}
    text, video = random_features(0, 5, 8), random_features(1, 5, 4)
    found = {}
    for backend in ("formula", "blocked"):
        model = tiny(**settings, **{"head.backend": backend}).double()
        loss = model.pair_loss(text, video)["loss"]
        loss.backward()
        found[backend] = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        assert model.head.backend_on(torch.device("cpu")) == backend
    assert_same(found["blocked"], found["formula"], 1e-8)


def test_pooling_in_tiles_sees_real_tokens_only():
    case = Case((4, 5, 6, 3, 8), 0, ("words", "frames"))
    scores = torch.einsum("twd,vfd->tvwf", case.words, case.frames)
    words, frames = case.word_mask[:, None], case.frame_mask[None]
    a, b = pool(scores.mT, "max", words[:, :, None]), pool(scores, "max", frames[:, :, None])
    expected = (pool(a, "mean", frames) + pool(b, "mean", words)) / 2
    found = blocked.matrix_pool(case.words, case.frames, "max-mean", case.word_mask, case.frame_mask)
    torch.testing.assert_close(found, expected)


def test_a_hooked_tap_brings_the_formula_back():
    model = tiny()
    device = torch.device("cpu")
    assert model.head.backend_on(device) == "blocked"
    with model.head.word_softmax.register_forward_hook(lambda *_: None):
        assert model.head.backend_on(device) == "formula"
    with model.head.scores["frame-word"].register_forward_hook(lambda *_: None):
        assert model.head.backend_on(device) == "blocked"


@pytest.fixture
def features():
    text, video = random_features(0, 5, 8), random_features(1, 5, 4)
    return text.to(torch.float32), video.to(torch.float32)


def with_kernels(backend="auto"):
    return tiny(**{"temporal.agg_module": "meanP", "head.backend": backend})


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_kernels_that_fail_give_way_to_tiles(monkeypatch, features):
    """Of `auto` only, with one word about it; the stamp then says what was used."""
    expected = with_kernels().similarity(*features)
    monkeypatch.setattr(xclip, "choose", lambda asked, *_: asked if asked == "blocked" else "triton")
    monkeypatch.setattr(kernels, "available", lambda *_: None)  # and then there is no GPU to launch on
    with pytest.raises(kernels.KernelError, match=r"the Triton kernels fail on cpu: .*; use another backend"):
        with_kernels("triton").similarity(*features)
    model = with_kernels()
    with pytest.warns(UserWarning, match="in tiles from here on: the Triton kernels fail on cpu") as said:
        torch.testing.assert_close(model.similarity(*features), expected)
    assert len(said) == 1
    assert model.head.backend_on(torch.device("cpu")) == "blocked"


def test_input_that_kernels_do_not_take_goes_by_tiles_that_once(monkeypatch, features):
    expected = with_kernels().similarity(*features)
    monkeypatch.setattr(xclip, "choose", lambda asked, *_: asked if asked == "blocked" else "triton")
    model = with_kernels()
    with pytest.warns(UserWarning, match="in tiles: the Triton kernels need an NVIDIA GPU"):
        torch.testing.assert_close(model.similarity(*features), expected)
    assert model.head.backend_on(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("backend", ["triton", "triton-fp16"])
def test_kernels_are_refused_where_there_is_no_gpu(backend):
    message = rf"backend: {backend} cannot be used: .*; take auto or blocked"
    with pytest.raises(ConfigError, match=message) as error:
        with_kernels(backend).head.backend_on(torch.device("cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("fusion", "backend"), [("mean-max", "triton"), ("transformer", "blocked")])
def test_a_backend_that_has_not_this_fusion_is_refused(fusion, backend):
    message = f"head.backend: {backend} does not go with head.fusion={fusion}"
    with pytest.raises(ConfigError, match=message):
        xclip.XClipConfig(fusion=fusion, backend=backend)
    model = tiny(**{"head.fusion": fusion})
    with pytest.raises(ConfigError, match=message), computed_by(model, backend):
        pass
