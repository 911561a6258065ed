"""One annotation reader a dataset. `load_dataset` finds it by name."""

from __future__ import annotations

import os
from pathlib import Path

from xclip_lab.datasets import (  # noqa: F401  (each enters itself into the registry)
    activitynet,
    didemo,
    folder,
    lsmdc,
    msrvtt,
    msvd,
    synthetic,
    vatex,
)
from xclip_lab.datasets.base import DATASETS, FAMILY_NAMES, Family, Sample, Source, VideoTextDataset
from xclip_lab.datasets.reading import own_name
from xclip_lab.errors import ConfigError, DatasetError
from xclip_lab.registry import did_you_mean

__all__ = ["DATASETS", "Sample", "VideoTextDataset", "load_dataset"]


def load_dataset(
    name: str,
    split: str,
    root: str | Path,
    protocol: str | None = None,
    *,
    videos: str | Path | None = None,
    family: Family | None = None,
) -> VideoTextDataset:
    """The annotations of one split.

    Args:
        name: a reader's name. split: `train`, `val` or `test`; where the papers validate on the test split
            and call it `val`, the dataset comes by its own name. root: where the annotations lie.
        protocol: which of a dataset's protocols, None for its usual one.
        videos: where the videos lie, None for below `root`. family: see `Source`.

    Raises:
        ConfigError: no reader or family of that name. DatasetError: missing or malformed annotations.
    """
    check_place(name, root, videos, family)
    split = own_name(name, split, protocol)
    place = None if videos is None else Path(videos)
    return DATASETS[name](Source(Path(root), split, protocol, place, family))


def check_place(
    name: str, root: str | Path, videos: str | Path | None = None, family: Family | None = None
) -> None:
    """Refuse a dataset or family that nobody reads, and folders that are not there.

    Raises:
        ConfigError, DatasetError: as `load_dataset`.
    """
    DATASETS[name]  # raises where there is none of that name
    if family is not None and family not in FAMILY_NAMES:
        known = ", ".join(FAMILY_NAMES)
        raise ConfigError(f"unknown family {family!r}{did_you_mean(family, FAMILY_NAMES)} (known: {known})")
    for key, place in (("root", root), ("videos", root if videos is None else videos)):
        if not os.path.exists(place):
            raise DatasetError(
                f"dataset {name!r}: {place} does not exist; give its place (data.{key}; `data check --{key}`)"
            )
