"""MaxSim and the token-wise interactions against loops over words and frames; padding is never looked at."""

from __future__ import annotations

import pytest
import torch

from tests.unit.naive_recipe import unit
from xclip_lab.config import TemporalConfig
from xclip_lab.heads import HEADS
from xclip_lab.temporal import MeanP
from xclip_lab.tokens import TokenSet

T, V, W, F, D = 5, 4, 6, 3, 16


def head_of(name):
    torch.manual_seed(0)
    return HEADS[name](HEADS[name].config_class(), D, W, F).eval()


def scored(head, text, video):
    temporal = MeanP(TemporalConfig(), D, F)
    return head(head.encode_text(text), head.encode_video(video.tokens, video.mask, temporal)).logits


@pytest.fixture
def sets():
    torch.manual_seed(1)
    text_mask = (torch.arange(W) < torch.tensor([2, 6, 3, 4, 5])[:, None]).long()
    video_mask = (torch.arange(F) < torch.tensor([1, 3, 2, 3])[:, None]).long()
    text = TokenSet(torch.randn(T, D), torch.randn(T, W, D), text_mask)
    return text, TokenSet(torch.randn(V, D), torch.randn(V, F, D), video_mask)


def pairs(text, video):
    """Of each pair the cosines of real words with real frames, with the real tokens themselves."""
    for row in range(T):
        words = text.tokens[row, : text.mask[row].sum()]
        for column in range(V):
            frames = video.tokens[column, : video.mask[column].sum()]
            yield row, column, unit(words) @ unit(frames).T, words, frames


@torch.no_grad()
def test_maxsim_is_each_words_best_frame(sets):
    found = scored(head_of("maxsim"), *sets)
    for row, column, cosines, _, _ in pairs(*sets):
        expected = sum(max(of_word) for of_word in cosines) / len(cosines)
        torch.testing.assert_close(found[row, column], expected)


@torch.no_grad()
def test_ti_looks_both_ways(sets):
    found = scored(head_of("ti"), *sets)
    for row, column, cosines, _, _ in pairs(*sets):
        from_words = sum(max(of_word) for of_word in cosines) / len(cosines)
        from_frames = sum(max(of_frame) for of_frame in cosines.T) / cosines.shape[1]
        torch.testing.assert_close(found[row, column], (from_words + from_frames) / 2)


@torch.no_grad()
def test_wti_weighs_words_and_frames(sets):
    head = head_of("wti")
    found = scored(head, *sets)
    for row, column, cosines, words, frames in pairs(*sets):
        of_words = torch.cat([head.text_weight_fc(word) for word in words]).softmax(0)
        of_frames = torch.cat([head.video_weight_fc(frame) for frame in frames]).softmax(0)
        from_words = sum(w * max(of_word) for w, of_word in zip(of_words, cosines, strict=True))
        from_frames = sum(w * max(of_frame) for w, of_frame in zip(of_frames, cosines.T, strict=True))
        torch.testing.assert_close(found[row, column], (from_words + from_frames) / 2)


@pytest.mark.parametrize("name", ["maxsim", "ti", "wti"])
def test_gradients_stay_finite_beside_padding(name, sets):
    """The infinities that hide padding must not come back as NaN."""
    text, video = sets
    words, frames = text.tokens.requires_grad_(), video.tokens.requires_grad_()
    scored(head_of(name), text, video).sum().backward()
    assert words.grad.isfinite().all()
    assert frames.grad.isfinite().all()
    assert not words.grad[text.mask == 0].any()
    assert not frames.grad[video.mask == 0].any()
