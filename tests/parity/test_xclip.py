"""X-CLIP equals the official code: logits, every intermediate value, loss and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.parity import families
from tests.parity.families import assert_near, check_intermediates, logits_tolerance
from tests.parity.golden import model_cases
from xclip_lab.attention import run_with_cache
from xclip_lab.model import evaluating

CASES = model_cases("xclip")
each_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)

TAPS = {  # official intermediate value -> tap, and the axes of the tap in the official order
    "video_word_softmax": ("video_word_softmax", "tvw->twv"),
    "sentence_frame_softmax": ("sentence_frame_softmax", "tvf->vtf"),
    "fw_word_softmax": ("word_softmax", "tvfw->twvf"),
    "fw_frame_softmax": ("frame_softmax", "tvwf->twvf"),
    "fw_sent2frame_softmax": ("sentence_to_frame_softmax", "tvf->tvf"),
    "fw_video2word_softmax": ("video_to_word_softmax", "tvw->twv"),
    "fine_grained_sim_scores": ("word_frame_similarity", "tvwf->twvf"),
    "word_level_logit": ("word_level", "tvf->tvf"),
    "frame_level_logit": ("frame_level", "tvw->twv"),
    "sent2frame_logits": ("sentence_to_frame", "tv->tv"),
    "video2word_logits": ("video_to_word", "tv->tv"),
}


@each_case
def test_logits_and_intermediates(golden, model):
    families.check_logits(golden, model)
    for name in golden.sets():
        batch = golden.batch(name)
        _, cache = run_with_cache(model, batch)
        with evaluating(model):
            text = model.encode_text(batch.token_ids, batch.text_mask)
            video = model.encode_video(batch.video, batch.video_mask)
            temporal = model.temporal(video.tokens, batch.video_mask)
        found = {
            "sequence_output": text.pooled,
            "seq_features": text.tokens,
            "visual_output": video.tokens,
            "temporal_visual_output": temporal,
            "video_feature": video.pooled,
            "frame_features": normalize(video.tokens, dim=-1),
            "sentence_feature": normalize(text.pooled, dim=-1),
            "word_features": normalize(text.tokens, dim=-1),
        }
        found |= {
            official: torch.einsum(axes, cache[f"head.{tap}"]) for official, (tap, axes) in TAPS.items()
        }
        check_intermediates(golden, name, found)
        for contrast in ("video-sentence", "video-word", "sentence-frame", "frame-word"):
            expected = golden[f"out/{name}/{contrast.replace('-', '_')}_logits"]
            logits = cache[f"head.scores.{contrast}"] * model.logit_scale.exp()
            assert_near(logits, expected, f"{name}: {contrast}", **logits_tolerance(golden))


@each_case
def test_loss_and_gradients(golden, model):
    parts = families.check_loss(golden, model)
    families.check_gradients(golden, model, parts["loss"])
