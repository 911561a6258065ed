"""X-CLIP equals the official code: logits, every intermediate value, loss and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.parity.golden import Golden
from tests.shared import golden_paths
from xclip_lab import Batch, load_official, save_official
from xclip_lab.attention import run_with_cache
from xclip_lab.checkpoint import official_state_dict
from xclip_lab.model import official_name

CASES = golden_paths("xclip_*.npz")
EPSILON_CASES = [path for path in CASES if "out/lneps/logits" in Golden(path)]
each_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)

LOGITS = {"atol": 1e-4, "rtol": 1e-4}
GRADIENTS = {"atol": 2e-5, "rtol": 1e-3}
FEATURES = {"atol": 2e-5, "rtol": 1e-4}

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


@pytest.fixture
def golden(path):
    return Golden(path)


@pytest.fixture
def model(golden):
    return load_official(golden.below("sd/"), "xclip", agg_module=golden.meta["sim_header"])


def batch_of(golden: Golden, name: str) -> Batch:
    inputs = golden.below(f"in/{name}/")
    return Batch(inputs["input_ids"], inputs["attention_mask"], inputs["video"], inputs["video_mask"])


@each_case
def test_logits_and_intermediates(golden, model):
    for name in golden.sets():
        batch = batch_of(golden, name)
        logits, cache = run_with_cache(model, batch)
        torch.testing.assert_close(logits, golden[f"out/{name}/logits"], **LOGITS)
        scale = model.logit_scale.exp()
        for contrast in ("video-sentence", "video-word", "sentence-frame", "frame-word"):
            expected = golden[f"out/{name}/{contrast.replace('-', '_')}_logits"]
            torch.testing.assert_close(cache[f"head.scores.{contrast}"] * scale, expected, **LOGITS)
        for official, (tap, axes) in TAPS.items():
            value = torch.einsum(axes, cache[f"head.{tap}"])
            torch.testing.assert_close(value, golden[f"mid/{name}/{official}"], **FEATURES)


@each_case
def test_features(golden, model):
    for name in golden.sets():
        batch = batch_of(golden, name)
        expected = golden.below(f"mid/{name}/")
        with torch.no_grad():
            text = model.encode_text(batch.token_ids, batch.text_mask)
            video = model.encode_video(batch.video, batch.video_mask)
            temporal = model.temporal(video.tokens, batch.video_mask)
        torch.testing.assert_close(text.pooled, expected["sequence_output"].squeeze(1), **FEATURES)
        torch.testing.assert_close(text.tokens, expected["seq_features"], **FEATURES)
        torch.testing.assert_close(video.tokens, expected["visual_output"], **FEATURES)
        torch.testing.assert_close(temporal, expected["temporal_visual_output"], **FEATURES)
        torch.testing.assert_close(video.pooled, expected["video_feature"], **FEATURES)
        torch.testing.assert_close(normalize(video.tokens, dim=-1), expected["frame_features"], **FEATURES)


@each_case
def test_loss_and_gradients(golden, model):
    parts = model.train().loss(batch_of(golden, "square"))
    torch.testing.assert_close(parts["loss"], golden["out/train/loss"].reshape(()), atol=1e-5, rtol=0)
    parts["loss"].backward()
    gradients = {official_name(name): value.grad for name, value in model.named_parameters()}
    for name, expected in golden.below("grad/").items():
        torch.testing.assert_close(
            gradients[name], expected, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, expected in golden.below("grad16/").items():
        torch.testing.assert_close(gradients[name][:16], expected, **GRADIENTS)
    norms = dict(zip(golden.arrays["gradnorm/names"], golden["gradnorm/values"], strict=True))
    for name, expected in norms.items():
        assert gradients[str(name)].norm().item() == pytest.approx(expected.item(), rel=1e-3, abs=2e-5), name
    for name in filter(None, golden.arrays["gradnorm/no_grad_names"]):
        assert gradients[str(name)] is None, name


@pytest.mark.parametrize("path", EPSILON_CASES, ids=lambda path: path.stem)
def test_layer_norm_epsilon(golden):
    """Weights scaled down until the epsilon of each LayerNorm shows."""
    state = golden.below("sd/")
    for name in golden.arrays["out/lneps/scaled_params"]:
        state[str(name)] = state[str(name)] * 2**-8
    model = load_official(state, "xclip", agg_module=golden.meta["sim_header"])
    with torch.no_grad():
        logits, _ = run_with_cache(model, batch_of(golden, "infer"))
    torch.testing.assert_close(logits, golden["out/lneps/logits"], **LOGITS)


@each_case
def test_round_trip(golden, model, tmp_path):
    save_official(model, tmp_path / "pytorch_model.bin.0")
    state, again = golden.below("sd/"), torch.load(tmp_path / "pytorch_model.bin.0", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    reloaded = load_official(tmp_path / "pytorch_model.bin.0", "xclip")
    assert all(torch.equal(value, state[key]) for key, value in official_state_dict(reloaded).items())
