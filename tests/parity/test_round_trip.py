"""An official file becomes a model and a file again, bit for bit and in its order, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.golden import model_cases
from xclip_lab import load_official, save_official


@pytest.mark.parametrize("path", model_cases(), ids=lambda path: path.stem)
def test_round_trip(golden, tmp_path):
    """Twice; also with the towers' matrices in half precision. Without options: the keys tell all."""
    family, file, whole = golden.meta["model"], tmp_path / "pytorch_model.bin.0", golden.below("sd/")
    half = {
        name: value.half() if name.startswith("clip.") and value.ndim > 1 else value
        for name, value in whole.items()
    }
    for state in (whole, half):
        source: Path | dict[str, Tensor] = state
        for _ in range(2):
            save_official(load_official(source, family), file)
            again = torch.load(file, weights_only=True)
            assert list(again) == list(state)
            for name, value in state.items():
                assert again[name].dtype == value.dtype, name
                assert torch.equal(again[name], value), name
            source = file
