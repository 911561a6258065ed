"""Every parameter starts as the official constructor leaves it when given bare CLIP weights."""

from __future__ import annotations

import json

import pytest
import torch

from tests.shared import golden_paths
from xclip_lab.families import tower_sizes
from xclip_lab.config import config_from_dict, to_dict
from xclip_lab.model import create_model, official_name

FILES = golden_paths("init_xclip.json")
CASES = [pytest.param(path, case, id=case) for path in FILES for case in json.loads(path.read_text())]


@pytest.mark.parametrize(("path", "case"), CASES)
def test_sources(path, case, tmp_path):
    expected = json.loads(path.read_text())[case]
    config = expected["config"]
    torch.manual_seed(0)
    shapes = {name: torch.empty(shape) for name, shape in expected["shapes"].items()}
    clip = {
        name.removeprefix("clip."): torch.randn(value.shape)
        for name, value in shapes.items()
        if name.startswith("clip.")
    }
    torch.save(clip, tmp_path / "clip.pt")
    model = create_model(
        config_from_dict(
            {
                "towers": {
                    "name": None,
                    "architecture": to_dict(tower_sizes(shapes)),
                    "pretrained": str(tmp_path / "clip.pt"),
                },
                "temporal": {"agg_module": config["sim_header"], "layers": config["cross_num_hidden_layers"]},
                "max_words": config["max_words"],
                "max_frames": config["max_frames"],
            }
        )
    )
    parameters = {official_name(name): value for name, value in model.named_parameters()}
    assert {name: list(value.shape) for name, value in parameters.items()} == expected["shapes"]
    assert sum(value.numel() for value in parameters.values()) == expected["parameter_count"]
    assert [name for name, value in parameters.items() if not value.requires_grad] == expected[
        "requires_grad_false"
    ]
    for name, source in expected["params"].items():
        check_source(name, parameters[name].detach(), source, clip)


def check_source(name, value, source, clip):
    if source.startswith("clip:"):
        assert torch.equal(value, clip[source.removeprefix("clip:")]), name
    elif source == "eye":
        assert torch.equal(value, torch.eye(len(value))), name
    elif source == "zeros":
        assert not value.any(), name
    elif source == "ones":
        assert (value == 1).all(), name
    else:
        words = source.split()
        statistics = dict(zip(words[1::2], map(float, words[2::2]), strict=True))
        assert value.mean().item() == pytest.approx(statistics["mean"], abs=0.02), name
        assert value.std().item() == pytest.approx(statistics["std"], rel=0.2), name
        assert value.min().item() == pytest.approx(statistics["min"], rel=0.1), name
        assert value.max().item() == pytest.approx(statistics["max"], rel=0.1), name
