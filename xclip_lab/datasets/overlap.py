"""Videos that two splits share: by id, and by the content of their files."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xclip_lab.datasets.base import Sample, VideoTextDataset
from xclip_lab.errors import first_few
from xclip_lab.frame_folder import NOTE_FILE


class Overlap(NamedTuple):
    """What the second of two splits shares with the first: videos by `ids`, and `twins`, which have the same
    content under another id: theirs, and the one in the first split."""

    ids: list[str]
    twins: dict[str, str]

    @property
    def total(self) -> int:
        return len(self.ids) + len(self.twins)

    def __str__(self) -> str:
        names = [*self.ids, *(f"{video} (the file of {twin})" for video, twin in self.twins.items())]
        return first_few(names)


def overlap(
    one: VideoTextDataset, other: VideoTextDataset, contents: Mapping[Path, Any] | None = None
) -> Overlap:
    """The videos of `other` that are in `one` too. Stretches of a file that do not meet are different videos.

    Args:
        contents: of each file that may have a twin what its content is told by; None reads them here and now.
    """
    if contents is None:
        sizes = [
            {s.path: size_of(s.path) for s in of.video_samples() if s.path is not None} for of in (one, other)
        ]
        shared = set(sizes[0].values()) & set(sizes[1].values()) - {0}
        contents = {path: digest(path) for of in sizes for path, size in of.items() if size in shared}
    ids = set(one.videos) & set(other.videos)
    mine: dict[Any, list[Sample]] = {}
    for sample in one.video_samples():
        mine.setdefault(contents.get(sample.path, sample.path), []).append(sample)  # type: ignore[arg-type]
    twins: dict[str, str] = {}
    for sample in other.video_samples():
        if sample.path is not None and sample.video_id not in ids:
            alike = mine.get(contents.get(sample.path, sample.path), [])
            twin = next((twin.video_id for twin in alike if _meet(sample, twin)), None)
            twins |= {} if twin is None else {sample.video_id: twin}
    return Overlap([video for video in other.videos if video in ids], twins)


def of_equal_size(paths: Iterable[Path]) -> list[Path]:
    """The videos that may have the same content as another one."""
    sizes = {path: size_of(path) for path in paths}
    shared = Counter(sizes.values())
    return [path for path, size in sizes.items() if size and shared[size] > 1]


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder; 0 where nothing is there."""
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                return sum(entry.stat().st_size for entry in entries)
        return path.stat().st_size
    except OSError:
        return 0


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder of frames, of all that decides what it shows."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    told = hashlib.sha256()
    rate = path.parent / NOTE_FILE
    for entry in [*sorted(path.iterdir()), *([rate] if rate.is_file() else [])]:
        told.update(f"{entry.name}/{entry.stat().st_size}/".encode(errors="surrogateescape"))
        told.update(entry.read_bytes())
    return told.hexdigest()


def _meet(one: Sample, other: Sample) -> bool:
    start = max(one.start or 0.0, other.start or 0.0)
    return start < min(one.end or math.inf, other.end or math.inf)
