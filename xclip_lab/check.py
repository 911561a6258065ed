"""What of a dataset is there, and whether its protocol can be run with it. Imports no towers: it is quick."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from xclip_lab.check_report import Elsewhere, Look, Report, SplitCheck
from xclip_lab.datasets import check_place, load_dataset
from xclip_lab.datasets.base import PROTOCOLS, SPLITS, Family, Protocol, Source
from xclip_lab.datasets.files import find_all, listed_ids, listing
from xclip_lab.datasets.overlap import digest, of_equal_size, overlap
from xclip_lab.datasets.reading import asked_for
from xclip_lab.errors import ConfigError, DatasetError, VideoError, printable
from xclip_lab.frame_folder import VIDEO_SUFFIXES
from xclip_lab.video import probe, read_frames_and_decoder
from xclip_lab.workers import usable_cores, watched

_TIMEOUT_S = 60.0


def look(path: Path) -> Look:
    """Open a video as training would, and read its first frame and its last.

    Raises:
        VideoError: no decoder can.
    """
    info = probe(path)
    _, decoder = read_frames_and_decoder(path, [0, info.frame_count - 1], info=info)
    return Look(
        info.codec, "folder" if path.is_dir() else path.suffix.lower() or "none", decoder, info.duration
    )


def check(
    name: str,
    root: str | Path,
    protocol: str | None = None,
    *,
    videos: str | Path | None = None,
    family: Family | None = None,
    split: str | None = None,
    open_videos: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Read the annotations of a dataset, look for its videos and open each one.

    Args:
        name, root, protocol, videos, family: as `load_dataset`.
        split: check this one alone; None for all that the protocol has.
        open_videos: else only the presence of the files is looked at, and overlap by content is not.
        workers: processes that open videos; None for one a core, 0 for none but this one.

    Raises:
        ConfigError, DatasetError: no such dataset, protocol, split or folder. All else is in the report.
    """
    check_place(name, root, videos, family)
    workers = usable_cores() if workers is None else workers
    if workers < 0:
        raise ConfigError(
            f"workers: {workers} is not allowed (0: this process alone; or some number of others)"
        )
    root, place = Path(root), Path(videos or root)
    rules: Protocol | None = None
    if name in PROTOCOLS:
        protocol, _ = asked_for(name, Source(root, split or "test", protocol))
        rules = PROTOCOLS[name][protocol]
    there = tuple(rules.splits) if rules else SPLITS
    splits = {}
    for one in there if split is None else (split,):
        found = SplitCheck(one)
        if rules:
            found.known = rules.splits[one]
            found.absent = [file for file in rules.files[one] if not (root / file).exists()]
        try:
            found.dataset = load_dataset(name, one, root, protocol, videos=videos, family=family)
        except DatasetError as error:
            found.error = str(error)
            if rules:
                with contextlib.suppress(DatasetError):
                    found.dataset = listing(name, Source(root, one, protocol, place, family))
        # Nobody said that one's own data have a validation split.
        if split is not None or rules or one != "val" or found.dataset:
            splits[one] = found
    undivided = any(found.dataset.undivided for found in splits.values() if found.dataset)
    if undivided and split is None:
        splits = {"test": splits["test"]}  # the others are the same
    report = Report(name, protocol, root, place, splits, undivided=undivided, probed=open_videos)
    _open(report, workers, progress)
    if split is None:
        report.elsewhere = _elsewhere(report)
        if place.is_dir() and all(found.dataset for found in splits.values()):
            report.unlisted = _count_unlisted(report)
    return report


def _elsewhere(report: Report) -> dict[str, Elsewhere]:
    """What val and test of the dataset's other protocols share with the splits, where their lists are there.
    Those that have the same files as a split here, or as one before, are the same."""
    protocols = PROTOCOLS.get(report.name, {})
    if report.protocol not in protocols:
        return {}
    own = {name: frozenset(found.videos) for name, found in report.splits.items() if found.dataset}
    seen = set(protocols[report.protocol].files.items())
    elsewhere = {}
    for other, rules in protocols.items():
        for split in ("val", "test"):
            if split in rules.files and (split, rules.files[split]) not in seen:
                seen.add((split, rules.files[split]))
                with contextlib.suppress(DatasetError):
                    if ids := listed_ids(report.name, Source(report.root, split, other)):
                        shared = {name: [video for video in ids if video in own[name]] for name in own}
                        elsewhere[f"{other} {split}"] = Elsewhere(len(ids), shared)
    return elsewhere


def _open(report: Report, workers: int, progress: bool) -> None:
    """Look for the videos, open and compare them, and note what came of it in the report."""
    splits = report.splits.values()
    paths = _paths(report)
    seen = _each(look, paths if report.probed else [], "open videos", workers, progress)
    for found in splits:
        _sort_videos(found, set(paths), seen)
    alike = of_equal_size(paths) if report.probed else []
    contents = _each(digest, alike, "compare videos", workers, progress)
    for one, other in itertools.combinations(splits, 2):
        if one.dataset and other.dataset:
            report.overlaps[one.split, other.split] = overlap(one.dataset, other.dataset, contents)


def _paths(report: Report) -> list[Path]:
    """The files and folders of frames that are there, each once."""
    samples = [
        sample
        for found in report.splits.values()
        if found.dataset
        for sample in found.dataset.video_samples()
    ]
    paths = dict.fromkeys(sample.path for sample in samples if sample.path is not None)
    return [path for path in paths if path.exists()]


def _each(
    function: Callable[[Path], Any], paths: Sequence[Path], title: str, workers: int, progress: bool
) -> dict[Path, Any]:
    """What `function` gave for each path; where it gave nothing, the reason as a VideoError."""
    found: dict[Path, Any] = {}
    outcomes = watched(function, paths, min(workers, len(paths)), _TIMEOUT_S)
    silent = not progress or not paths
    for index, outcome in tqdm(outcomes, title, len(paths), unit="video", disable=silent, leave=False):
        path, reason = paths[index], outcome.error
        if reason is not None and printable(str(path)) not in reason:
            reason = f"{path}: {reason}"
        found[path] = outcome.value if reason is None else VideoError(reason)
    return found


def _sort_videos(found: SplitCheck, there: set[Path], seen: dict[Path, Look | VideoError]) -> None:
    for sample in found.dataset.video_samples() if found.dataset else []:
        if sample.path is None or sample.path not in there:
            found.missing.append(sample.video_id)
        elif isinstance(known := seen.get(sample.path), VideoError):
            found.unreadable[sample.video_id] = str(known)
        elif known is not None:
            found.looks[sample.video_id] = known


def _count_unlisted(report: Report) -> int:
    found = find_all(report.videos)
    there = {path.resolve() for path in found if path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir()}
    return len(there - {path.resolve() for path in _paths(report)})
