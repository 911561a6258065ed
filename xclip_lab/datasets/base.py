"""What every annotation reader returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from xclip_lab.errors import DatasetError
from xclip_lab.registry import Registry

Family = Literal["clip4clip", "xclip", "clip2video", "glscl"]
FAMILY_NAMES = get_args(Family)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """What a reader is asked for.

    Attributes:
        root: where the annotation files lie. split: `train`, `val` or `test`.
        protocol: one of `PROTOCOLS`, None for the usual one.
        videos: where the video files or folders of frames lie; None: below `root`.
        family: whose official loader's rules hold where the families differ (names of files, clips that one
            of them leaves out); None: every file name that any of them accepts, and nothing left out.
    """

    root: Path
    split: str
    protocol: str | None = None
    videos: Path | None = None
    family: Family | None = None


@dataclass(frozen=True)
class Sample:
    """One caption of one video. `start` and `end` are seconds, None for the whole file. `path` is the video
    file or a folder of its frames (may be given as str), None where none was found."""

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

    Raises:
        DatasetError: an id or a caption that is no text, such as half a pair of surrogates in JSON.

    Attributes:
        samples: one per caption, in the protocol's order.
        videos: the gallery, one id per video, in the order of its first caption.
        text_to_video: `[T]`, for each caption the row of its video in `videos`.
        groups: `[T]`, captions that differ in one respect only share a number (generated clips), else None.
        undivided: every split of it has all samples: nobody has said which are for testing.
        without_text: videos that the split lists and that have no caption: they are not in `videos`.
    """

    name: str
    split: str
    root: Path
    samples: list[Sample]
    protocol: str | None = None
    groups: np.ndarray | None = None
    undivided: bool = False
    without_text: tuple[str, ...] = ()
    videos: list[str] = field(init=False)
    text_to_video: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for sample in self.samples:
            _check_text(sample, self.root)
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


def _check_text(sample: Sample, root: Path) -> None:
    try:
        f"{sample.video_id}{sample.caption}".encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{root}: video {sample.video_id!r}, caption {sample.caption[:80]!r}: its id or caption holds "
            f"{error.object[error.start]!a}, which is no text; type it anew"
        ) from error


def one_caption_each(
    dataset: VideoTextDataset, below: Callable[[int], int], videos: Sequence[str] | None = None
) -> list[int]:
    """One caption drawn for each video: the official training without `expand_sentences`.

    Args:
        below: draws a whole number of `[0, n)` for a given n: `random.Random(seed).randrange` draws as the
            official code does, `lambda n: int(generator.integers(n))` does as well.
        videos: which videos and in what order they are drawn for, None for all as they stand in `videos`.

    Returns:
        Rows of `samples`, one a video.
    """
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(dataset.samples):
        rows.setdefault(sample.video_id, []).append(row)
    chosen = [rows[video] for video in (dataset.videos if videos is None else videos)]
    return [captions[below(len(captions))] for captions in chosen]


@dataclass(frozen=True)
class Known:
    """How many videos with captions, and how many captions, a split has where its files are complete; None
    where that is not known."""

    videos: int | None
    captions: int | None


@dataclass(frozen=True)
class Protocol:
    """One way to use a dataset.

    Attributes:
        splits: what is known of each split that it has, in the order train, val, test.
        files: the annotation files of each split, relative to `root`.
        aliases: other names that it goes by.
        val_is_test: the official code validates on the test split, and calls that `val`. A reader gives it by
            its own name, `test`, so that a stamp says what selected a checkpoint.
        lacks: why it lacks a split, where that wants a word.
    """

    splits: dict[str, Known]
    files: dict[str, tuple[str, ...]]
    aliases: tuple[str, ...] = ()
    val_is_test: bool = False
    lacks: str = ""


PROTOCOLS: dict[str, dict[str, Protocol]] = {}
"""Of each public dataset its protocols by name, the usual one first. Readers fill it."""

Reader = Callable[[Source], VideoTextDataset]
DATASETS: Registry[Reader] = Registry("dataset")
