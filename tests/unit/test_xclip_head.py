"""X-CLIP's head: switches, fusions, masks, taps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xclip_lab.aosm.formula import attend, pool
from xclip_lab.attention import replaced
from xclip_lab.errors import ConfigError
from xclip_lab.heads.xclip import CONTRASTS, XClipConfig, XClipHead
from xclip_lab.tokens import TokenSet

T, V, W, F, D = 5, 4, 7, 6, 16
FUSIONS = ("aosm", "mean-mean", "max-max", "max-mean", "mean-max", "transformer")


def head_of(**settings) -> XClipHead:
    torch.manual_seed(0)
    head = XClipHead(XClipConfig(**settings), D, W, F).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return head


def token_sets(seed: int = 1) -> tuple[TokenSet, TokenSet]:
    torch.manual_seed(seed)
    text_mask = (torch.arange(W) < torch.randint(2, W + 1, (T, 1))).long()
    video_mask = (torch.arange(F) < torch.randint(1, F + 1, (V, 1))).long()
    text = TokenSet(torch.randn(T, D), torch.randn(T, W, D), text_mask)
    return text, TokenSet(torch.randn(V, D), torch.randn(V, F, D), video_mask)


def test_attend_is_the_papers_sum():
    torch.manual_seed(0)
    x, mixing, tau = torch.randn(3, W), torch.randn(W, W), 0.3
    p = (x / tau).softmax(-1)
    expected = [sum(p[b, i] * mixing[i, k] * x[b, k] for i in range(W) for k in range(W)) for b in range(3)]
    torch.testing.assert_close(attend(x, mixing, tau), torch.stack(expected))


@pytest.mark.parametrize("tau", [1e-4, 1e4])
def test_temperature_runs_from_maximum_to_mean(tau):
    x = torch.randn(20, W, generator=torch.Generator().manual_seed(0))
    expected = pool(x, "max" if tau < 1 else "mean")
    torch.testing.assert_close(attend(x, torch.eye(W), tau), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_contrasts_average(fusion):
    """Each of the 15 combinations is the mean of its contrasts taken alone."""
    text, video = token_sets()
    alone = {}
    for name in CONTRASTS:
        alone[name] = head_of(fusion=fusion, contrasts=(name,))(text, video).logits
    for count in range(1, 5):
        for chosen in itertools.combinations(CONTRASTS, count):
            logits = head_of(fusion=fusion, contrasts=chosen)(text, video).logits
            torch.testing.assert_close(logits, torch.stack([alone[name] for name in chosen]).mean(0))


@pytest.mark.parametrize("fusion", FUSIONS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_masked_padding_has_no_effect(fusion, seed):
    """With `mask_padding` neither the content of padding nor the rest of the batch moves a score."""
    head = head_of(fusion=fusion, mask_padding=True)
    text, video = token_sets(seed)
    logits = head(text, video).logits
    noisy_text = TokenSet(text.pooled, text.tokens + 9 * (1 - text.mask)[..., None], text.mask)
    noisy_video = TokenSet(video.pooled, video.tokens - 9 * (1 - video.mask)[..., None], video.mask)
    torch.testing.assert_close(head(noisy_text, noisy_video).logits, logits)
    torch.testing.assert_close(head(text[1:3], video[2:]).logits, logits[1:3, 2:])
    assert logits.isfinite().all()


def test_official_padding_takes_part():
    head = head_of()
    text, video = token_sets()
    noisy = TokenSet(video.pooled, video.tokens - 9 * (1 - video.mask)[..., None], video.mask)
    assert (head(text, noisy).logits - head(text, video).logits).abs().max() > 0.01


@pytest.mark.parametrize("mask_padding", [False, True])
def test_gradients_are_finite(mask_padding):
    text, video = token_sets()
    head = head_of(mask_padding=mask_padding)
    words = text.tokens.requires_grad_()
    head(TokenSet(text.pooled, words, text.mask), video).logits.sum().backward()
    assert words.grad.isfinite().all()
    assert all(value.grad.isfinite().all() for value in head.parameters())


def test_a_tap_can_be_replaced():
    """Uniform weights in place of the softmax: the contrast becomes a mean of the mixed scores."""
    text, video = token_sets()
    head = head_of(contrasts=("sentence-frame",))
    seen = {}
    with replaced(head, {"sentence_frame_softmax": lambda p: torch.full_like(p, 1 / F)}):
        uniform = head(text, video).logits
    with replaced(head, {"frame_similarity": lambda x: seen.setdefault("x", x)}):
        normal = head(text, video).logits
    expected = (seen["x"] @ head.frame_logit_weight.T).mean(-1)
    torch.testing.assert_close(uniform, expected)
    assert not torch.allclose(normal, uniform)


def test_unknown_tap():
    with (
        pytest.raises(ConfigError, match="did you mean 'word_softmax'"),
        replaced(head_of(), {"word_sofmax": None}),
    ):
        pass


def test_other_lengths_are_refused():
    text, video = token_sets()
    longer = TokenSet(video.pooled, torch.randn(V, F + 1, D), torch.ones(V, F + 1))
    with pytest.raises(ValueError, match="max_frames=6, got 7 words and 7 frames"):
        head_of()(text, longer)


@pytest.mark.parametrize("contrasts", [(), ("frame-word", "frame-word")])
def test_impossible_contrasts(contrasts):
    with pytest.raises(ConfigError, match=r"head\.contrasts"):
        XClipConfig(contrasts=contrasts)
