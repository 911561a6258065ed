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
    """One `.npz` of reference numbers: `golden["in/square/video"]` is a tensor."""

    def __init__(self, source: Path | Mapping[str, np.ndarray]) -> None:
        if isinstance(source, Path):
            with np.load(source, allow_pickle=False) as archive:
                source = {key: archive[key] for key in archive.files}
        self.arrays = source

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
        """A list of names. An empty one is stored as one empty name, or not at all."""
        return [str(name) for name in self.arrays.get(key, ()) if name]

    def sets(self) -> list[str]:
        """The names of the input sets."""
        return sorted({key.split("/")[1] for key in self.arrays if key.startswith("in/")})

    def batch(self, name: str) -> Batch:
        """An input set."""
        inputs = self.below(f"in/{name}/")
        return Batch(inputs["input_ids"], inputs["attention_mask"], inputs["video"], inputs["video_mask"])

    def variants(self) -> list[str]:
        """Other settings of the same weights, whose numbers lie one name deeper: `out/s10/square/logits`."""
        return sorted(
            {key.split("/")[1] for key in self.arrays if key.startswith("out/") and key.count("/") == 3}
        )

    def variant(self, name: str | None) -> Golden:
        """The numbers of one of the variants, or of none of them, as if there were no others."""
        variants, chosen = self.variants(), {}
        for key, value in self.arrays.items():
            kind, _, rest = key.partition("/")
            first, _, deeper = rest.partition("/")
            if kind in ("sd", "in", "meta") or (name is None and first not in variants):
                chosen[key] = value
            elif first == name:
                chosen[f"{kind}/{deeper}"] = value
        return Golden(chosen)


def model_cases(family: str = "*") -> list[Path]:
    """The files of a family, or of all, that hold a model."""
    return [path for path in golden_paths(f"{family}_*.npz") if any("sd/" in key for key in keys(path))]


def keys(path: Path) -> list[str]:
    """What a file holds, without reading it."""
    with np.load(path, allow_pickle=False) as archive:
        return archive.files
