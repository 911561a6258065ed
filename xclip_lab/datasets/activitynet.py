"""ActivityNet Captions (Krishna et al., ICCV 2017) for the retrieval of whole videos by paragraphs."""

from __future__ import annotations

import math
from typing import Any

from xclip_lab.datasets.base import DATASETS, PROTOCOLS, Family, Known, Protocol, Source, VideoTextDataset
from xclip_lab.datasets.files import Ids, assemble, stem, whole
from xclip_lab.datasets.reading import REMEDY, asked_for, of_kind, read_json, texts_of
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


@DATASETS.register("activitynet")
def activitynet(source: Source) -> VideoTextDataset:
    """Read ActivityNet Captions: all sentences of a video joined to one caption, the video from its start to
    its whole last second, in the order of the list of ids. Ids come without their `v_`. A listed video
    without sentences is not in the dataset but in its `without_text`.

    Split `test` is val_1, which all papers report; the official code calls it val.

    Raises:
        DatasetError: missing or malformed files, no such protocol or split.
    """
    protocol, (data_file, ids_file) = asked_for("activitynet", source)
    data = read_json(data_file, dict)
    listed = dict.fromkeys(texts_of(read_json(ids_file, list), str(ids_file)))
    pairs = []
    spans = {}
    for full_id in listed:
        if full_id in data:
            video = full_id[len(_PREFIX) :]
            where = f"{data_file}, video {full_id!r}"
            entry = of_kind(data[full_id], dict, where)
            pairs.append((video, " ".join(texts_of(entry.get("sentences"), where))))
            spans[video] = (0.0, float(math.ceil(_duration(entry, where))))
    return assemble(
        "activitynet",
        protocol,
        source,
        pairs,
        listed=(full_id[len(_PREFIX) :] for full_id in listed),
        spans=spans,
        ids=_IDS.get(source.family, lambda name: (*stem(name), *_prefixed_stem(name))),
        folder_ids=lambda name: (*whole(name), *_prefixed(name)),
    )


def _duration(entry: dict[str, Any], where: str) -> float:
    seconds = entry.get("duration")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise DatasetError(f"{where}: duration {seconds!r} is not a number of seconds above 0; {REMEDY}")
    return seconds
