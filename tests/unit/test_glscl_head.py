"""GLSCL's head against its formulas written out in loops; `weight_fc` is never computed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.unit import naive_glscl as naive
from tests.unit.combinations import batch_of, settings_of
from tests.unit.tiny import tiny
from xclip_lab.checkpoint import official_state_dict
from xclip_lab.evaluation import score
from xclip_lab.heads.glscl import QUERIES, GlsclConfig, GlsclHead
from xclip_lab.losses import symmetric_cross_entropy
from xclip_lab.temporal import MeanP
from xclip_lab.tokens import TokenSet

WIDTH, CLOSE = 16, {"atol": 1e-5, "rtol": 1e-5}
FLAGS = [
    GlsclConfig(),
    GlsclConfig(query_share=False, queries=4, layers=2),
    GlsclConfig(cross_att_share=False, queries=3, layers=1, temp=0.7),
    GlsclConfig(query_share=False, cross_att_share=False, queries=5, loss2_weight=2.0, alpha=0.3, beta=0.2),
]


@pytest.fixture(params=FLAGS, ids=lambda c: f"q{int(c.query_share)}-a{int(c.cross_att_share)}")
def head(request):
    torch.manual_seed(0)
    head = GlsclHead(dataclasses.replace(request.param, feed_forward=24), WIDTH, 6, 4).eval()
    with torch.no_grad():
        for parameter in head.parameters():  # away from copies, zeros and ones
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


def encoded(head, texts=4, videos=4):
    """Token sets as the model makes them, and what they were made of."""
    torch.manual_seed(1)
    sentences, words, frames = (torch.randn(n, WIDTH) for n in (texts, texts * 6, videos * 4))
    words, frames = words.view(texts, 6, WIDTH), frames.view(videos, 4, WIDTH)
    mask = (torch.arange(4) < torch.randint(1, 5, (videos, 1))).long()
    text = head.encode_text(TokenSet(sentences, words, torch.ones(texts, 6)))
    return text, head.encode_video(frames, mask, MeanP(None, WIDTH, 4))


def queries_of(head, text, video):
    config = head.config
    flags = (config.layers, config.query_share, config.cross_att_share)
    return naive.queries_of(text.tokens, video.tokens, dict(head.named_parameters()), *flags)


@torch.no_grad()
def test_scores(head):
    text, video = encoded(head, 5, 3)
    texts, videos = queries_of(head, text, video)
    torch.testing.assert_close(text.extra[QUERIES], texts, **CLOSE)
    torch.testing.assert_close(video.extra[QUERIES], videos, **CLOSE)
    expected = naive.global_scores(text.pooled, video.tokens, video.mask, head.config.temp)
    expected = expected + head.config.loss2_weight * naive.local_scores(texts, videos)
    output = head(text, video)
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    assert not output.aux  # texts and videos are no pairs here


@torch.no_grad()
def test_auxiliary_losses(head):
    text, video = encoded(head)
    texts, videos = queries_of(head, text, video)
    found, config = head(text, video).aux, head.config
    inter = naive.inter_consistency(texts, videos, config.beta)
    torch.testing.assert_close(found["inter_consistency_loss"], inter, **CLOSE)
    intra = config.alpha * naive.intra_diversity(videos)
    torch.testing.assert_close(found["intra_diversity_loss"], intra, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("per_pair", [False, True])
def test_inter_consistency_grows_with_the_batch(head, per_pair):
    """Officially the sum over the batch is divided by the number of queries: the same pairs twice are another
    loss (ledger 18). Repaired they are the same."""
    head.config = dataclasses.replace(head.config, overlap_per_pair=per_pair)
    text, video = encoded(head)
    twice = torch.arange(4).repeat(2)
    once = head(text, video).aux["inter_consistency_loss"]
    doubled = head(text[twice], video[twice]).aux["inter_consistency_loss"]
    assert torch.isclose(once, doubled, rtol=1e-5) == per_pair


@torch.no_grad()
def test_the_cross_entropy_carries_the_scale_and_the_similarity_does_not():
    model, batch = tiny(**settings_of("glscl", "meanP")), batch_of()
    text = model.encode_text(batch.token_ids, batch.text_mask)
    video = model.encode_video(batch.video, batch.video_mask)
    similarity = model.similarity(text, video)
    torch.testing.assert_close(similarity, model.head(text, video).logits)
    expected = symmetric_cross_entropy(model.logit_scale.exp() * similarity)
    torch.testing.assert_close(model.loss(batch)["contrastive_loss"], expected)


def test_weight_fc_is_never_computed():
    """Officially a result of it for every pair is computed and thrown away."""
    model = tiny(**settings_of("glscl", "seqTransf"))
    for module in model.head.weight_fc.modules():
        module.register_forward_hook(lambda *_: pytest.fail("weight_fc was computed"))
    batch = batch_of(64, 64)
    with torch.no_grad():
        text = model.encode_text(batch.token_ids, batch.text_mask)
        video = model.encode_video(batch.video, batch.video_mask)
    before = score(model, text, video)
    assert before.shape == (64, 64)
    model.train().loss(batch)["loss"].backward()
    with torch.no_grad():
        for parameter in model.head.weight_fc.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(score(model, text, video), before)
    assert any(name.startswith("weight_fc.") for name in official_state_dict(model))
