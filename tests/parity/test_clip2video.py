"""CLIP2Video equals the official code: logits, every intermediate value, loss and gradients."""

from __future__ import annotations

import pytest
from torch.nn.functional import normalize

from tests.parity import families
from tests.parity.families import LOSS, assert_near, check_intermediates, logits_tolerance
from tests.parity.golden import Golden, model_cases
from xclip_lab.attention import run_with_cache
from xclip_lab.heads.clip2video import TAB
from xclip_lab.model import evaluating

CASES = model_cases("clip2video")
each_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


@each_case
def test_logits_and_intermediates(golden, model):
    """Also the logits of either score alone: the sentence with the pooled video, and TAB's."""
    families.check_logits(golden, model)
    for name in golden.sets():
        batch = golden.batch(name)
        _, cache = run_with_cache(model, batch)
        for official, tap in (("main", "sentence_score"), ("tab", "tab_score")):
            key = f"out/{name}/{official}_logits"
            assert (key in golden) == (f"head.{tap}" in cache)
            if key in golden:
                logits = cache[f"head.{tap}"] * model.logit_scale.exp()
                assert_near(logits, golden[key], key, **logits_tolerance(golden))
        check_intermediates(with_joined_tokens(golden, name), name, intermediates(model, batch, cache))


def with_joined_tokens(golden: Golden, name: str) -> Golden:
    """What the official code keeps apart of a TDB token (itself, its position, its type) added up."""
    arrays = dict(golden.arrays)
    for kind in ("tdb", "tab_tdb"):
        of_kind = [
            f"mid/{name}/{kind}_{part}" for part in ("tokens", "position_embeddings", "type_embeddings")
        ]
        if of_kind[0] in arrays:
            arrays[of_kind[0]] = sum(arrays.pop(key) for key in of_kind)
    return Golden(arrays)


def intermediates(model, batch, cache):
    with evaluating(model):
        text = model.encode_text(batch.token_ids, batch.text_mask)
        video = model.encode_video(batch.video, batch.video_mask)
        found = {
            "sequence_output": text.pooled,
            "sequence_hidden_output": text.tokens,
            "visual_output": video.tokens,
            "video_feature": video.pooled,
            "sentence_feature": normalize(text.pooled, dim=-1),
        }
        if model.config.temporal.agg_module == "tdb":
            for kind, step in (("tdb", 1), ("tab_tdb", 2)):
                seen = video.tokens[:, ::step], batch.video_mask[:, ::step]
                found[f"{kind}_tokens"], found[f"{kind}_mask"] = model.temporal.interleave(*seen)
        if model.config.head.center_proj:
            added = model.head.with_added_tokens(video.tokens, batch.video_mask, model.temporal)
            found |= {
                "tab_video_tokens": added[0],
                "tab_video_mask": added[1],
                "tab_video_feature": video.extra[TAB],
                "tab_text_feature": text.extra[TAB],
                "tab_video_soft_weight": cache["head.frame_assignment_softmax"],
                "tab_text_soft_weight": cache["head.word_assignment_softmax"],
            }
    return found


@each_case
def test_loss_and_gradients(golden, model):
    parts = families.check_loss(golden, model)
    weight = model.config.head.center_weight
    expected = {"contrastive_loss": golden["out/train/main_loss"]}
    if model.config.head.center_proj:
        tab_loss = (1 - weight) * golden["out/train/TAB_loss"]
        expected = {"sentence_video_loss": weight * golden["out/train/main_loss"], "tab_loss": tab_loss}
    assert parts.keys() - {"loss"} == expected.keys()
    for name, value in expected.items():
        assert_near(parts[name], value.reshape(()), name, **LOSS)
    families.check_gradients(golden, model, parts["loss"])
