"""One annotation reader a dataset. `load_dataset` finds it by name."""

from __future__ import annotations

from pathlib import Path

from xclip_lab.datasets import folder, synthetic  # noqa: F401  (each enters itself into the registry)
from xclip_lab.datasets.base import DATASETS, Sample, VideoTextDataset
from xclip_lab.errors import DatasetError

__all__ = ["DATASETS", "Sample", "VideoTextDataset", "load_dataset"]


def load_dataset(name: str, split: str, root: str | Path, protocol: str | None = None) -> VideoTextDataset:
    """The annotations of one split.

    Args:
        name: a reader's name. split: `train`, `val` or `test`. root: where the dataset lies.
        protocol: which of a dataset's protocols, None for its usual one.

    Raises:
        ConfigError: no reader of that name. DatasetError: missing or malformed annotations.
    """
    reader = DATASETS[name]
    if not Path(root).exists():
        raise DatasetError(f"dataset {name!r}: {root} does not exist; set data.root to where it lies")
    return reader(Path(root), split, protocol)
