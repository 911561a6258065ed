"""BertAdam, its schedules and the parameter groups against the official code's numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.shared import golden_path, needs_golden
from xclip_lab.config import OptimConfig
from xclip_lab.optim import (
    SCHEDULES,
    clamp_logit_scale,
    create_optimizer,
    freeze_parameters,
    parameter_groups,
)

pytestmark = [needs_golden("optim.npz"), needs_golden("groups_xclip.json")]


@pytest.fixture(scope="module")
def golden():
    return np.load(golden_path("optim.npz"), allow_pickle=False)


@pytest.fixture(scope="module")
def groups_golden():
    return json.loads(golden_path("groups_xclip.json").read_text())["seqTransf"]


@pytest.mark.parametrize("total_steps", [20, 7.5])
@pytest.mark.parametrize("case", ["bertadam_only", "train_loop"])
def test_bertadam_takes_the_official_steps(golden, case, total_steps):
    meta = json.loads(str(golden["meta"]))
    first = f"out/{case}/t{total_steps}/step1/"  # its order is that of the official named_parameters()
    names = [key.removeprefix(first) for key in golden.files if key.startswith(first)]
    parameters = {name: nn.Parameter(torch.tensor(golden[f"in/init/{name}"])) for name in names}
    config = OptimConfig(recipe="official", lr=meta["args"]["lr"], coef_lr=meta["args"]["coef_lr"])
    optimizer = create_optimizer(parameters.items(), config, total_steps)
    prefix = f"out/{case}/t{total_steps}"
    for index in range(meta["steps"]):
        for name, parameter in parameters.items():
            skipped = name == "never_used" or (name == "sometimes_used" and index in (0, 3))
            gradient = torch.tensor(golden[f"in/grads/{name}"][index])
            parameter.grad = None if skipped else gradient
        if case == "train_loop":
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if case == "train_loop":
            clamp_logit_scale(parameters["clip.logit_scale"])
        rates = golden[f"{prefix}/get_lr_after_step"][index]
        np.testing.assert_allclose(optimizer.get_lr(), rates[~np.isnan(rates)], rtol=1e-12)
        if f"{prefix}/step{index + 1}/{names[0]}" in golden.files:
            for name, parameter in parameters.items():
                expected = golden[f"{prefix}/step{index + 1}/{name}"]
                found = parameter.detach().numpy()
                np.testing.assert_allclose(
                    found, expected, rtol=1e-6, atol=1e-7, err_msg=f"{name} after step {index + 1}"
                )


@pytest.mark.parametrize("warmup", ["0.1", "0.002", "0.0", "-1"])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_are_the_official_ones(golden, name, warmup):
    ours = [SCHEDULES[name](x, float(warmup)) for x in golden["sched/x"]]
    np.testing.assert_allclose(ours, golden[f"sched/{name}/warmup{warmup}"], rtol=1e-12, atol=1e-15)


def test_groups_are_the_official_ones(groups_golden):
    named = [(name, nn.Parameter(torch.zeros(1))) for name in groups_golden["group_of"]]
    groups = parameter_groups(named, OptimConfig(recipe="official", lr=0.01, coef_lr=0.1))
    found = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    assert {name: found[id(p)] for name, p in named} == groups_golden["group_of"]
    for group, official in zip(groups, groups_golden["groups"], strict=True):
        assert group["lr"] == pytest.approx(official["lr"], rel=1e-12)
        assert group["weight_decay"] == official["weight_decay"]


@pytest.mark.parametrize("number", [-1, 0, 1, 2, 3, 12])
def test_freezing_is_the_official_one(groups_golden, number):
    named = [(name, nn.Parameter(torch.zeros(1))) for name in groups_golden["group_of"]]
    freeze_parameters(named, number)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    assert frozen == set(groups_golden["frozen_by_freeze_layer_num"][str(number)])
