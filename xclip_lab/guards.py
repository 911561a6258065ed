"""What makes a number worthless, found before it is computed: test videos in training, unlike protocols."""

from __future__ import annotations

from collections.abc import Mapping

from xclip_lab.datasets import VideoTextDataset
from xclip_lab.datasets.base import PROTOCOLS
from xclip_lab.datasets.overlap import overlap
from xclip_lab.errors import DatasetError, first_few
from xclip_lab.result import Result
from xclip_lab.seen import Seen, Videos, place_of, split_of

_ALIKE = ("dataset", "protocol", "split", "dataset_fingerprint")


def check_training(train: VideoTextDataset, other: VideoTextDataset, allowed: int = 0) -> None:
    """Refuse to train on what is to be validated or tested on: by id and, where the files are, by content.

    Where nobody has divided the samples (`undivided`) nothing is refused, and a line is printed.

    Args:
        allowed: so many videos of `other` may be among those of `train` (`data.allow_overlap`).

    Raises:
        DatasetError: more are; says how many and which.
    """
    shared = overlap(train, other)
    told = f"{shared.total} of the {len(other.videos)} videos of {other.split!r}{_of(other)}"
    where = f"{train.split!r}{_of(train)}"
    if shared.total > allowed and not other.undivided:
        raise DatasetError(
            f"{told} are in {where} too: {shared}; what is measured on them says nothing about unseen "
            f"videos. Take splits that share none, or name the number: data.allow_overlap={shared.total}"
        )
    if shared.total:
        print(f"attention: {told} are in {where} too; this says nothing about unseen videos")


def check_evaluation(seen: Seen | None, dataset: VideoTextDataset, allowed: int = 0) -> dict[str, int | None]:
    """How many videos of a split the model has seen: `trained_on`, `selected_on`; None where not known.

    To evaluate the very split that it was trained on, or that chose its checkpoint, is no mistake: nothing is
    refused then.

    Args:
        allowed: as in `check_training`.

    Raises:
        DatasetError: more than `allowed` in another split.
    """
    if seen is None:
        return {"trained_on": None, "selected_on": None}
    return {
        "trained_on": _count_seen(seen.trained, dataset, allowed, "was trained on"),
        "selected_on": _count_seen(seen.selected, dataset, allowed, "has its checkpoint selected by"),
    }


def _count_seen(videos: Videos, dataset: VideoTextDataset, allowed: int, how: str) -> int | None:
    place = place_of(dataset)
    if videos and place not in videos and dataset.name not in PROTOCOLS:
        return None
    splits = videos.get(place, {})
    known = {video for ids in splits.values() for video in ids}
    shared = [video for video in dataset.videos if video in known]
    if len(shared) > allowed and split_of(dataset) not in splits and not dataset.undivided:
        raise DatasetError(
            f"the model {how} {len(shared)} of the {len(dataset.videos)} videos of "
            f"{dataset.split!r}{_of(dataset)}: {first_few(shared)}; such a number says nothing "
            "about unseen videos. Evaluate another split, or name the number: "
            f"data.allow_overlap={len(shared)}"
        )
    return len(shared)


def known_videos(dataset: VideoTextDataset) -> int | None:
    """How many videos the protocol has in this split, None where that is not known."""
    protocol = PROTOCOLS.get(dataset.name, {}).get(dataset.protocol or "")
    known = protocol and protocol.splits.get(dataset.split)
    return known.videos if known else None


def check_comparable(results: Mapping[str, Result]) -> None:
    """Refuse to put results beside each other that answer different questions, such as VATEX's two protocols.

    Raises:
        DatasetError: another dataset, protocol, split or gallery; says whose.
    """
    names = list(results)
    for name in names[1:]:
        reference, result = results[names[0]], results[name]
        for key in _ALIKE:
            if result.stamp.get(key) != reference.stamp.get(key):
                ours, theirs = (f"{key} {r.stamp.get(key)!r}" for r in (reference, result))
                raise DatasetError(
                    f"{names[0]} has {ours}, {name} has {theirs}: numbers of different protocols or "
                    "galleries never stand beside each other; compare results of one"
                )
        if result.videos != reference.videos or result.captions != reference.captions:
            raise DatasetError(
                f"{names[0]} and {name} have different videos missing, so their numbers are of different "
                "galleries; evaluate both on the same"
            )


def _of(dataset: VideoTextDataset) -> str:
    """The dataset and protocol of a split, where it has one."""
    return f" ({dataset.name}, protocol {dataset.protocol})" if dataset.protocol else ""
