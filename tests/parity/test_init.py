"""Every parameter starts as the official constructor leaves it when given bare CLIP weights."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import groupby

import pytest
import torch

from tests.parity.families import OPTIONS
from tests.shared import golden_paths
from xclip_lab.families import FAMILIES
from xclip_lab.model import create_model, official_name

FILES = {path.stem.removeprefix("init_"): path for path in golden_paths("init_*.json")}
CASES = [(family, case) for family, path in FILES.items() for case in json.loads(path.read_text())]
NOT_LOADED = {
    # The official code drops CLIP's table when the vocabulary is not CLIP's own, and these models are tiny.
    "clip2video": {"clip.token_embedding.weight"},
}
MIDDLE = "placed at time index 1 of 3, zeros elsewhere"


@pytest.mark.parametrize(("family", "case"), CASES)
def test_sources(family, case, tmp_path):
    expected = json.loads(FILES[family].read_text())[case]
    torch.manual_seed(0)
    shapes = {name: torch.empty(shape) for name, shape in expected["shapes"].items()}
    clip = {
        name.removeprefix("clip."): torch.randn(value.shape)
        for name, value in shapes.items()
        if name.startswith("clip.") and "conv2" not in name  # which is the 3D patch, no part of CLIP
    }
    torch.save(clip, tmp_path / "clip.pt")
    config = FAMILIES[family](shapes, OPTIONS[family](expected["config"]))
    towers = dataclasses.replace(config.towers, pretrained=str(tmp_path / "clip.pt"))
    model = create_model(dataclasses.replace(config, towers=towers))

    parameters = {official_name(name): value for name, value in model.named_parameters()}
    assert {name: list(value.shape) for name, value in parameters.items()} == expected["shapes"]
    assert sum(value.numel() for value in parameters.values()) == expected["parameter_count"]
    frozen = [name for name, value in parameters.items() if not value.requires_grad]
    assert frozen == expected["requires_grad_false"]
    for name, source in expected["params"].items():
        if name not in NOT_LOADED.get(family, ()):
            check_source(name, parameters[name].detach(), source, clip)
    random = {name: parameters[name] for name, source in expected["params"].items() if "random" in source}
    assert identical(random) == {frozenset(names) for names in expected["identical_random_groups"]}


def check_source(name, value, source, clip):
    if source.startswith("clip:"):
        assert torch.equal(value, taken_from_clip(source.removeprefix("clip:"), clip)), name
    elif source == "eye":
        assert torch.equal(value, torch.eye(len(value))), name
    elif source == "zeros":
        assert not value.any(), name
    elif source == "ones":
        assert (value == 1).all(), name
    else:
        words = source.split()
        check_distribution(name, value, dict(zip(words[1::2], map(float, words[2::2]), strict=True)))


def taken_from_clip(source, clip):
    """`positional_embedding[0:2]` is rows of a tensor; a 3D patch is a 2D one between zeros."""
    key, first, last, rest = re.fullmatch(r"([\w.]+)(?:\[(\d+):(\d+)\])? ?(.*)", source).groups()
    value = clip[key] if first is None else clip[key][int(first) : int(last)]
    if not rest:
        return value
    assert rest == MIDDLE
    return torch.stack([torch.zeros_like(value), value, torch.zeros_like(value)], dim=2)


def check_distribution(name, value, official):
    """Mean and deviation to five standard errors of two samples. A uniform distribution has ends, which n
    values come near to about 3.5 deviations / n; a normal one has some values beyond them."""
    count, mean, std = value.numel(), official["mean"], official["std"]
    assert value.mean().item() == pytest.approx(mean, abs=5 * std * (2 / count) ** 0.5), name
    assert value.std().item() == pytest.approx(std, rel=5 / count**0.5, abs=1e-4), name
    ends = {"min": value.min().item(), "max": value.max().item()}
    if max(abs(official[end] - mean) for end in ends) > 2 * std:
        assert 1.8 < (value - value.mean()).abs().max() / value.std() < 6, name
    else:
        slack = (0.05 + 25 / count) * std  # 0.05: the official ends are rounded
        assert ends == pytest.approx({end: official[end] for end in ends}, abs=slack), name


def identical(parameters):
    """The names of those that hold the same numbers, where two or more do."""
    contents = sorted((value.detach().numpy().tobytes(), name) for name, value in parameters.items())
    groups = (frozenset(name for _, name in same) for _, same in groupby(contents, key=lambda item: item[0]))
    return {group for group in groups if len(group) > 1}
