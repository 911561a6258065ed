"""Where the videos of a public dataset lie: one walk through their folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from xclip_lab.datasets.base import PROTOCOLS, Family, Sample, Source, VideoTextDataset
from xclip_lab.datasets.reading import REMEDY, asked_for
from xclip_lab.errors import DatasetError
from xclip_lab.frame_folder import IMAGE_SUFFIXES

# What lies beside videos and may bear their names. Not a list of what videos are: DiDeMo's names end in all
# sorts of things, and in nothing.
_OTHERS = (
    "json jsonl csv tsv txt md pkl pickle npy npz pt pth h5 hdf5 lmdb yaml yml xml srt vtt "
    "wav mp3 m4a aac flac zip tar gz part tmp log db ini py"
)
_NO_VIDEO = IMAGE_SUFFIXES | {f".{suffix}" for suffix in _OTHERS.split()}
_PEEK = 32
"""How many entries of a folder tell whether it holds frames: more are not looked at."""
_FEW_FRAMES = 5
"""CLIP2Video passes over folders with so few frames."""

Ids = Callable[[str], tuple[str, ...]]
"""Which ids a file of some name may belong to, the likeliest first."""


def stem(name: str) -> tuple[str, ...]:
    """The name without what follows its last dot.

    >>> stem("fff.x_3_6.avi")
    ('fff.x_3_6',)
    """
    return (os.path.splitext(name)[0],)


def whole(name: str) -> tuple[str, ...]:
    """The name as it is."""
    return (name,)


@dataclass(frozen=True)
class Lists:
    """What a public dataset says of its videos without its captions.

    Attributes:
        read: the ids that a split lists, from these annotation files of it.
        ids: for each family, and None, which ids a file may belong to by its name; folder_ids: which a folder
            of frames.
    """

    read: Callable[[Source, tuple[Path, ...]], list[str]]
    ids: Callable[[Family | None], Ids] = lambda family: stem
    folder_ids: Ids = whole


LISTS: dict[str, Lists] = {}
"""Of each public dataset. Readers fill it."""


def listed_ids(name: str, source: Source) -> list[str]:
    """The ids that a split lists, each once. Captions need not be there.

    Raises:
        DatasetError: missing or malformed lists, no such protocol or split.
    """
    _, files = asked_for(name, source)
    return list(dict.fromkeys(LISTS[name].read(source, files)))


def listing(name: str, source: Source) -> VideoTextDataset:
    """The videos that a split lists, each with an empty caption: what there is without its captions.

    Raises:
        DatasetError: as `listed_ids`, or a folder that cannot be listed.
    """
    protocol, _ = asked_for(name, source)
    return assemble(name, protocol, source, [(video, "") for video in listed_ids(name, source)])


def assemble(
    name: str,
    protocol: str,
    source: Source,
    pairs: Sequence[tuple[str, str]],
    *,
    listed: Iterable[str] = (),
    spans: Mapping[str, tuple[float, float]] | None = None,
) -> VideoTextDataset:
    """The dataset of these captions, with their videos where they are found.

    Args:
        pairs: id and caption, in the protocol's order. listed: the ids that the split lists.
        spans: start and end of a video in seconds; a video without one is taken whole.

    Raises:
        DatasetError: no captions at all, or a folder that cannot be listed.
    """
    if not pairs:
        files = ", ".join(PROTOCOLS[name][protocol].files[source.split])
        raise DatasetError(
            f"{source.root}: none of the videos of split {source.split!r} has a caption in {files}; {REMEDY}"
        )
    told = dict.fromkeys(video for video, _ in pairs)
    names = LISTS[name]
    found = find_videos(source, told, names.ids(source.family), names.folder_ids)
    samples = []
    for video, caption in pairs:
        start, end = (spans or {}).get(video, (None, None))
        samples.append(Sample(video, caption, start, end, found.get(video)))
    without = tuple(video for video in listed if video not in told)
    return VideoTextDataset(name, source.split, source.root, samples, protocol, without_text=without)


def find_videos(
    source: Source, wanted: Iterable[str], ids: Ids = stem, folder_ids: Ids = whole
) -> dict[str, Path]:
    """The video file or folder of frames of each id of `wanted` that has one.

    `ids` says which ids a file may belong to by its name, `folder_ids` which a folder of frames. CLIP2Video
    takes folders, of more than five frames, the other families take files; the other kind serves for an id
    that has none of the family's own. Else, of several the first in the order of names, at every level.

    Raises:
        DatasetError: a folder that cannot be listed.
    """
    by_frames = source.family == "clip2video"
    own: dict[str, Path] = {}
    other: dict[str, Path] = {}
    sought = frozenset(wanted)
    for path, name, frames in _walk(str(source.videos or source.root), set()):
        if by_frames and 0 < frames <= _FEW_FRAMES:
            continue
        kind = own if source.family is None or by_frames == (frames > 0) else other
        fitting = (video for video in (folder_ids(name) if frames else ids(name)) if video in sought)
        if (video := next((video for video in fitting if video not in kind), None)) is not None:
            kind[video] = Path(path)
    return other | own


def find_all(folder: Path) -> list[Path]:
    """All that may be a video below a folder, files and folders of frames, in the order of their paths.

    Raises:
        DatasetError: a folder that cannot be listed.
    """
    return sorted(Path(path) for path, _, _ in _walk(str(folder), set()))


def _walk(folder: str, walked: set[str]) -> Iterator[tuple[str, str, int]]:
    """Path, name and number of frames (0: a file; counted up to `_PEEK`) of all that may be a video.

    A folder that several links lead to is walked once, links that go round in a circle or not; `walked`
    are the folders that have been, none at the top. A folder of frames is a video by each of its names.
    """
    try:
        with os.scandir(folder) as scan:
            entries = (entry for entry in scan if not entry.name.startswith("."))
            head = list(islice(entries, _PEEK))
            frames = _frames(head) if walked else 0
            rest = [] if frames else list(entries)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be listed ({error.strerror})") from error
    if frames:
        yield folder, os.path.basename(folder), frames
        return
    if (place := os.path.realpath(folder)) in walked:
        return
    walked.add(place)
    for entry in sorted(head + rest, key=lambda entry: entry.name):
        # Not `entry.is_dir()`, which raises at links that go round in a circle.
        if os.path.isdir(entry.path):
            yield from _walk(entry.path, walked)
        elif _may_be_video(entry.name) and os.path.isfile(entry.path):
            yield entry.path, entry.name, 0


def _frames(head: list[os.DirEntry[str]]) -> int:
    """How many images these entries are, 0 where something else than a folder of frames has them."""
    images = sum(_suffix(entry.name) in IMAGE_SUFFIXES for entry in head)
    return 0 if any(_may_be_video(entry.name) or os.path.isdir(entry.path) for entry in head) else images


def _may_be_video(name: str) -> bool:
    return _suffix(name) not in _NO_VIDEO


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
