"""What makes a number worthless, found before it is computed: test videos in training, unlike protocols."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from xclip_lab.atomic import write_text
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.datasets.overlap import overlap
from xclip_lab.errors import CheckpointError, DatasetError
from xclip_lab.result import Result

TRAINED_ON = "train_videos.json"
_ALIKE = ("dataset", "protocol", "split", "dataset_fingerprint")

TrainedOn = Mapping[str, Mapping[str, list[str]]]
"""Of each dataset and split the ids of the videos that a model was trained on."""


def check_training(train: VideoTextDataset, others: Iterable[VideoTextDataset], allowed: int = 0) -> None:
    """Refuse to train on what is to be validated or tested on: by id and, where the files are, by content.

    Where nobody has divided the samples (`undivided`), or validation is on the training split by its name,
    nothing is refused, and a line is printed.

    Args:
        allowed: so many videos of each of `others` may be among those of `train` (`data.allow_overlap`).

    Raises:
        DatasetError: more are; says how many and which.
    """
    for other in others:
        shared = overlap(train, other)
        told = f"{shared.total} of the {len(other.videos)} videos of {other.split!r}{_of(other)}"
        where = f"{train.split!r}{_of(train)}"
        named = (other.split, other.protocol) == (train.split, train.protocol)
        if shared.total > allowed and not (named or other.undivided):
            raise DatasetError(
                f"{told} are in {where} too: {shared}; what is measured on them says nothing about unseen "
                f"videos. Take splits that share none, or name the number: data.allow_overlap={shared.total}"
            )
        if shared.total:
            print(f"attention: {told} are in {where} too; this says nothing about unseen videos")


def check_evaluation(trained_on: TrainedOn | None, dataset: VideoTextDataset, allowed: int = 0) -> int | None:
    """How many videos of a split the model was trained on; None where that is not known.

    To evaluate the very split that it was trained on is no mistake: nothing is refused then.

    Args:
        allowed: as in `check_training`.

    Raises:
        DatasetError: more than `allowed`.
    """
    if trained_on is None:
        return None
    splits = trained_on.get(dataset.name, {})
    seen = set().union(*splits.values())
    shared = [video for video in dataset.videos if video in seen]
    if len(shared) > allowed and dataset.split not in splits and not dataset.undivided:
        more = ", ..." if len(shared) > 5 else ""
        raise DatasetError(
            f"the model was trained on {len(shared)} of the {len(dataset.videos)} videos of "
            f"{dataset.split!r}{_of(dataset)}: {', '.join(shared[:5])}{more}; such a number says nothing "
            "about unseen videos. Evaluate another split, or name the number: "
            f"data.allow_overlap={len(shared)}"
        )
    return len(shared)


def check_comparable(results: Mapping[str, Result]) -> None:
    """Refuse to put results beside each other that answer different questions, such as VATEX's two protocols.

    Raises:
        DatasetError: another dataset, protocol, split or gallery; says whose.
    """
    (first, reference), *rest = results.items()
    for name, result in rest:
        for key in _ALIKE:
            if result.stamp[key] != reference.stamp[key]:
                ours, theirs = (f"{key} {r.stamp[key]!r}" for r in (reference, result))
                raise DatasetError(
                    f"{first} has {ours}, {name} has {theirs}: numbers of different protocols or galleries "
                    "never stand beside each other; compare results of one"
                )
        if result.videos != reference.videos or result.captions != reference.captions:
            raise DatasetError(
                f"{first} and {name} have different videos missing, so their numbers are of different "
                "galleries; evaluate both on the same"
            )


def record_training(run_dir: Path, train: VideoTextDataset, before: TrainedOn | None) -> None:
    """Note in a run folder what its model is trained on, with what it was trained on `before`."""
    trained_on = {name: dict(splits) for name, splits in (before or {}).items()}
    splits = trained_on.setdefault(train.name, {})
    splits[train.split] = sorted({*splits.get(train.split, ()), *train.videos})
    write_text(run_dir / TRAINED_ON, json.dumps(trained_on))


def read_training(run_dir: Path | None) -> TrainedOn | None:
    """What `record_training` noted, None where nothing is.

    Raises:
        CheckpointError: the note is damaged.
    """
    path = None if run_dir is None else run_dir / TRAINED_ON
    if path is None or not path.is_file():
        return None
    try:
        return {name: dict(splits) for name, splits in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged; without it nobody knows which videos the run was trained on"
        ) from error


def _of(dataset: VideoTextDataset) -> str:
    """The dataset and protocol of a split, where it has one."""
    return f" ({dataset.name}, protocol {dataset.protocol})" if dataset.protocol else ""
