"""BertAdam, its schedules and the parameter groups against the official code's numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.parity.families import official_model
from tests.parity.golden import Golden
from tests.shared import golden_path, golden_paths, needs_golden
from xclip_lab.config import OptimConfig
from xclip_lab.model import official_name
from xclip_lab.optim import (
    SCHEDULES,
    clamp_logit_scale,
    create_optimizer,
    freeze_parameters,
    parameter_groups,
)

pytestmark = needs_golden("optim.npz")


def groups_of(family: str) -> dict[str, dict]:
    return json.loads(golden_path(f"groups_{family}.json").read_text())


FAMILIES = [path.stem.removeprefix("groups_") for path in golden_paths("groups_*.json")]
GROUPS = [(family, case) for family in FAMILIES for case in groups_of(family)]
FREEZING = [
    (family, case, number)
    for family, case in GROUPS
    for number in groups_of(family)[case].get("frozen_by_freeze_layer_num", ())
]
ALWAYS_FROZEN = [(family, case) for family, case in GROUPS if "frozen" in groups_of(family)[case]]


@pytest.fixture(scope="module")
def golden():
    return np.load(golden_path("optim.npz"), allow_pickle=False)


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


@pytest.mark.parametrize(("family", "case"), GROUPS)
def test_groups_are_the_official_ones(family, case):
    official = groups_of(family)[case]
    named = [(name, nn.Parameter(torch.zeros(1))) for name in official["group_of"]]
    groups = parameter_groups(named, OptimConfig(recipe="official", lr=0.01, coef_lr=0.1))
    found = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    assert {name: found[id(p)] for name, p in named} == official["group_of"]
    for group, theirs in zip(groups, official["groups"], strict=True):
        assert group["lr"] == pytest.approx(theirs["lr"], rel=1e-12)
        assert group["weight_decay"] == theirs["weight_decay"]


@pytest.mark.parametrize(("family", "case", "number"), FREEZING)
def test_freezing_is_the_official_one(family, case, number):
    official = groups_of(family)[case]
    named = [(name, nn.Parameter(torch.zeros(1))) for name in official["group_of"]]
    freeze_parameters(named, int(number))
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    assert frozen == set(official["frozen_by_freeze_layer_num"][number])


@pytest.mark.parametrize(("family", "case"), ALWAYS_FROZEN)
def test_what_a_family_always_freezes(family, case):
    path = golden_path(f"{family}_{case}.npz")
    if not path.exists():
        pytest.skip(f"reference data {path.name!r} not found: set XCLIP_LAB_SHARED")
    model = official_model(Golden(path))
    frozen = [official_name(name) for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen == groups_of(family)[case]["frozen"]
