"""What `check` found: verdicts, a table for the screen, a dictionary for JSON."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from xclip_lab import atomic
from xclip_lab.datasets.base import Known, VideoTextDataset
from xclip_lab.datasets.overlap import Overlap
from xclip_lab.errors import first_few, printable, writing

_USES = {"evaluation": ("test",), "training": ("train", "val")}
_MARKS = 2  # a caption's start and end take two of its `max_words` places
_LENGTHS = (32, 64, 77)  # the papers' `max_words`, and CLIP's positions
_LINES = ("\n    ", "\n    ")


class Look(NamedTuple):
    """What a video turned out to be, and which decoder reads it."""

    codec: str
    file_type: str
    decoder: str
    seconds: float


class Elsewhere(NamedTuple):
    """What a split of another protocol shares with the splits here: how many `videos` it lists, and the ids
    that each of these has too."""

    videos: int
    ids: dict[str, list[str]]


@dataclass
class SplitCheck:
    """What was found of one split.

    Attributes:
        split: its name. known: the official counts, where there are some.
        absent: annotation files that are not there. error: why it cannot be read, None where it can.
        dataset: its annotations; where there is an `error` all the same, only its list of videos could be
            read, and `told` is None.
        missing: ids of videos without a file. unreadable: of videos that cannot be read the reasons, by id.
        looks: of the other videos what they are, by id; empty where none was opened.
    """

    split: str
    known: Known | None = None
    absent: list[str] = field(default_factory=list)
    error: str | None = None
    dataset: VideoTextDataset | None = None
    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    looks: dict[str, Look] = field(default_factory=dict)

    @property
    def videos(self) -> list[str]:
        return self.dataset.videos if self.dataset else []

    @property
    def told(self) -> VideoTextDataset | None:
        """Its annotations, None where its captions could not be read."""
        return None if self.error is not None else self.dataset

    @property
    def captions(self) -> list[str]:
        return [sample.caption for sample in self.told.samples] if self.told else []

    @property
    def without_text(self) -> Sequence[str]:
        return self.told.without_text if self.told else ()

    @property
    def blank(self) -> int:
        """How many captions are empty, or no more than blanks."""
        return sum(not caption.strip() for caption in self.captions)

    @cached_property
    def words(self) -> list[int]:
        """Of each caption the number of its words."""
        return [len(caption.split()) for caption in self.captions]

    @property
    def seconds(self) -> list[float]:
        """The lengths of the videos that could be read."""
        return [found.seconds for found in self.looks.values()]

    @cached_property
    def repeated(self) -> tuple[int, int]:
        """How many captions stand there before, and how many texts several videos have."""
        owners: dict[str, set[str]] = {}
        for sample in self.told.samples if self.told else []:
            owners.setdefault(sample.caption, set()).add(sample.video_id)
        return len(self.captions) - len(owners), sum(len(videos) > 1 for videos in owners.values())

    def problems(self) -> list[str]:
        """Why what needs this split cannot be done."""
        lost = {"missing": self.missing, "unreadable": self.unreadable}
        return ([] if self.error is None else [self.error]) + [
            f"{len(ids):,} of {len(self.videos):,} {self.split} videos are {what}"
            for what, ids in lost.items()
            if ids
        ]

    def odd_counts(self) -> list[str]:
        """How the counts differ from the official ones."""
        if self.known is None or self.dataset is None:
            return []
        pairs = {"videos": (len(self.videos), self.known.videos)}
        if self.told:
            pairs["captions"] = (len(self.captions), self.known.captions)
        return [
            f"{found:,} {what} where {known:,} are known"
            for what, (found, known) in pairs.items()
            if known not in (None, found)
        ]

    def to_dict(self) -> dict[str, Any]:
        repeated, between = self.repeated
        of_captions = {
            "captions": len(self.captions),
            "captions_empty": self.blank,
            "captions_repeated": repeated,
            "captions_of_several_videos": between,
            "words": _spread(self.words),
            "captions_longer_than": {length: self.longer_than(length) for length in _LENGTHS},
            "without_caption": list(self.without_text),
        }
        return {
            "known": vars(self.known) if self.known else None,
            "absent_annotations": self.absent,
            "error": self.error,
            "videos": len(self.videos),
            **(of_captions if self.told else dict.fromkeys(of_captions)),
            "missing": self.missing,
            "unreadable": self.unreadable,
            "seconds": _spread(self.seconds) | {"total": sum(self.seconds)},
            **{name: self.count(name) for name in ("codec", "file_type", "decoder")},
        }

    def longer_than(self, max_words: int) -> int:
        """Captions with more words than `max_words` has places: these are cut for certain. One with fewer may
        be too, as rare words take several places."""
        return sum(count > max_words - _MARKS for count in self.words)

    def count(self, what: str) -> dict[str, int]:
        """How many videos there are of each codec, file type or decoder, the most frequent first."""
        return dict(Counter(getattr(found, what) for found in self.looks.values()).most_common())


@dataclass
class Report:
    """What `check` found. `str` gives a table, `to_dict` all of it for JSON.

    Attributes:
        splits: by name. overlaps: of each pair of splits, named in the order of `splits`.
        elsewhere: val and test of the dataset's other protocols, by a name such as "full test".
        undivided: nobody has divided this dataset; `splits` then has one of its equal splits only.
        unlisted: videos (files, folders of frames) that no split lists; None where not all splits were read.
        probed: the videos were opened.
    """

    name: str
    protocol: str | None
    root: Path
    videos: Path
    splits: dict[str, SplitCheck]
    overlaps: dict[tuple[str, str], Overlap] = field(default_factory=dict)
    elsewhere: dict[str, Elsewhere] = field(default_factory=dict)
    undivided: bool = False
    unlisted: int | None = None
    probed: bool = True

    @property
    def title(self) -> str:
        return self.name if self.protocol is None else f"{self.name} / {self.protocol}"

    @property
    def slug(self) -> str:
        """A name for its file."""
        return self.name if self.protocol is None else f"{self.name}-{self.protocol}"

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """Of each use (evaluation, training) why it cannot be, an empty list where it can."""
        if len(self.splits) == 1:
            [alone] = self.splits.values()
            use = "evaluation" if alone.split == "test" else alone.split
            return {"evaluation and training" if self.undivided else use: alone.problems()}
        found = {
            use: [why for name, split in self.splits.items() if name in needed for why in split.problems()]
            for use, needed in _USES.items()
        }
        found["training"] += [
            f"{shared.total:,} of {len(self.splits[other].videos):,} {other} videos are for training as well"
            for (split, other), shared in self.overlaps.items()
            if split == "train" and shared.total
        ]
        return {use: list(dict.fromkeys(why)) for use, why in found.items()}

    @property
    def runnable(self) -> bool:
        """Whether all uses can be."""
        return not any(self.verdicts.values())

    @property
    def closing(self) -> str:
        """What cannot run and why, in one line."""
        return f"{self.title}: " + ". ".join(_spoken({use: why for use, why in self.verdicts.items() if why}))

    def to_dict(self) -> dict[str, Any]:
        return {
            "dataset": self.name,
            "protocol": self.protocol,
            "root": str(self.root),
            "videos": str(self.videos),
            "runnable": self.runnable,
            "verdicts": self.verdicts,
            "probed": self.probed,
            "splits": {name: check.to_dict() for name, check in self.splits.items()},
            "overlaps": {"/".join(pair): shared._asdict() for pair, shared in self.overlaps.items()},
            "elsewhere": {name: shared._asdict() for name, shared in self.elsewhere.items()},
            "unlisted_files": self.unlisted,
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON. Raises DatasetError where that cannot be."""
        path = Path(path)
        with writing(path, " for the report"):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    def __str__(self) -> str:
        checks = list(self.splits.values())
        rows = [["", *self.splits]] + [
            [title, *(cell(check) if self._known(title, check) else "-" for check in checks)]
            for title, cell in _ROWS.items()
            if self.probed or title not in _OF_OPENED
        ]
        for name, (videos, ids) in self.elsewhere.items():
            shared = (f"{len(ids[split]):,}" if split in ids else "-" for split in self.splits)
            rows.append([f"shared with {name} ({videos:,})", *shared])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        head = f"{self.title}   annotations {self.root}   videos {self.videos}"
        return "\n".join([printable(head), "", *lines, "", *self._remarks(), *_spoken(self.verdicts)])

    def _known(self, title: str, check: SplitCheck) -> bool:
        return (check.told if title in _OF_CAPTIONS else check.dataset) is not None

    def _remarks(self) -> list[str]:
        found = []
        for name, check in self.splits.items():
            listed = check.error is not None and check.dataset is not None
            lists = {
                "captions: file missing" if listed else "annotation file missing": check.absent,
                "not the official number": check.odd_counts(),
                "no caption": check.without_text,
                "no file": check.missing,
            }
            found += [f"{name}: {what} {_first(entries)}" for what, entries in lists.items() if entries]
            found += [f"{name}: empty captions: {check.blank:,}"] if check.blank else []
            if check.unreadable:
                reasons = _first(list(check.unreadable.values()), *_LINES)
                found.append(f"{name}: cannot be read {reasons}")
        for (one, other), shared in self.overlaps.items():
            twins = [f"{mine} = {theirs}" for mine, theirs in shared.twins.items()]
            found.append(f"{one} and {other}: in both {_first(shared.ids)}")
            found += [f"{one} and {other}: same content {_first(twins)}"] if twins else []
        if self.undivided:
            found.append("every split has all of this: nobody has said what is for testing")
        if self.unlisted:
            found.append(f"videos that are in no split: {self.unlisted:,}")
        if any(check.looks for check in self.splits.values()):
            found.append(
                "of each video the first frame and the last were read: damage between them is not told"
            )
        return [*found, ""] if found else []


