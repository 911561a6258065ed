"""Reading the official code's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.shared import golden_paths
from xclip_lab import Batch


class Golden:
    """`.npz` files of reference numbers: `golden["in/square/video"]` is a tensor."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays

    @classmethod
    def read(cls, path: Path) -> Golden:
        with np.load(path, allow_pickle=False) as archive:
            return cls({key: archive[key] for key in archive.files})

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

    def names(self, key: str) -> list[str]:
        """A stored list of names; without any, one empty name is stored."""
        return [str(name) for name in self.arrays.get(key, ()) if name]

    def sets(self) -> list[str]:
        """The names of the input sets."""
        return sorted({key.split("/")[1] for key in self.arrays if key.startswith("in/")})

    def batch(self, name: str) -> Batch:
        """An input set."""
        inputs = self.below(f"in/{name}/")
        return Batch(inputs["input_ids"], inputs["attention_mask"], inputs["video"], inputs["video_mask"])

    def variant(self, name: str) -> Golden:
        """Another setting with the same weights and inputs, whose numbers lie one name deeper: of
        `out/s10/square/logits` and `grad/s10/noun_queries` the variant `s10` has `out/square/logits` and
        `grad/noun_queries`. The empty name is what lies at the top."""
        shared = {key: self.arrays[key] for key in self.arrays if key.startswith(("sd/", "in/", "meta"))}
        depths = {"mid": 3, "out": 3, "grad": 2, "grad16": 2, "gradnorm": 2}
        for key, value in self.arrays.items():
            kind, *rest = key.split("/")
            if kind in depths and len(rest) == depths[kind] - (not name) and (not name or rest[0] == name):
                shared["/".join([kind, *rest[bool(name) :]])] = value
        return Golden(shared)


def model_cases(family: str) -> list[Path]:
    """The files of a family that hold a model."""
    return [path for path in golden_paths(f"{family}_*.npz") if any("sd/" in key for key in keys(path))]


def keys(path: Path) -> list[str]:
    """What a file holds, without reading it."""
    with np.load(path, allow_pickle=False) as archive:
        return archive.files
