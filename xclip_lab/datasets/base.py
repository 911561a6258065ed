"""What every annotation reader returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xclip_lab.registry import Registry


@dataclass(frozen=True)
class Sample:
    """One caption of one video. `start` and `end` are seconds, None for the whole file. `path` may be str."""

    video_id: str
    caption: str
    start: float | None = None
    end: float | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))


@dataclass(frozen=True)
class VideoTextDataset:
    """The annotations of one split, no pixels.

    Attributes:
        samples: one per caption, in the protocol's order.
        videos: the gallery, one id per video, in the order of its first caption.
        text_to_video: `[T]`, for each caption the row of its video in `videos`.
        groups: `[T]`, captions that differ in one respect only share a number (generated clips), else None.
    """

    name: str
    split: str
    root: Path
    samples: list[Sample]
    protocol: str | None = None
    groups: np.ndarray | None = None
    videos: list[str] = field(init=False)
    text_to_video: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rows: dict[str, int] = {}
        index = [rows.setdefault(sample.video_id, len(rows)) for sample in self.samples]
        object.__setattr__(self, "videos", list(rows))
        object.__setattr__(self, "text_to_video", np.asarray(index, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.samples)

    def video_samples(self) -> list[Sample]:
        """The first sample of each video, in the order of `videos`: where its file and times stand."""
        first: dict[str, Sample] = {}
        for sample in self.samples:
            first.setdefault(sample.video_id, sample)
        return list(first.values())


Reader = Callable[[Path, str, str | None], VideoTextDataset]
DATASETS: Registry[Reader] = Registry("dataset")
