"""CLIP4Clip's heads against its formulas written out, pair by pair."""

from __future__ import annotations

import pytest
import torch

from tests.unit.combinations import batch_of, settings_of
from tests.unit.naive_clip4clip import tight_scores
from tests.unit.naive_recipe import pooled, unit
from tests.unit.tiny import tiny
from xclip_lab.checkpoint import official_state_dict


@pytest.fixture(scope="module")
def tight():
    """Two attention heads, two blocks, positions that differ."""
    changes = {"towers.architecture.embed_dim": 128, "head.layers": 2}
    model = tiny(**settings_of("tightTransf", "meanP") | changes)
    with torch.no_grad():
        model.head.cross.embeddings.position_embeddings.weight.normal_()
        model.head.similarity_dense.weight.normal_()
        model.head.similarity_dense.bias.fill_(0.3)
    return model


def encoded(model, batch):
    text = model.encode_text(batch.token_ids, batch.text_mask)
    return text, model.encode_video(batch.video, batch.video_mask)


@torch.no_grad()
def test_loose_is_the_scaled_cosine_with_the_mean_frame():
    model, batch = tiny(**settings_of("clip4clip", "meanP")), batch_of(5, 3)
    text, video = encoded(model, batch)
    frames = model.clip.frames(batch.video)
    expected = model.logit_scale.exp() * unit(text.pooled) @ pooled(frames, batch.video_mask).T
    torch.testing.assert_close(model.similarity(text, video), expected)


@torch.no_grad()
def test_tight_is_a_transformer_over_each_pair(tight):
    batch, p = batch_of(5, 3), official_state_dict(tight)
    text, video = encoded(tight, batch)
    frames = tight.clip.frames(batch.video)
    expected = tight_scores(text.pooled, frames, batch.video_mask, p, layers=2)
    torch.testing.assert_close(tight.similarity(text, video), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_no_scale_reaches_the_tight_logit(tight):
    batch = batch_of()
    before = tight.loss(batch)["loss"], tight.similarity(*encoded(tight, batch))
    tight.logit_scale.add_(1)
    assert torch.equal(tight.loss(batch)["loss"], before[0])
    assert torch.equal(tight.similarity(*encoded(tight, batch)), before[1])