def _spoken(verdicts: dict[str, list[str]]) -> list[str]:
    return [
        f"{use} cannot run: {'; '.join(why)}" if why else f"{use} can run" for use, why in verdicts.items()
    ]


def _first(texts: Sequence[str], before: str = " ", between: str = ", ") -> str:
    """How many there are, and a few of them."""
    return f"({len(texts):,})" + (f":{before}{first_few(texts, between)}" if texts else "")


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _beside(found: int, known: Known | None, what: str) -> str:
    official = getattr(known, what, None)
    told = "" if official is None else " (as known)" if official == found else f" (known: {official:,})"
    return f"{found:,}{told}"


def _three(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in _spread(values).values()) or "-"


def _counted(check: SplitCheck, what: str) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in check.count(what).items()) or "-"


_OF_OPENED: dict[str, Callable[[SplitCheck], str]] = {
    "unreadable": lambda check: f"{len(check.unreadable):,}",
    "read by": lambda check: _counted(check, "decoder"),
    "codec": lambda check: _counted(check, "codec"),
    "file type": lambda check: _counted(check, "file_type"),
    "seconds, min / median / max": lambda check: _three(check.seconds, 1),
    "hours in all": lambda check: f"{sum(check.seconds) / 3600:.2f}" if check.seconds else "-",
}
_OF_CAPTIONS: dict[str, Callable[[SplitCheck], str]] = {
    "captions": lambda check: _beside(len(check.captions), check.known, "captions"),
    "repeated captions": lambda check: f"{check.repeated[0]:,}",
    "captions that several videos have": lambda check: f"{check.repeated[1]:,}",
    "words, min / median / max": lambda check: _three(check.words, 0),
    f"captions cut at max_words {' / '.join(map(str, _LENGTHS))}": lambda check: " / ".join(
        f"{check.longer_than(length):,}" for length in _LENGTHS
    ),
}
_ROWS: dict[str, Callable[[SplitCheck], str]] = {
    "videos": lambda check: _beside(len(check.videos), check.known, "videos"),
    **_OF_CAPTIONS,
    "files missing": lambda check: f"{len(check.missing):,}",
    **_OF_OPENED,
}
