"""ActivityNet Captions (Krishna et al., ICCV 2017) for the retrieval of whole videos by paragraphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from xclip_lab.datasets.base import DATASETS, PROTOCOLS, Family, Known, Protocol, Source, VideoTextDataset
from xclip_lab.datasets.files import LISTS, Ids, Lists, assemble, stem, whole
from xclip_lab.datasets.reading import REMEDY, asked_for, of_kind, read_dict, read_list, texts_of
from xclip_lab.errors import DatasetError

_PREFIX = "v_"

PROTOCOLS["activitynet"] = {
    "standard": Protocol(
        {"train": Known(10_009, 10_009), "test": Known(4917, 4917)},
        {"train": ("train.json", "train_ids.json"), "test": ("val_1.json", "val_ids.json")},
        val_is_test=True,
    )
}


def _prefixed(name: str) -> tuple[str, ...]:
    return (name[len(_PREFIX) :],) if name.startswith(_PREFIX) else ()


def _prefixed_stem(name: str) -> tuple[str, ...]:
    return _prefixed(*stem(name))


_IDS: dict[Family | None, Ids] = {"clip4clip": stem, "xclip": stem, "glscl": _prefixed_stem}


def _listed(path: Path) -> list[str]:
    """The ids of a list, each once, without their `v_` where they have it."""
    return list(dict.fromkeys(name.removeprefix(_PREFIX) for name in texts_of(read_list(path), str(path))))


LISTS["activitynet"] = Lists(
    lambda source, files: _listed(files[1]),
    lambda family: _IDS.get(family, lambda name: (*stem(name), *_prefixed_stem(name))),
    lambda name: (*whole(name), *_prefixed(name)),
)


@DATASETS.register("activitynet")
def activitynet(source: Source) -> VideoTextDataset:
    """Read ActivityNet Captions: all sentences of a video joined to one caption, the video from its start to
    its whole last second, in the order of the list of ids. Ids come without their `v_`, which they may lack
    in the files as well. A listed video without sentences is not in the dataset but in its `without_text`.

    Split `test` is val_1, which all papers report; the official code calls it val.

    Raises:
        DatasetError: missing or malformed files, no such protocol or split.
    """
    protocol, (data_file, ids_file) = asked_for("activitynet", source)
    data = {name.removeprefix(_PREFIX): entry for name, entry in read_dict(data_file).items()}
    listed = _listed(ids_file)
    pairs = []
    spans = {}
    for video in listed:
        if video in data:
            where = f"{data_file}, video {video!r}"
            entry = of_kind(data[video], dict, where)
            pairs.append((video, " ".join(texts_of(entry.get("sentences"), where))))
            spans[video] = (0.0, float(math.ceil(_duration(entry, where))))
    return assemble("activitynet", protocol, source, pairs, listed=listed, spans=spans)


def _duration(entry: dict[str, Any], where: str) -> float:
    seconds = entry.get("duration")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise DatasetError(f"{where}: duration {seconds!r} is not a number of seconds; {REMEDY}")
    return seconds
