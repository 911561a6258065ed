"""What a score may depend on: repaired, its text and its video; officially, what the ledger says."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.combinations import END, PAIRS, batch_of, settings_of
from tests.unit.naive_recipe import added
from tests.unit.tiny import tiny
from xclip_lab.config import TemporalConfig
from xclip_lab.evaluation import score
from xclip_lab.model import evaluating
from xclip_lab.temporal import SeqTransf, TemporalDifference

B = 5
REPAIRED = {"xclip": {"head.mask_padding": True}, "glscl": {"head.mask_padding": True}}
OFFICIAL_TEMPORAL = {"temporal.mask_differences": False, "temporal.mixed_head_masks": True}
REPAIRED_TEMPORAL = {"temporal.mask_differences": True, "temporal.mixed_head_masks": False}
NOISE = 1e-5
"""What rounding may move a score by (scores up to 4)."""
EFFECT = 1e-3
"""What an official dependence moves one by at the least."""


@cache
def model_of(head, agg_module, repaired=True, **changes):
    """Two attention heads in the added blocks; every parameter of head and `agg_module` off its start."""
    switches = REPAIRED_TEMPORAL | REPAIRED.get(head, {}) if repaired else OFFICIAL_TEMPORAL
    sizes = {"towers.architecture.embed_dim": 128, "max_frames": 5, "head.positions": 6}
    if head != "tightTransf":
        del sizes["head.positions"]
    model = tiny(**settings_of(head, agg_module) | switches | sizes | changes)
    with torch.no_grad():
        for parameter in [*model.head.parameters(), *model.temporal.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def encoded(model, batch):
    with evaluating(model):
        text = model.encode_text(batch.token_ids, batch.text_mask)
        return text, model.encode_video(batch.video, batch.video_mask)


def similarity(model, batch):
    with evaluating(model):
        return model.similarity(*encoded(model, batch))


def rows_of(batch, rows):
    fields = ("token_ids", "text_mask", "video", "video_mask")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[rows] for name in fields})


def with_other_padding(batch, words=True, frames=True, seed=7):
    """The same batch with other token ids and pixels behind the masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, END, batch.token_ids.shape, generator=generator)
    pixels = 3 * torch.randn(batch.video.shape, generator=generator)
    real_words, real_frames = batch.text_mask.bool(), batch.video_mask.bool()[..., None, None, None]
    return dataclasses.replace(
        batch,
        token_ids=torch.where(real_words, batch.token_ids, ids) if words else batch.token_ids,
        video=torch.where(real_frames, batch.video, pixels) if frames else batch.video,
    )


def largest_move(one, other):
    return (one - other).abs().max().item()


each_combination = pytest.mark.parametrize(("head", "agg_module"), PAIRS)
a_few = settings(max_examples=5)
seeds = st.integers(0, 10_000)


@each_combination
@a_few
@given(seed=seeds, rows=st.lists(st.integers(0, B - 1), min_size=1, max_size=B, unique=True))
def test_a_score_does_not_depend_on_the_rest_of_the_batch(head, agg_module, seed, rows):
    """A permutation, a part of the batch, and (lists of one row) one alone."""
    model, batch = model_of(head, agg_module), batch_of(B, B, seed, frames=5)
    together = similarity(model, batch)
    assert largest_move(similarity(model, rows_of(batch, rows)), together[rows][:, rows]) < NOISE
    alone = rows_of(batch, rows[:1])
    assert largest_move(similarity(model, alone), together[rows[0], rows[0]]) < NOISE


@each_combination
@a_few
@given(seed=seeds)
def test_padding_does_not_count(head, agg_module, seed):
    model, batch = model_of(head, agg_module), batch_of(B, B, seed, frames=5)
    moved = largest_move(similarity(model, with_other_padding(batch, seed=seed)), similarity(model, batch))
    assert moved < NOISE


@each_combination
@a_few
@given(seed=seeds, block_size=st.integers(1, B))
def test_block_size_does_not_count(head, agg_module, seed, block_size):
    model, batch = model_of(head, agg_module), batch_of(B, B - 1, seed, frames=5)
    text, video = encoded(model, batch)
    whole = score(model, text, video, block_size=B)
    assert largest_move(score(model, text, video, block_size), whole) < NOISE


def moved_by(change, head, agg_module, **changes):
    """How far `change` of a batch moves its scores: officially, and repaired."""
    batch = batch_of(B, B, frames=5)
    moves = []
    for repaired in (False, True):
        model = model_of(head, agg_module, repaired, **changes)
        moves.append(change(model, batch, similarity(model, batch)))
    return moves


def one_by_one(model, batch, together):
    alone = [similarity(model, rows_of(batch, [row])) for row in range(B)]
    return largest_move(torch.cat(alone).flatten(), together.diagonal())


