"""Which videos a model has seen: those it was trained on, and those that chose its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from xclip_lab.atomic import write_text
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.datasets.base import PROTOCOLS
from xclip_lab.errors import CheckpointError

_FILE = "seen_videos.json"

Videos = Mapping[str, Mapping[str, list[str]]]
"""Of each dataset (`place_of`) and split (`split_of`) the ids of its videos."""


@dataclass(frozen=True)
class Seen:
    """Videos that a model was `trained` on, and those that its checkpoint was `selected` by."""

    trained: Videos = field(default_factory=dict)
    selected: Videos = field(default_factory=dict)

    def with_run(self, train: VideoTextDataset, val: VideoTextDataset | None) -> Seen:
        """With the videos of one more training."""
        return Seen(_added(self.trained, train), self.selected if val is None else _added(self.selected, val))


def place_of(dataset: VideoTextDataset) -> str:
    """What tells a dataset from others: ids of own or generated videos mean nothing at another place."""
    return dataset.name if dataset.name in PROTOCOLS else f"{dataset.name} {Path(dataset.root).resolve()}"


def split_of(dataset: VideoTextDataset) -> str:
    """A split with its protocol."""
    return f"{dataset.protocol} {dataset.split}" if dataset.protocol else dataset.split


def write_seen(run_dir: Path, seen: Seen) -> None:
    """Note in a run folder what its model has seen."""
    write_text(run_dir / _FILE, json.dumps(vars(seen)))


def read_seen(run_dir: Path | None) -> Seen | None:
    """What `write_seen` noted, None where nothing is.

    Raises:
        CheckpointError: the note is damaged.
    """
    path = None if run_dir is None else run_dir / _FILE
    if path is None or not path.is_file():
        return None
    try:
        noted = json.loads(path.read_text())
        return Seen(
            *({place: dict(splits) for place, splits in noted[kind].items()} for kind in vars(Seen()))
        )
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged; without it nobody knows which videos the run was trained on"
        ) from error


def _added(videos: Videos, dataset: VideoTextDataset) -> Videos:
    place, split = place_of(dataset), split_of(dataset)
    splits = dict(videos.get(place, {}))
    splits[split] = sorted({*splits.get(split, ()), *dataset.videos})
    return {**videos, place: splits}
