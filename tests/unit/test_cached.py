"""Cached gradients are those of the whole batch, for every head, in the memory of a chunk."""

import json
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from tests.unit.combinations import PAIRS, batch_of, settings_of
from tests.unit.tiny import tiny
from tests.unit.training import after_step, assert_same, outcome, train_tiny
from xclip_lab import cached, step
from xclip_lab.cached import _live_bytes, cached_loss, fitting_chunk
from xclip_lab.errors import TrainingError
from xclip_lab.live_bytes import LiveBytes

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
CHECKPOINTS = {"towers.gradient_checkpointing": True}
TOWERS_ALONE = {"temporal.agg_module": "meanP"}
FP16 = {"towers.precision": "fp16", "optim.recipe": "official"}


def gradients(model, losses=None):
    if losses is not None:
        losses["loss"].backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_near(found, expected, tolerance):
    """Each tensor by its own norm; below a millionth of the largest norm there is nothing but rounding."""
    assert found.keys() == expected.keys()
    least = 1e-6 * max(gradient.float().norm() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).float().norm()
        assert error < tolerance * gradient.float().norm() + least, name


@pytest.mark.parametrize(("head", "agg_module"), PAIRS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_gradients_are_those_of_the_whole_batch(head, agg_module, chunk):
    model, batch = tiny(**settings_of(head, agg_module)), batch_of(texts=7, videos=7)
    whole, cached = model.loss(batch), cached_loss(model, batch, chunk)
    assert {name: value.item() for name, value in cached.items()} == pytest.approx(
        {name: value.item() for name, value in whole.items()}, rel=1e-5
    )
    assert_near(gradients(model, cached), gradients(model, whole), 1e-4)


@pytest.mark.parametrize(
    ("settings", "frozen", "autocast", "tolerance"),
    [
        ({}, "visual", nullcontext, 1e-4),
        ({}, "transformer", nullcontext, 1e-4),
        (CHECKPOINTS, None, nullcontext, 1e-4),
        (FP16, None, nullcontext, 2e-2),
        (TOWERS_ALONE, None, BF16, 2e-2),
        (TOWERS_ALONE | CHECKPOINTS, None, BF16, 2e-2),
    ],
)
def test_towers_of_every_kind(settings, frozen, autocast, tolerance):
    model, batch = tiny(**settings).train(), batch_of(texts=5, videos=5)
    if frozen:
        getattr(model.clip, frozen).requires_grad_(False)
    with autocast():
        whole, cached = model.loss(batch), cached_loss(model, batch, 2)
    assert_near(gradients(model, cached), gradients(model, whole), tolerance)


@pytest.mark.parametrize("settings", [{}, CHECKPOINTS])
def test_bfloat16_in_the_added_transformers_too(settings):
    """Chunks err no more than the whole batch does, held against float32."""
    model, batch = tiny(**settings).train(), batch_of(texts=5, videos=5)
    exact = gradients(model, model.loss(batch))
    with BF16():
        whole, cached = model.loss(batch), cached_loss(model, batch, 2)
    of_whole, of_chunks = (
        sum((found[name].float() - exact[name].float()).norm() ** 2 for name in exact) ** 0.5
        for found in (gradients(model, whole), gradients(model, cached))
    )
    assert 0 < of_chunks < 1.05 * of_whole
    assert of_whole < 0.02 * sum(gradient.norm() ** 2 for gradient in exact.values()) ** 0.5


def test_bfloat16_gradients_of_chunks_are_added_in_float32():
    """Added in bfloat16 those of 64 chunks would be further from the truth than the whole batch's."""
    model, batch = tiny(), batch_of(texts=64, videos=64)
    name = "clip.visual.transformer.resblocks.0.attn.in_proj_bias"
    exact = gradients(model, model.loss(batch))[name]

    def error(loss):
        with BF16():
            losses = loss()
        return (gradients(model, losses)[name] - exact).norm()

    assert error(lambda: cached_loss(model, batch, 1)) < 1.2 * error(lambda: model.loss(batch))


def test_frozen_towers_get_no_gradient_and_pass_once():
    model, batch, passes = tiny(), batch_of(), []
    model.clip.requires_grad_(False)
    model.clip.visual.register_forward_hook(lambda *_: passes.append(1))
    found = gradients(model, cached_loss(model, batch, len(batch)))
    assert not any(name.startswith("clip") for name in found)
    assert len(passes) == 1


def test_what_the_towers_draw_is_drawn_again(monkeypatch):
    model, batch = tiny().train(), batch_of(texts=6, videos=6)
    model.clip.visual.ln_post = nn.Sequential(model.clip.visual.ln_post, nn.Dropout(0.5))
    torch.manual_seed(1)
    found = gradients(model, cached_loss(model, batch, 2))
    monkeypatch.setattr(cached, "checkpoint", lambda tower, *inputs, use_reentrant: tower(*inputs))
    torch.manual_seed(1)
    assert_near(found, gradients(model, cached_loss(model, batch, 2)), 1e-5)


def peak(way):
    with LiveBytes() as live:
        way()
    return max(live.after)


@pytest.mark.parametrize("settings", [{}, CHECKPOINTS, FP16])
@pytest.mark.parametrize("autocast", [nullcontext, BF16])
def test_the_chunk_is_what_fits(monkeypatch, settings, autocast):
    """Reckoned from two and three pairs: where 20 just fit and where they just do not."""
    model = tiny(**settings, **{"towers.architecture.vision_layers": 3}).train()
    pair = batch_of(texts=1, videos=1)
    needed = max(_live_bytes(model, pair, 20, autocast))
    rest = cached._KEPT * sum(value.numel() for value in model.parameters())

    def fits(free, most):
        monkeypatch.setattr(cached, "free_memory", lambda device: free)
        return fitting_chunk(model, pair, most, autocast)

    enough = -(-(needed + rest) // cached._SHARE)
    assert fits(enough, 20) == 20
    assert fits(enough * 0.999, 20) == 10  # two chunks of a size
    assert fits(enough, 45) == 15
    assert fits(None, 45) == 45
    assert fits(rest // 2, 45) == 1
    assert gradients(model) == {}


def test_numbers_of_pairs_that_take_other_operations(monkeypatch):
    """Then the largest counts decide; where nothing grows all fit; no more are measured than there are."""
    alive = {1: [5, 20], 2: [5, 30], 3: [40, 5, 5]}
    asked = []

    def measured(model, pair, count, autocast):
        asked.append(count)
        return alive[count]

    monkeypatch.setattr(cached, "free_memory", lambda device: (55 + cached._KEPT) / cached._SHARE)
    monkeypatch.setattr(cached, "_live_bytes", measured)
    one, pair = nn.Linear(1, 1, bias=False), batch_of(texts=1, videos=1)
    assert fitting_chunk(one, pair, 8) == 4  # 4.5 fit
    assert fitting_chunk(one, pair, 2) == 2
    alive[2] = [5, 60]
    assert fitting_chunk(one, pair, 2) == 1
    assert fitting_chunk(one, pair, 8) == 8
    assert asked == [1, 2, 3, 1, 2, 1, 2, 1, 2, 3]


def test_not_even_one_pair(monkeypatch):
    """Then memory is full, in one line; where three may not fit, they are not tried."""
    asked = []
    monkeypatch.setattr(cached, "_live_bytes", lambda *given: asked.append(given[2]) or [40])
    one, pair = nn.Linear(1, 1, bias=False), batch_of(texts=1, videos=1)
    for free in (39, 119):
        monkeypatch.setattr(cached, "free_memory", lambda device, free=free: free)
        assert fitting_chunk(one, pair, 8) == 1
    assert asked == [1, 1]

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(cached, "_live_bytes", full)
    with pytest.raises(TrainingError, match=r"for one pair; try towers.gradient_checkpointing=true"):
        fitting_chunk(one, pair, 8)


def test_what_are_no_pairs_is_found_before_the_towers():
    model, fewer, empty = tiny(), batch_of(texts=2, videos=3), batch_of(texts=3, videos=3)
    empty.video_mask[1] = 0
    model.clip = None
    for batch, message in ((fewer, "a loss needs pairs: 2"), (empty, r"no valid frame in video\(s\) \[1\]")):
        with pytest.raises(ValueError, match=message):
            cached_loss(model, batch, 1)


def test_memory_is_that_of_a_chunk():
    model, large = tiny(**{"towers.architecture.vision_layers": 6}), batch_of(texts=40, videos=40)
    whole = peak(lambda: gradients(model, model.loss(large)))
    chunked = peak(lambda: gradients(model, cached_loss(model, large, 4)))
    assert chunked < whole / 4


@pytest.mark.parametrize("settings", [{}, {"train.accumulate": 2, "train.precision": "bf16", **CHECKPOINTS}])
def test_a_run_has_the_losses_of_one_without(tmp_path, monkeypatch, settings):
    """With dropout behind the towers, whose draws are the same."""
    losses, chunks = {}, []

    def watched(model, batch, chunk, gather):
        chunks.append(chunk)
        return cached_loss(model, batch, chunk, gather)

    monkeypatch.setattr(step, "cached_loss", watched)
    for asked in (None, 1):
        run = tmp_path / str(asked)
        train_tiny(run, {"train.tower_chunk": asked, **settings})
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        losses[asked] = [row["loss"] for row in rows if "loss" in row]
        assert not any("tower_chunk" in row for row in rows)
    assert len(set(losses[None])) == 10
    assert chunks == [1] * 10 * settings.get("train.accumulate", 1)
    assert losses[1] == pytest.approx(losses[None], rel=2e-2 if settings else 1e-4)


def test_asking_what_fits_changes_nothing_where_all_does(tmp_path):
    train_tiny(tmp_path / "asked")
    train_tiny(tmp_path / "told", {"train.tower_chunk": 4})
    assert_same(outcome(tmp_path / "asked"), outcome(tmp_path / "told"))


def test_a_run_goes_on_with_the_chunk_it_chose(tmp_path, monkeypatch):
    """Whatever is free by then; the history tells it."""
    monkeypatch.setattr(step, "fitting_chunk", lambda *_: 2)
    train_tiny(tmp_path / "whole")
    with pytest.raises(RuntimeError), after_step(4, fail):
        train_tiny(tmp_path / "stopped")
    monkeypatch.setattr(step, "fitting_chunk", lambda *_: 1)
    saved_as_before(tmp_path / "stopped")
    train_tiny(tmp_path / "stopped")
    found = outcome(tmp_path / "stopped")
    assert_same(found, outcome(tmp_path / "whole"))
    assert {row["tower_chunk"] for row in found["history"]} == {2}


def fail():
    raise RuntimeError


def saved_as_before(run_dir):
    """By a version in which choosing was a value of the setting."""
    file = run_dir / "checkpoints/last/training.pt"
    state = torch.load(file, weights_only=True)
    state["config"]["train"]["tower_chunk"] = "auto"
    torch.save(state, file)


def test_a_run_that_fills_the_memory_goes_on_with_the_chunk_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "fitting_chunk", lambda *_: 4)
    with (
        monkeypatch.context() as patch,
        after_step(4, lambda: patch.setattr("xclip_lab.model.RetrievalModel.pair_loss", full)),
        pytest.raises(TrainingError, match=r"at step 5; .* is good$") as failed,
    ):
        train_tiny(tmp_path / "stopped")
    told = {"train.tower_chunk": int(re.search(r"train.tower_chunk=(\d+)", str(failed.value))[1])}
    chunks = []
    monkeypatch.setattr(step, "cached_loss", lambda *given: chunks.append(given[2]) or cached_loss(*given))
    train_tiny(tmp_path / "stopped", told)
    train_tiny(tmp_path / "whole")
    assert chunks == [2] * 7  # all after the checkpoint of step 3
    found, expected = (outcome(tmp_path / name)["history"] for name in ("stopped", "whole"))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    with pytest.raises(TrainingError, match=r"another config: seed \(0 there, 1 here\);"):
        train_tiny(tmp_path / "stopped", {"seed": 1})


def full(*_):
    raise RuntimeError("CUDA out of memory")


def test_where_memory_ends_the_error_names_what_to_try(tmp_path, monkeypatch):
    for chunk, advice in ((None, "4 pairs at a time .*tower_chunk=2"), (1, "gradient_checkpointing=true")):
        monkeypatch.setattr("xclip_lab.model.RetrievalModel.pair_loss", full)
        with pytest.raises(TrainingError, match=rf"memory is full at step 1; .*{advice}"):
            train_tiny(tmp_path / str(chunk), {"train.tower_chunk": chunk})


def test_the_sentence_stands_where_the_towers_take_it_from():
    """At the largest id, even where the mask ends elsewhere."""
    model, batch = tiny(), batch_of(texts=4, videos=4)
    batch.token_ids[:, 1] = 59
    batch.token_ids[:, 2:] = batch.token_ids[:, 2:].clamp(max=57)
    loss = model.loss(batch)["loss"].item()
    assert cached_loss(model, batch, 2)["loss"].item() == pytest.approx(loss, rel=1e-5)
