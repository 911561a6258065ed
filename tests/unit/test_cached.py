"""Cached gradients are those of the whole batch, for every head, in the memory of a chunk."""

import json

import pytest
import torch

from tests.unit.combinations import PAIRS, batch_of, settings_of
from tests.unit.tiny import tiny
from tests.unit.training import train_tiny
from xclip_lab.cached import bytes_of_a_pair, cached_backward, fitting_chunk
from xclip_lab.errors import TrainingError


def alone(text, video):
    return text, video


def gradients(model):
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("head", "agg_module"), PAIRS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_gradients_are_those_of_the_whole_batch(head, agg_module, chunk):
    model, batch = tiny(**settings_of(head, agg_module)), batch_of(texts=7, videos=7)
    losses = model.loss(batch)
    (losses["loss"] * 0.5).backward()
    whole = gradients(model)
    values = cached_backward(model, batch, chunk, alone, weight=0.5)
    cached = gradients(model)
    assert values == pytest.approx({name: value.item() for name, value in losses.items()}, rel=1e-5)
    assert cached.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_frozen_towers_get_no_gradient():
    model, batch = tiny(), batch_of()
    model.clip.requires_grad_(False)
    cached_backward(model, batch, 2, alone)
    assert not any(name.startswith("clip") for name in gradients(model))


def test_a_pair_needs_what_autograd_keeps():
    model = tiny()
    small = bytes_of_a_pair(model, batch_of(frames=2))
    large = bytes_of_a_pair(model, batch_of(frames=4))
    assert large > 1.5 * small > 0


def test_the_chunk_is_what_fits(monkeypatch):
    model, batch = tiny(), batch_of(texts=6, videos=6)
    each = bytes_of_a_pair(model, batch)
    monkeypatch.setattr("xclip_lab.cached.free_memory", lambda device: int(each * 2.5 / 0.6))
    assert fitting_chunk(model, batch) == 2
    monkeypatch.setattr("xclip_lab.cached.free_memory", lambda device: each * 1000)
    assert fitting_chunk(model, batch) == 600
    monkeypatch.setattr("xclip_lab.cached.free_memory", lambda device: each)
    with pytest.raises(TrainingError, match=r"one pair needs .*gradient_checkpointing=true"):
        fitting_chunk(model, batch)


FP16 = {"towers.precision": "fp16", "optim.recipe": "official"}


def test_partly_frozen_and_half_precision_towers():
    for settings, freeze in (({}, "visual"), ({}, "transformer"), (FP16, None)):
        model, batch = tiny(**settings), batch_of(texts=5, videos=5)
        if freeze:
            getattr(model.clip, freeze).requires_grad_(False)
        model.loss(batch)["loss"].backward()
        whole = gradients(model)
        cached_backward(model, batch, 2, alone)
        cached = gradients(model)
        assert cached.keys() == whole.keys()
        for name, gradient in whole.items():
            error = (cached[name] - gradient).float().norm() / gradient.float().norm().clamp(min=1e-4)
            assert error < (2e-2 if settings else 1e-3), name


@pytest.mark.parametrize(
    ("settings", "chunk"), [({}, 3), ({"train.accumulate": 2, "towers.gradient_checkpointing": True}, 1)]
)
def test_a_run_has_the_losses_of_one_without(tmp_path, monkeypatch, settings, chunk):
    """With dropout behind the towers, whose draws are the same; `auto` takes what fits."""
    losses, chunks = {}, []

    def watched(model, batch, chunk, *more):
        chunks.append(chunk)
        return cached_backward(model, batch, chunk, *more)

    monkeypatch.setattr("xclip_lab.step.cached_backward", watched)
    monkeypatch.setattr("xclip_lab.cached.bytes_of_a_pair", lambda *_: 100)
    monkeypatch.setattr("xclip_lab.cached.free_memory", lambda device: 100 * chunk / 0.5)
    for asked in (None, chunk, "auto"):
        run = tmp_path / str(asked)
        train_tiny(run, {"train.tower_chunk": asked, **settings})
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        losses[asked] = [row["loss"] for row in rows if "loss" in row]
    assert len(losses[None]) == 10
    assert len(set(losses[None])) == 10
    parts = settings.get("train.accumulate", 1)
    assert chunks == [chunk] * 20 * parts
    assert losses[chunk] == pytest.approx(losses[None], rel=1e-4)
    assert losses["auto"] == losses[chunk]


def test_the_sentence_stands_where_the_towers_take_it_from():
    """At the largest id, even where the mask ends elsewhere."""
    model, batch = tiny(), batch_of(texts=4, videos=4)
    batch.token_ids[:, 1] = 59
    batch.token_ids[:, 2:] = batch.token_ids[:, 2:].clamp(max=57)
    loss = model.loss(batch)["loss"].item()
    assert cached_backward(model, batch, 2, alone)["loss"] == pytest.approx(loss, rel=1e-5)
