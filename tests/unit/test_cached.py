"""Cached gradients are those of the whole batch, for every head, in the memory of a chunk."""

import pytest
import torch

from tests.unit.combinations import PAIRS, batch_of, settings_of
from tests.unit.tiny import tiny
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
    assert fitting_chunk(model, batch) == 6
    monkeypatch.setattr("xclip_lab.cached.free_memory", lambda device: each)
    with pytest.raises(TrainingError, match=r"one pair needs .*gradient_checkpointing=true"):
        fitting_chunk(model, batch)
