"""Reading the official code's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Golden:
    """One `.npz` of reference numbers: `golden["in/square/video"]` is a tensor."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as archive:
            self.arrays = {key: archive[key] for key in archive.files}

    @property
    def meta(self) -> dict:
        return json.loads(str(self.arrays["meta"]))

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def below(self, prefix: str) -> dict[str, Tensor]:
        """All arrays whose key starts with `prefix`, by the rest of the key."""
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}

    def sets(self) -> list[str]:
        """The names of the input sets."""
        return sorted({key.split("/")[1] for key in self.arrays if key.startswith("in/")})
