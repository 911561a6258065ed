"""GLSCL equals the official code: logits, every intermediate value, loss and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.parity import families
from tests.parity.families import LOSS, assert_near, check_intermediates, logits_tolerance, official_model
from tests.parity.golden import Golden, model_cases
from xclip_lab.attention import run_with_cache
from xclip_lab.heads.glscl import QUERIES, inter_consistency
from xclip_lab.model import evaluating

VARIANTS = {  # other settings with the weights of one case, as the official numbers name them
    "s10": {"query_share": True, "cross_att_share": False},
    "s01": {"query_share": False, "cross_att_share": True},
    "s00": {"query_share": False, "cross_att_share": False},
    "msrvtt_sh": {"beta": 0.02},
    "parser_default": {"temp": 5.0, "alpha": 0.01},
    "didemo_sh": {},
}
PARTS = {
    "contrastive_loss": "M_loss",
    "inter_consistency_loss": "Intra_Consistency",
    "intra_diversity_loss": "Inter_Diversity",
}
CASES = model_cases("glscl")
each_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
each_variant = pytest.mark.parametrize(
    ("path", "variant"),
    [
        pytest.param(path, variant, id=f"{path.stem}-{variant or 'main'}")
        for path in CASES
        for variant in (None, *Golden(path).variants())
    ],
)


@pytest.fixture
def golden(path, variant):
    return Golden(path).variant(variant)


@pytest.fixture
def variant():
    return None


@pytest.fixture
def model(golden, variant):
    return official_model(golden, **VARIANTS.get(variant, {}))


@each_variant
def test_logits_and_intermediates(golden, model, variant):
    """Of each set for which a variant has numbers: hyper-parameters of the loss alone have none."""
    for name in golden.sets():
        logits, cache = run_with_cache(model, golden.batch(name))
        scores = {"logits": logits, "global_logits": cache["head.global_score"]}
        scores["query_score"] = cache["head.query_score"]
        for official, expected in golden.below(f"out/{name}/").items():
            assert_near(scores[official], expected, f"{name}: {official}", **logits_tolerance(golden))
        check_intermediates(golden, name, intermediates(model, golden.batch(name), cache))


def intermediates(model, batch, cache):
    with evaluating(model):
        text = model.encode_text(batch.token_ids, batch.text_mask)
        video = model.encode_video(batch.video, batch.video_mask)
    weights = cache["head.frame_softmax"] * batch.video_mask
    return {
        "text_feat": text.tokens,
        "cls": text.pooled,
        "video_feat": video.tokens,
        "v_weight": weights,
        "video_feat_t_cond": torch.einsum("tvf,vfd->tvd", weights, video.tokens),
        "spatial_out": video.extra[QUERIES],
        "noun_out": text.extra[QUERIES],
    }


@each_variant
def test_loss_and_gradients(golden, model, variant):
    similarity, _ = run_with_cache(model, golden.batch("square"))
    assert_near(similarity, golden["out/train/sim_matrix"], "similarity", **logits_tolerance(golden))
    parts = families.check_loss(golden, model)
    assert parts.keys() - {"loss"} == PARTS.keys()
    for name, official in PARTS.items():
        assert_near(parts[name], golden[f"out/train/{official}"].reshape(()), name, **LOSS)
    families.check_gradients(golden, model, parts["loss"])


@each_variant
def test_matching_term_of_inter_consistency(golden, model, variant):
    """Alone, since beta makes it small: the loss with beta 1 less the loss with beta 0."""
    batch = golden.batch("square")
    with evaluating(model):
        of_texts = model.encode_text(batch.token_ids, batch.text_mask).extra[QUERIES]
        of_videos = model.encode_video(batch.video, batch.video_mask).extra[QUERIES]
    found = inter_consistency(of_texts, of_videos, 1.0) - inter_consistency(of_texts, of_videos, 0.0)
    assert_near(found, golden["out/train/intra_r"].reshape(()), "intra_r", **LOSS)
