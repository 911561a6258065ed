"""The model's contract, `agg_module`s against a slow restatement, and the quirks that live there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from tests.unit.tiny import tiny
from xclip_lab import Batch, TokenSet
from xclip_lab.attention import replaced, run_with_cache, tap_names
from xclip_lab.config import TemporalConfig
from xclip_lab.errors import ConfigError, InputError
from xclip_lab.heads.base import masked_frame_mean
from xclip_lab.model import evaluating
from xclip_lab.tap import Tap
from xclip_lab.temporal import SeqLSTM, SeqTransf


def batch_of(texts: int = 3, videos: int = 3) -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(1, 58, (texts, 8))
    lengths = torch.randint(2, 9, (texts,))
    for row, length in enumerate(lengths):
        ids[row, length - 1] = 59
        ids[row, length:] = 0
    frame_mask = (torch.arange(4) < torch.randint(1, 5, (videos, 1))).long()
    return Batch(ids, (ids > 0).long(), torch.randn(videos, 4, 3, 32, 32), frame_mask)


@pytest.mark.parametrize("agg_module", ["meanP", "seqLSTM", "seqTransf"])
def test_shapes_and_parts(agg_module):
    model, batch = tiny(**{"temporal.agg_module": agg_module}), batch_of(texts=5, videos=3)
    text = model.encode_text(batch.token_ids, batch.text_mask)
    video = model.encode_video(batch.video, batch.video_mask)
    assert (text.pooled.shape, text.tokens.shape, text.mask.shape) == ((5, 32), (5, 8, 32), (5, 8))
    assert (video.pooled.shape, video.tokens.shape, video.mask.shape) == ((3, 32), (3, 4, 32), (3, 4))
    assert model.similarity(text, video).shape == (5, 3)
    assert len(text) == 5
    assert torch.equal(TokenSet.cat([text[:2], text[2:]]).tokens, text.tokens)
    parts = model.loss(batch_of())
    assert parts["loss"] == parts["contrastive_loss"]


@pytest.mark.parametrize("agg_module", ["meanP", "seqLSTM", "seqTransf"])
def test_a_score_does_not_depend_on_the_rest_of_the_batch(agg_module):
    """seqLSTM's frames past the longest video depend on it (ledger 14); X-CLIP's scores do not see them."""
    model, batch = tiny(**{"temporal.agg_module": agg_module}), batch_of(4, 4)
    with torch.no_grad():
        text = model.encode_text(batch.token_ids, batch.text_mask)
        together = model.similarity(text, model.encode_video(batch.video, batch.video_mask))
        for row in range(4):
            alone = model.encode_video(batch.video[row : row + 1], batch.video_mask[row : row + 1])
            torch.testing.assert_close(model.similarity(text, alone)[:, 0], together[:, row])


def test_seq_lstm_is_an_lstm_over_the_real_frames():
    torch.manual_seed(0)
    module = SeqLSTM(TemporalConfig("seqLSTM"), 6, 10)
    frames, lengths = torch.randn(3, 5, 6), [2, 4, 1]
    mask = torch.tensor([[int(j < length) for j in range(5)] for length in lengths])
    output = module(frames, mask)
    for row, length in enumerate(lengths):
        alone = module.lstm_visual(frames[row : row + 1, :length])[0][0]
        torch.testing.assert_close(output[row, :length], alone + frames[row, :length])
        # Up to the longest video the LSTM gives zeros, beyond it the frames are doubled.
        torch.testing.assert_close(output[row, length:4], frames[row, length:4])
        torch.testing.assert_close(output[row, 4:], 2 * frames[row, 4:])


def test_seq_transf_does_not_look_at_padding():
    torch.manual_seed(0)
    module = SeqTransf(TemporalConfig(layers=2), 128, 10)
    frames, mask = torch.randn(2, 5, 128), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changed = frames + 5 * (1 - mask)[..., None]
    assert module.transformerClip.resblocks[0].attn.num_heads == 2
    torch.testing.assert_close(module(changed, mask)[0, :3], module(frames, mask)[0, :3])
    moved = module(frames.roll(1, dims=1), mask)[1].roll(-1, dims=0)
    assert not torch.allclose(moved, module(frames, mask)[1], atol=1e-3)  # positions count


def test_pooled_video_is_the_masked_mean():
    frames, mask = torch.randn(1, 3, 4), torch.tensor([[1, 1, 0]])
    mean = (normalize(frames[0, 0], dim=0) + normalize(frames[0, 1], dim=0)) / 2
    torch.testing.assert_close(masked_frame_mean(frames, mask)[0], normalize(mean, dim=0))


def test_pixels_are_normalised_and_padding_is_zero_after_it():
    """Zeros after normalisation, as in the official loaders; black pixels would be something else."""
    model = tiny()
    pixels = torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    mask = torch.tensor([[1, 1, 0, 0]])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    floats = (pixels / 255 - mean) / std
    floats[:, 2:] = 0
    with torch.no_grad():
        ours = model.encode_video(pixels, mask)
        expected = model.encode_video(floats, mask)
    torch.testing.assert_close(ours.tokens, expected.tokens)


def test_a_video_without_a_frame_is_an_error():
    """Officially a column of NaN (ledger 13)."""
    batch = batch_of()
    batch.video_mask[1] = 0
    with pytest.raises(ValueError, match=r"no valid frame in video\(s\) \[1\]"):
        tiny().encode_video(batch.video, batch.video_mask)


@pytest.mark.parametrize(
    ("agg_module", "head"),
    [("seqTransf", "xclip"), ("tdb", "xclip"), ("seqLSTM", "clip2video"), ("meanP", "tightTransf")],
)
def test_more_tokens_than_positions_are_an_error(agg_module, head):
    tab = {"head.center_proj": "TAB"} if head == "clip2video" else {}
    model = tiny(**{"temporal.agg_module": agg_module, "head.name": head, **tab})
    count = 77 if head == "tightTransf" else 156
    ids, frames, mask = (
        torch.ones(1, 78).long(),
        torch.randn(1, count, 3, 32, 32),
        torch.ones(1, count).long(),
    )
    with pytest.raises(InputError, match="78 words are too many: there are 77 learned positions"):
        model.encode_text(ids, ids)
    with torch.no_grad():
        text = model.encode_text(ids[:, :8], ids[:, :8])
        with pytest.raises(
            InputError, match=r"78 tokens of a pair are too many|(156|78) frames are too many"
        ):
            model.similarity(text, model.encode_video(frames, mask))


def test_ids_that_are_no_words_and_no_videos_are_errors():
    model, ids, mask = tiny(), torch.tensor([[58, 3, 59, 60]]), torch.ones(1, 4, dtype=torch.long)
    for wrong, match in (
        (ids, "token_ids hold 3 to 60: the vocabulary has 0 to 59"),
        (-ids, "hold -60 to -3"),
    ):
        with pytest.raises(InputError, match=match):
            model.encode_text(wrong, mask)
    with pytest.raises(InputError, match="their mask is"):
        model.encode_text(ids[0], mask[0])
    with pytest.raises(InputError, match="there is none; give one or more"):
        model.encode_video(torch.zeros(0, 4, 3, 32, 32), torch.zeros(0, 4))
    with pytest.raises(InputError, match=r"video must be \[B, F, 3, 32, 32\]"):
        model.encode_video(torch.zeros(1, 4, 1, 32, 32), mask)


def test_frames_of_another_size_are_an_error():
    batch = batch_of()
    with pytest.raises(ValueError, match=r"video must be \[B, F, 3, 32, 32\]"):
        tiny().encode_video(batch.video[..., :16], batch.video_mask)


def test_bf16_autocast_keeps_the_scores_in_float32():
    model, batch = tiny(), batch_of()
    exact = model.loss(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch)["loss"]
    assert loss.dtype == torch.float32
    assert not torch.equal(loss, exact)
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "temporal.transformerClip"),
        ({"head.name": "clip2video", "temporal.agg_module": "tdb"}, "temporal.frame2t_attention"),
        ({"head.name": "tightTransf", "temporal.agg_module": "meanP"}, "head.cross.transformer"),
    ],
)
def test_added_transformers_follow_autocast_and_nothing_else_does(settings, name):
    """What comes out of them is float32 again."""
    model, batch, seen = tiny(**settings), batch_of(), {}
    for place, module in model.named_modules():
        if isinstance(module, nn.Linear | Tap) and not place.startswith("clip."):
            module.register_forward_hook(lambda _, __, out, place=place: seen.__setitem__(place, out.dtype))
    whole = model.get_submodule(name)
    whole.register_forward_hook(lambda _, __, out: seen.__setitem__(name, out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(batch)
    inner = {place for place in seen if ".resblocks." in place and place.endswith("c_fc")}
    assert any(place.startswith(name) for place in inner)
    assert {seen[place] for place in inner} == {torch.bfloat16}
    assert {dtype for place, dtype in seen.items() if ".resblocks." not in place} == {torch.float32}
    seen.clear()
    model.loss(batch)
    assert set(seen.values()) == {torch.float32}


AS_IT_READS = {"head.backend": "formula"}  # what taps look into; tiles round elsewhere


def test_run_with_cache_leaves_no_trace():
    model, batch = tiny(**AS_IT_READS).train(), batch_of(2, 3)
    model.clip.eval()
    similarity, cache = run_with_cache(model, batch, ["head.word_softmax"])
    assert list(cache) == ["head.word_softmax"]
    assert cache["head.word_softmax"].shape == (2, 3, 4, 8)
    assert (model.training, model.clip.training) == (True, False)
    assert not any(module._forward_hooks for module in model.modules())
    with evaluating(model):
        text = model.encode_text(batch.token_ids, batch.text_mask)
        video = model.encode_video(batch.video, batch.video_mask)
        assert torch.equal(model.similarity(text, video), similarity)
    with pytest.raises(ConfigError, match=r"did you mean 'head.word_softmax'"):
        run_with_cache(model, batch, ["head.word_sofmax"])


def test_taps_say_their_axes():
    batch = batch_of(2, 3)
    _, cache = run_with_cache(tiny(), batch)
    sizes = {"T": 2, "V": 3, "W": 8, "F": 4}
    blocks = {
        "clip.transformer.resblocks.0.attn.weights_softmax": (2, 2, 8, 8),
        "clip.visual.transformer.resblocks.0.attn.weights_softmax": (12, 2, 5, 5),
        "temporal.transformerClip.resblocks.0.attn.weights_softmax": (3, 1, 4, 4),
    }
    for name, shape in tap_names(tiny()).items():
        axes = shape.split("]")[0].strip("[").split(", ")
        expected = blocks[name] if name in blocks else tuple(sizes[axis] for axis in axes)
        assert cache[name].shape == expected, name


def test_the_weights_of_a_block_are_those_that_it_uses():
    """Reading changes no number, not even the last bit; what replaces them takes effect."""
    model, batch = tiny(**AS_IT_READS), batch_of(2, 3)
    plain, _ = run_with_cache(model, batch, [])
    read, cache = run_with_cache(model, batch)
    assert torch.equal(plain, read)
    blocks = [name for name in cache if name.endswith("attn.weights_softmax")]
    assert len(blocks) == 3
    for name in blocks:
        torch.testing.assert_close(cache[name].sum(-1), torch.ones_like(cache[name][..., 0]))
        with replaced(model, {name: lambda weights: weights.clone()}):
            again, _ = run_with_cache(model, batch, [])
        torch.testing.assert_close(again, plain)
        with replaced(model, {name: lambda weights: weights.flip(-1)}):
            other, _ = run_with_cache(model, batch, [])
        assert not torch.allclose(other, plain)


def test_other_widths_start_at_the_official_scale():
    """Where CLIP's text width is not the joint width nothing can be copied."""
    model = tiny(**{"towers.architecture.text_width": 64})
    assert model.temporal.frame_position_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
