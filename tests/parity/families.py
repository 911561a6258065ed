"""What holds of every family: how a case's model is loaded, and what of it must be the official numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.golden import Golden
from xclip_lab import load_official
from xclip_lab.attention import run_with_cache
from xclip_lab.model import RetrievalModel, official_name

FEATURES = {"atol": 2e-5, "rtol": 1e-4}
GRADIENTS = {"atol": 2e-5, "rtol": 1e-3}
LOSS = {"atol": 1e-5, "rtol": 0.0}


def logits_tolerance(golden: Golden) -> dict[str, float]:
    """GLSCL's similarity is a sum of cosines, that of the others carries CLIP's scale."""
    return {"atol": 1e-5 if golden.meta["model"] == "glscl" else 1e-4, "rtol": 1e-4}


def _by_sim_header(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"agg_module": settings["sim_header"]}


def _clip2video(settings: Mapping[str, Any]) -> dict[str, Any]:
    center_proj = settings["center_proj"] or "plain"
    return {
        "agg_module": "tdb" if settings["temporal_type"] == "TDB" else settings["sim_type"],
        "temporal_proj": settings["temporal_proj"] or "default",
        "center_proj": center_proj if settings["center_type"] == "TAB" else None,
        "center_weight": settings["center_weight"],
    }


def _glscl(settings: Mapping[str, Any]) -> dict[str, Any]:
    same = ("query_share", "cross_att_share", "temp", "alpha", "beta", "loss2_weight")
    agg_module = "meanP" if settings["agg_module"] == "None" else settings["agg_module"]
    return {"agg_module": agg_module} | {name: settings[name] for name in same}


OPTIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "clip4clip": _by_sim_header,
    "xclip": _by_sim_header,
    "clip2video": _clip2video,
    "glscl": _glscl,
}
"""Settings of the official command line -> options of `load_official`."""


def official_model(golden: Golden, **changes: Any) -> RetrievalModel:
    """The model of a case; `changes` are options of `load_official`."""
    family = golden.meta["model"]
    return load_official(golden.below("sd/"), family, **OPTIONS[family](golden.meta) | changes)


def assert_near(found: Tensor, expected: Tensor, what: str, **tolerance: float) -> None:
    """As `torch.testing.assert_close`; what fails is named."""
    torch.testing.assert_close(found, expected, msg=lambda message: f"{what}: {message}", **tolerance)


def check_logits(golden: Golden, model: RetrievalModel) -> None:
    """What evaluation ranks, for each input set."""
    for name in golden.sets():
        logits, _ = run_with_cache(model, golden.batch(name))
        assert_near(logits, golden[f"out/{name}/logits"], name, **logits_tolerance(golden))


def check_intermediates(golden: Golden, name: str, found: Mapping[str, Tensor]) -> None:
    """Every intermediate value of an input set, whatever axes of length 1 it has and whatever its type."""
    for official, expected in golden.below(f"mid/{name}/").items():
        value = found[official].reshape(expected.shape).to(expected.dtype)
        assert_near(value, expected, f"{name}: {official}", **FEATURES)


def check_loss(golden: Golden, model: RetrievalModel) -> dict[str, Tensor]:
    """The loss in training mode without dropout; returns its parts."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parts = model.loss(golden.batch("square"))
    assert_near(parts["loss"], golden["out/train/loss"].reshape(()), "loss", **LOSS)
    return parts


def check_gradients(golden: Golden, model: RetrievalModel, loss: Tensor) -> None:
    """Those stored in full, the first rows of the large ones, the length of each, and who has none."""
    loss.backward()
    gradients = {official_name(name): value.grad for name, value in model.named_parameters()}
    for name, expected in golden.below("grad/").items():
        found = gradients[name]  # of what takes no part a zero may be stored
        assert_near(torch.zeros_like(expected) if found is None else found, expected, name, **GRADIENTS)
    for name, expected in golden.below("grad16/").items():
        assert_near(gradients[name][:16], expected, name, **GRADIENTS)
    lengths = golden.names("gradnorm/names")
    without = golden.names("gradnorm/no_grad_names")
    for name, expected in zip(lengths, golden.arrays.get("gradnorm/values", ()), strict=True):
        assert gradients[name].norm().item() == pytest.approx(expected.item(), rel=1e-3, abs=2e-5), name
    for name in without:
        assert gradients[name] is None, name
    if lengths:
        assert gradients.keys() == {*lengths, *without}