def other_padding(**which):
    return lambda model, batch, before: largest_move(
        similarity(model, with_other_padding(batch, **which)), before
    )


@pytest.mark.parametrize(
    ("head", "agg_module", "words", "frames"),
    [
        ("xclip", "meanP", True, False),  # ledger 1
        ("xclip", "meanP", False, True),
        ("glscl", "meanP", True, False),  # ledger 14
        ("glscl", "meanP", False, True),
        ("clip4clip", "tdb", False, True),  # ledger 4
        ("clip2video", "tdb", False, True),
    ],
)
def test_officially_padding_counts(head, agg_module, words, frames):
    unmixed = {"temporal.mixed_head_masks": False}
    change = other_padding(words=words, frames=frames)
    official, repaired = moved_by(change, head, agg_module, **unmixed)
    assert official > EFFECT
    assert repaired < NOISE


def test_the_global_weights_of_glscl_do_not_mind_padding():
    """A softmax over padded frames too, times the mask: the cosine takes out what they took."""
    official, _ = moved_by(other_padding(words=False), "glscl", "meanP", **{"head.loss2_weight": 0.0})
    assert official < NOISE


@pytest.mark.parametrize("head", ["clip4clip", "clip2video"])
def test_officially_a_score_depends_on_the_batch_of_its_video(head):
    """Mixed head masks (ledger 3); a single attention head hides them."""
    agg_module = "tdb" if head == "clip2video" else "seqTransf"
    official, repaired = moved_by(one_by_one, head, agg_module)
    assert official > EFFECT
    assert repaired < NOISE
    one_head, _ = moved_by(one_by_one, head, agg_module, **{"towers.architecture.embed_dim": 64})
    assert one_head < NOISE


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
def test_head_h_of_video_b_takes_the_mask_of_another(mixed):
    """Officially that of video (b * H + h) mod B, here with H = 3 (ledger 3)."""
    torch.manual_seed(0)
    module = SeqTransf(TemporalConfig("seqTransf", layers=2, mixed_head_masks=mixed), 192, 6).eval()
    frames, mask = torch.randn(B, 6, 192), (torch.arange(6) < torch.tensor([[1], [6], [3], [2], [5]])).long()
    positioned = frames + module.frame_position_embeddings.weight
    p = {f"x.{name}": value for name, value in module.transformerClip.named_parameters()}
    expected = added(positioned, mask, p, "x", 2, mixed) + frames
    torch.testing.assert_close(module(frames, mask), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("projection", ["default", "sigmoid_mlp", "sigmoid_selfA"])
def test_the_difference_with_the_first_padded_frame_counts(projection):
    """It has the mask of the last real frame (ledger 4); those further behind are hidden."""
    torch.manual_seed(0)
    frames, mask = torch.randn(1, 5, 64), torch.tensor([[1, 1, 1, 0, 0]])
    for repaired in (False, True):
        config = TemporalConfig("tdb", 2, projection, mask_differences=repaired)
        module = TemporalDifference(config, 64, 5).eval()
        before = module(frames, mask)[0, :3]
        moves = []
        for padded in (3, 4):
            other = frames.clone()
            other[0, padded] = torch.randn(64)
            moves.append(largest_move(module(other, mask)[0, :3], before))
        assert (moves[0] > EFFECT) == (not repaired)
        assert moves[1] < NOISE


def test_glscl_sees_the_doubled_frames_of_seq_lstm():
    """Beyond the longest video of the batch they are twice the frame (ledger 14); other heads mask them."""
    official, repaired = moved_by(one_by_one, "glscl", "seqLSTM", **{"temporal.mixed_head_masks": False})
    assert official > EFFECT
    assert repaired < NOISE
    for head in ("clip4clip", "xclip", "maxsim"):
        official, _ = moved_by(one_by_one, head, "seqLSTM")
        assert official < NOISE


@pytest.mark.parametrize("repaired", [False, True])
def test_the_3d_patch_reaches_into_padded_frames(repaired):
    """Ledger 19: pixels behind the mask move the last real frame, unless they are blackened first."""
    switches = {"towers.linear_patch": "3d", "towers.mask_padded_frames": repaired}
    model = model_of("clip4clip", "meanP", **switches)
    with torch.no_grad():
        model.clip.visual.conv2.weight.copy_(torch.randn_like(model.clip.visual.conv2.weight) / 10)
    torch.manual_seed(0)
    video, mask = torch.randn(2, 5, 3, 32, 32), torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    other = video.clone()
    other[1, 3:] = 7.0
    with evaluating(model):
        moved = (model.encode_video(video, mask).pooled - model.encode_video(other, mask).pooled).abs()
    assert moved[0].max() < NOISE
    assert (moved[1].max() > EFFECT) != repaired
