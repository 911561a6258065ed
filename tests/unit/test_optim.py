"""The modern recipe, and what both optimisers promise."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests.unit.training import NoisyModel, frames_of, tiny_config, tiny_dataset
from xclip_lab.config import OptimConfig, load_config
from xclip_lab.losses import symmetric_cross_entropy
from xclip_lab.model import official_name
from xclip_lab.optim import (
    create_optimizer,
    freeze_parameters,
    parameter_groups,
    undecayed_parameters,
    warmup_then_cosine,
)
from xclip_lab.train import fit

MODERN = OptimConfig(recipe="modern", lr=1e-2, coef_lr=0.1, weight_decay=0.2)


@pytest.fixture(scope="module")
def named():
    return named_parameters(NoisyModel(tiny_config().model))


def named_parameters(model):
    return [(official_name(name), parameter) for name, parameter in model.named_parameters()]


def test_modern_groups(named):
    undecayed = {official_name(name) for name in undecayed_parameters(NoisyModel(tiny_config().model))}
    groups = parameter_groups(named, MODERN, undecayed)
    names = {id(parameter): name for name, parameter in named}
    towers, new, towers_free, new_free = ([names[id(p)] for p in group["params"]] for group in groups)
    assert "clip.transformer.resblocks.0.attn.in_proj_weight" in towers
    assert "clip.visual.conv1.weight" in towers
    assert "transformerClip.resblocks.0.mlp.c_fc.weight" in new
    assert {"frame_mat_weight2", "word_logit_weight", "global_mat_weight"} <= set(new_free)
    free = {"clip.logit_scale", "clip.token_embedding.weight", "clip.visual.class_embedding"}
    free |= {"clip.positional_embedding", "clip.ln_final.weight", "clip.visual.ln_post.bias"}
    assert free <= set(towers_free)
    assert "frame_position_embeddings.weight" in new_free
    assert "transformerClip.resblocks.0.ln_1.weight" in new_free
    assert sum(map(len, (towers, new, towers_free, new_free))) == len(named)
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 1e-2, 1e-3, 1e-2])
    assert [group["weight_decay"] for group in groups] == [0.2, 0.2, 0.0, 0.0]


def test_modules_say_what_does_not_decay():
    model = NoisyModel(tiny_config({"head.fusion": "transformer"}).model)
    undecayed = undecayed_parameters(model)
    heads = {f"head.{name}_fusion.positions" for name in ("word", "frame", "matrix")}
    heads |= {"head.global_mat_weight", "head.local_mat_weight"}
    assert {name for name in undecayed if name.startswith("head.")} == heads
    assert undecayed <= dict(model.named_parameters()).keys()
    groups = parameter_groups(model.named_parameters(), MODERN, undecayed)
    free = {id(parameter) for group in groups[2:] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        expected = parameter.ndim < 2 or "embedding" in name or name in heads
        assert (id(parameter) in free) == expected, name


def test_the_official_rule_knows_no_exemption(named):
    plain = parameter_groups(named, OptimConfig())
    exempt = parameter_groups(named, OptimConfig(), {name for name, _ in named})
    assert [list(map(id, g["params"])) for g in plain] == [list(map(id, g["params"])) for g in exempt]


def test_modern_step_is_bias_corrected_adamw():
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    gradient = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    optimizer = create_optimizer([("head", weight)], MODERN, total_steps=10)
    assert optimizer.get_lr() == [pytest.approx(1e-2)]  # one step of warm-up, and it is not 0
    weight.grad = gradient
    optimizer.step()
    # Bias correction makes the first update the gradient's sign; decay is decoupled.
    expected = 0.5 * (1 - 1e-2 * 0.2) - 1e-2 * gradient.sign()
    torch.testing.assert_close(weight.detach(), expected, atol=1e-7, rtol=1e-6)


def test_modern_schedule():
    factors = [warmup_then_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert warmup_then_cosine(0, 5, 0.0) == 1.0
    assert warmup_then_cosine(4, 5, 1.0) == 1.0


@pytest.mark.parametrize("recipe", ["official", "modern"])
def test_state_dict_goes_on_exactly(recipe):
    torch.manual_seed(0)
    config = OptimConfig(recipe=recipe, lr=1e-2)
    gradients = torch.randn(8, 5, 3)

    def run(parameter, optimizer, steps):
        for step in steps:
            parameter.grad = gradients[step].clone()
            optimizer.step()

    whole = nn.Parameter(torch.ones(5, 3))
    run(whole, create_optimizer([("a", whole)], config, 8), range(8))

    first = nn.Parameter(torch.ones(5, 3))
    optimizer = create_optimizer([("a", first)], config, 8)
    run(first, optimizer, range(4))
    second = nn.Parameter(first.detach().clone())
    resumed = create_optimizer([("a", second)], config, 8)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(second, resumed, range(4, 8))
    assert torch.equal(second, whole)


def test_official_first_step_has_rate_zero():
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = create_optimizer([("head", weight)], OptimConfig(), total_steps=10)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 3))
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3, 3))


def test_loss_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(4, 4)
    rows = -sum(math.log(math.exp(logits[i, i]) / logits[i].exp().sum()) for i in range(4)) / 4
    columns = -sum(math.log(math.exp(logits[i, i]) / logits[:, i].exp().sum()) for i in range(4)) / 4
    assert symmetric_cross_entropy(logits).item() == pytest.approx((rows + columns) / 2, rel=1e-6)
    assert symmetric_cross_entropy(logits.T).item() == pytest.approx((rows + columns) / 2, rel=1e-6)


@pytest.mark.parametrize("number", [0, 1])
def test_freezing_with_the_3d_patch(number):
    """Officially it freezes nothing; repaired it freezes what it does with the 2D patch, and conv2 trains."""

    def frozen(patch: str, repaired: bool) -> set[str]:
        named = named_parameters(NoisyModel(tiny_config({"towers.linear_patch": patch}).model))
        assert ("clip.visual.conv2.weight" in dict(named)) == (patch == "3d")
        freeze_parameters(iter(named), number, freeze_with_3d_patch=repaired)
        return {name for name, parameter in named if not parameter.requires_grad}

    expected = frozen("2d", repaired=False)
    assert {"clip.visual.conv1.weight", "clip.token_embedding.weight"} <= expected
    assert ("clip.visual.transformer.resblocks.0.ln_1.weight" in expected) == (number == 1)
    assert frozen("3d", repaired=False) == set()
    assert frozen("3d", repaired=True) == expected
    assert frozen("2d", repaired=True) == expected


@pytest.mark.parametrize("repaired", [False, True])
def test_training_with_the_3d_patch_freezes_as_told(repaired, tmp_path):
    settings = {"towers.linear_patch": "3d", "towers.freeze_layer_num": 0}
    settings |= {"towers.freeze_with_3d_patch": repaired, "train.max_steps": 2}
    config, dataset = tiny_config(settings), tiny_dataset()
    model = NoisyModel(config.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, config, dataset, tmp_path, store=frames_of(dataset), progress=False)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert ("clip.visual.class_embedding" in moved) == (not repaired)
    assert {"clip.visual.conv2.weight", "clip.text_projection"} <= moved


@pytest.mark.parametrize("planned", [1, None])
def test_glscl_schedule_is_for_a_fixed_number_of_epochs(planned, tmp_path):
    """Ledger 10: in a longer run the rate rises again after its plan; repaired, it falls to the end."""
    assert load_config("glscl-folder-b32").optim.schedule_epochs == 5
    config = tiny_config({"optim.schedule_epochs": planned, "optim.recipe": "official"})
    dataset = tiny_dataset()
    store = frames_of(dataset)
    fitted = fit(NoisyModel(config.model), config, dataset, tmp_path, store=store, progress=False)
    rates = [row["lr"] for row in fitted.history]  # 2 epochs of 5 steps
    assert (rates[-1] > rates[5]) == (planned == 1)
    assert (rates[5] == pytest.approx(0, abs=1e-12)) == (planned == 1)
