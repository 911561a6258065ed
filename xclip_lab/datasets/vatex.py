"""VATEX (Wang et al., ICCV 2019), its English captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xclip_lab.datasets.base import DATASETS, PROTOCOLS, Known, Protocol, Source, VideoTextDataset
from xclip_lab.datasets.files import LISTS, Lists, assemble
from xclip_lab.datasets.reading import (
    asked_for,
    listed_entry,
    of_kind,
    read_ids,
    read_json,
    text_at,
    texts_of,
)

_DATA = "vatex_data.json"
_TRAIN = Known(25_991, 259_910)
_HELD_OUT = Known(1500, 15_000)

PROTOCOLS["vatex"] = {
    "hgr": Protocol(
        {"train": _TRAIN, "val": _HELD_OUT, "test": _HELD_OUT},
        {split: (f"{split}_list.txt", _DATA) for split in ("train", "val", "test")},
    ),
    "random-1k5": Protocol(
        {"train": _TRAIN, "test": _HELD_OUT},
        {"train": ("train_list.txt", _DATA), "test": ("test1k5_sec_list.txt", _DATA)},
        aliases=("1k5",),
        lacks="776 videos of its test are in the val of 'hgr', which therefore is not its own",
    ),
}
LISTS["vatex"] = Lists(lambda source, files: read_ids(files[0]))


@DATASETS.register("vatex")
def vatex(source: Source) -> VideoTextDataset:
    """Read VATEX: the ten English captions of each video, in training and in testing, in the order of the
    split's list. Protocols: `hgr` (usual), the split of HGR (Chen et al., CVPR 2020); `random-1k5`, whose
    test shares 776 videos with the val and 724 with the test of `hgr`: never compare across the two.

    Raises:
        DatasetError: missing or malformed files, a listed video without captions, no such protocol or split.
    """
    protocol, (list_file, data_file) = asked_for("vatex", source)
    data = _records(data_file)
    pairs = []
    listed = read_ids(list_file)
    for video in listed:
        entry, where = listed_entry(data, video, data_file, list_file)
        captions = texts_of(of_kind(entry, dict, where).get("enCap"), f"{where}, 'enCap'")
        pairs += [(video, caption) for caption in captions]
    return assemble("vatex", protocol, source, pairs, listed=listed)


def _records(path: Path) -> dict[str, Any]:
    """The record of each video by its id: CLIP2Video's dictionary, or a list of records with their `videoID`,
    as the makers publish them."""
    data = read_json(path)
    if isinstance(data, list):
        data = {text_at(each, "videoID", f"{path}, entry {row}"): each for row, each in enumerate(data)}
    return of_kind(data, dict, str(path))
