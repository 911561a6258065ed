"""CLIP2Video's two blocks, TDB and TAB, against their formulas written out."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.unit import naive_clip2video as naive
from tests.unit.combinations import batch_of, settings_of
from tests.unit.naive_recipe import pooled, seq_transf, unit
from tests.unit.tiny import tiny
from xclip_lab.checkpoint import official_state_dict
from xclip_lab.heads.clip2video import TAB
from xclip_lab.losses import symmetric_cross_entropy

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROJECTIONS = ("default", "sigmoid_mlp", "sigmoid_selfA")


def model_of(agg_module="tdb", **changes):
    """Two attention heads; every parameter away from its start."""
    model = tiny(
        **settings_of("clip2video", agg_module)
        | {"towers.architecture.embed_dim": 128, "max_frames": 5}
        | changes
    )
    with torch.no_grad():
        for parameter in [*model.head.parameters(), *model.temporal.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def encoded(model, batch):
    text = model.encode_text(batch.token_ids, batch.text_mask)
    return text, model.encode_video(batch.video, batch.video_mask)


COUNTS = (1, 2, 4, 5)


@torch.no_grad()
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("repaired", [False, True])
def test_tdb_interleaves_frames_and_differences(projection, repaired):
    changes = {"temporal.temporal_proj": projection, "temporal.mask_differences": repaired}
    model, how = model_of(**changes), {"projection": projection, "repaired": repaired}
    p = official_state_dict(model)
    for frames in COUNTS:
        batch = batch_of(frames=frames)
        video = model.encode_video(batch.video, batch.video_mask)
        tokens, mask = model.temporal.interleave(video.tokens, batch.video_mask)
        expected, expected_mask = naive.interleaved(video.tokens, batch.video_mask, p, **how)
        assert tokens.shape[1] == 2 * frames - 1
        assert torch.equal(mask, expected_mask)
        real = mask.bool()
        torch.testing.assert_close(tokens[real], expected[real], **CLOSE)
        output = naive.with_differences(video.tokens, batch.video_mask, p, ("transformerClip", 1), **how)
        torch.testing.assert_close(video.pooled, pooled(output, batch.video_mask), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "TAB", "TAB_TDB"])
@pytest.mark.parametrize("mixed", [False, True])
def test_tab_and_the_sentence_score(kind, mixed):
    changes = {"head.center_proj": kind, "temporal.mixed_head_masks": mixed, "head.center_weight": 0.3}
    model = model_of(**changes)
    p, how = official_state_dict(model), {"projection": "sigmoid_selfA", "mixed": mixed}
    for frames in COUNTS:
        batch = batch_of(5, 3, frames=frames)
        text, video = encoded(model, batch)
        words, of_video = (text.pooled, text.tokens, batch.text_mask), (video.tokens, batch.video_mask)
        main, tab = naive.clip2video_scores(*words, *of_video, p, kind=kind, layers=1, **how)
        expected = model.logit_scale.exp() * (0.3 * main + 0.7 * tab)
        torch.testing.assert_close(model.similarity(text, video), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tab_on_seq_transf():
    model, batch = model_of("seqTransf"), batch_of(frames=5)
    text, video = encoded(model, batch)
    p, mask = official_state_dict(model), batch.video_mask
    main = unit(text.pooled) @ pooled(seq_transf(video.tokens, mask, p, 1), mask).T
    of_video = naive.aligned(*naive.tab_tokens(video.tokens, mask, p, "TAB"), p)
    words = torch.cat([torch.zeros(4, 1), batch.text_mask[:, 1:]], 1)
    expected = (main + naive.aligned(text.tokens, words, p) @ of_video.T) / 2
    torch.testing.assert_close(model.head(text, video).logits, expected, **CLOSE)


@torch.no_grad()
def test_the_loss_contrasts_both_scores():
    model, batch = model_of(**{"head.center_weight": 0.3}), batch_of()
    text, video = encoded(model, batch)
    scale, parts = model.logit_scale.exp(), model.loss(batch)
    main, tab = unit(text.pooled) @ video.pooled.T, text.extra[TAB] @ video.extra[TAB].T
    losses = [symmetric_cross_entropy(scale * scores) for scores in (main, tab)]
    torch.testing.assert_close(parts["sentence_video_loss"], 0.3 * losses[0])
    torch.testing.assert_close(parts["tab_loss"], 0.7 * losses[1])


@torch.no_grad()
def test_the_start_mark_is_no_word_to_tab_and_the_end_mark_is():
    model, batch = model_of(), batch_of()
    text = model.encode_text(batch.token_ids, batch.text_mask)
    of = partial(model.head._align, softmax=model.head.word_assignment_softmax)
    for dropped, same in ((0, True), (int(batch.text_mask[0].sum()) - 1, False)):
        mask = batch.text_mask[:1].clone()
        mask[0, [0, dropped]] = 0
        assert torch.allclose(of(text.tokens[:1], mask)[0], text.extra[TAB][0], atol=1e-6) == same


@torch.no_grad()
def test_without_tab_it_is_the_sentence_score():
    model, batch = model_of(**{"head.center_proj": None}), batch_of()
    text, video = encoded(model, batch)
    assert not text.extra
    assert not video.extra
    torch.testing.assert_close(model.head(text, video).logits, unit(text.pooled) @ video.pooled.T)
    assert list(model.loss(batch)) == ["loss", "contrastive_loss"]
