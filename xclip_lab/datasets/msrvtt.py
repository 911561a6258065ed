"""MSR-VTT (Xu et al., CVPR 2016)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xclip_lab.datasets.base import DATASETS, PROTOCOLS, Known, Protocol, Source, VideoTextDataset
from xclip_lab.datasets.files import LISTS, Lists, assemble
from xclip_lab.datasets.reading import asked_for, of_kind, read_dict, read_rows, text_at
from xclip_lab.errors import DatasetError

_DATA = "MSRVTT_data.json"
_TEST = "MSRVTT_JSFUSION_test.csv"
_OWN_NAMES = {"train": "train", "val": "validate", "test": "test"}


def _with_1k_a(train: str, videos: int, aliases: tuple[str, ...] = ()) -> Protocol:
    return Protocol(
        {"train": Known(videos, 20 * videos), "test": Known(1000, 1000)},
        {"train": (_DATA, train), "test": (_TEST,)},
        aliases,
        val_is_test=True,
    )


PROTOCOLS["msrvtt"] = {
    "9k": _with_1k_a("MSRVTT_train.9k.csv", 9000, ("1k-A", "9k/1k-A")),
    "7k": _with_1k_a("MSRVTT_train.7k.csv", 7010, ("7k/1k-A",)),
    "full": Protocol(
        {"train": Known(6513, 130_260), "val": Known(497, 9940), "test": Known(2990, 59_800)},
        dict.fromkeys(("train", "val", "test"), (_DATA,)),
    ),
}


def _listed(source: Source, files: tuple[Path, ...], data: dict[str, Any] | None = None) -> list[str]:
    """The ids of the split's own table where there is one, else what the JSON says of each video.

    Args:
        data: the JSON, if it was read.
    """
    full = source.root / f"MSRVTT_{source.split}.full.csv"
    table = files[-1] if files[-1].name != _DATA else full
    if table != full or full.exists():
        return _ids(table)
    own = _OWN_NAMES[source.split]
    videos = _entries(read_dict(files[0]) if data is None else data, "videos", files[0])
    return [
        text_at(video, "video_id", f"{files[0]}, video {number}")
        for number, video in enumerate(videos)
        if text_at(video, "split", f"{files[0]}, video {number}") == own
    ]


LISTS["msrvtt"] = Lists(_listed)


@DATASETS.register("msrvtt")
def msrvtt(source: Source) -> VideoTextDataset:
    """Read MSR-VTT. Protocols: `9k` (usual) and `7k` train on 9,000 and on 7,010 videos with 20 captions each
    and test on the 1,000 pairs of 1k-A; `full` are the official splits, every caption of a video in its test.
    Train-9k holds 1,990 of the 2,990 test videos of `full`: never go from one to the other.

    Captions stand in the order of `MSRVTT_data.json`, those of 1k-A in that of its table.

    Raises:
        DatasetError: missing or malformed files, no such protocol or split.
    """
    protocol, files = asked_for("msrvtt", source)
    if files[0].name == _TEST:
        return assemble("msrvtt", protocol, source, _test_pairs(files[0]))
    data = read_dict(files[0])
    listed = _listed(source, files, data)
    wanted = frozenset(listed)
    pairs = []
    for number, entry in enumerate(_entries(data, "sentences", files[0])):
        where = f"{files[0]}, sentence {number}"
        if (video := text_at(entry, "video_id", where)) in wanted:
            pairs.append((video, text_at(entry, "caption", where, blank=True)))
    return assemble("msrvtt", protocol, source, pairs, listed=listed)


def _test_pairs(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for where, row in read_rows(path, ("video_id", "sentence"), "key,vid_key,video_id,sentence"):
        if not row["video_id"].strip() or not row["sentence"].strip():
            raise DatasetError(
                f"{where}: the video_id or the sentence is empty; remove the line or fill it in"
            )
        pairs.append((row["video_id"].strip(), row["sentence"]))
    return pairs


def _ids(path: Path) -> list[str]:
    return list(
        dict.fromkeys(row["video_id"].strip() for _, row in read_rows(path, ("video_id",), "video_id"))
    )


def _entries(data: dict[str, object], key: str, path: Path) -> list[object]:
    return of_kind(data.get(key), list, f"{path}, {key!r}")
