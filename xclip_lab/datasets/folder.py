"""Own videos: a folder of files, or a table of videos and captions."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from xclip_lab.datasets.base import DATASETS, SPLITS, Sample, Source, VideoTextDataset
from xclip_lab.datasets.files import find_all
from xclip_lab.datasets.reading import read_json, read_rows, read_text
from xclip_lab.errors import AbsentError, DatasetError, first_few, printable
from xclip_lab.frame_folder import VIDEO_SUFFIXES

CAPTIONS_JSON = "captions.json"


@DATASETS.register("folder")
def folder(source: Source) -> VideoTextDataset:
    """Read own videos.

    `root` is one of
    - a folder of videos: files, or folders of frames. A video's caption is the text of `name.txt` beside it
      (a line a caption), or else its name in words.
    - a CSV file (UTF-8) with the columns `video,caption` and, where wanted, `start,end` (seconds) and
      `split`; or a folder that holds one CSV file. Paths are relative to the CSV, or to `source.videos`.
    - a folder with `captions.json`: a list of `{"file": ..., "captions": [...]}`.

    Without a column `split` every split has all samples.

    Raises:
        DatasetError: nothing there, wrong columns, missing videos, times that are none.
    """
    root, split, protocol = source.root, source.split, source.protocol
    if split not in SPLITS:
        raise DatasetError(f"dataset 'folder': no split {split!r} (there are {', '.join(SPLITS)})")
    if protocol is not None:
        raise DatasetError(f"dataset 'folder' has no protocols, {protocol!r} was asked for")
    samples, undivided = _samples(root, split, source.videos)
    if not samples:
        raise AbsentError(f"{root}: no sample of split {split!r} in it")
    _check_files(root, samples)
    return VideoTextDataset(name="folder", split=split, root=root, samples=samples, undivided=undivided)


def _samples(root: Path, split: str, videos: Path | None) -> tuple[list[Sample], bool]:
    """The samples, and whether every split has all of them."""
    place = videos or (root.parent if root.is_file() else root)
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise DatasetError(f"{root}: not a folder and not a CSV file; set data.root to one of these")
        return _from_csv(root, split, place)
    tables = sorted(root.glob("*.csv"))
    if len(tables) > 1:
        names = first_few(table.name for table in tables)
        raise DatasetError(f"{root}: several CSV files ({names}); set data.root to the one that is meant")
    if tables:
        return _from_csv(tables[0], split, place)
    if (root / CAPTIONS_JSON).is_file():
        return _from_json(root / CAPTIONS_JSON, place), True
    return _from_files(place), True


def _from_files(root: Path) -> list[Sample]:
    paths = [path for path in find_all(root) if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES]
    if not paths:
        raise DatasetError(f"{root}: no video in it (looked for {', '.join(sorted(VIDEO_SUFFIXES))})")
    samples = []
    for path in paths:
        name = path.name if path.is_dir() else path.stem
        sidecar = path.with_name(f"{name}.txt")
        # Not `sidecar.is_file()`, which raises where the name is too long for a file.
        captions = _lines(sidecar) if os.path.isfile(sidecar) else [printable(name_in_words(name))]
        if not captions:
            raise DatasetError(f"{sidecar}: no caption in it")
        video_id = printable(path.relative_to(root).as_posix())
        samples += [Sample(video_id, caption, path=path) for caption in captions]
    return samples


def name_in_words(stem: str) -> str:
    """A file's name as a caption.

    >>> name_in_words("a_dog-runs.fast")
    'a dog runs fast'
    """
    return " ".join(re.sub(r"[_\-.]+", " ", stem).split()) or stem


def _from_json(path: Path, place: Path) -> list[Sample]:
    entries = read_json(path)
    samples = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        file, captions = (
            (entry.get("file"), entry.get("captions")) if isinstance(entry, dict) else (None, None)
        )
        texts = captions if isinstance(captions, list) else []
        if not isinstance(file, str) or not texts or not all(map(_is_caption, texts)):
            raise DatasetError(
                f'{path}: entry {number} is not {{"file": name, "captions": [text, ...]}}: {str(entry)[:80]}'
            )
        name = _normal(file)
        samples += [Sample(name, text, path=place / name) for text in texts]
    return samples


def _is_caption(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _normal(name: str) -> str:
    """One spelling of a path, so that `a.mp4` and `./a.mp4` are one video of the gallery. `..` stays: behind
    a link it leads elsewhere."""
    return Path(name).as_posix()


def _from_csv(path: Path, split: str, place: Path) -> tuple[list[Sample], bool]:
    samples = []
    undivided = True
    for where, row in read_rows(path, ("video", "caption"), "video,caption[,start,end,split]"):
        name, caption = row["video"].strip(), row["caption"].strip()
        if not name or not caption:
            raise DatasetError(f"{where}: the {'video' if not name else 'caption'} is empty")
        name = _normal(name)
        undivided = "split" not in row
        if not undivided and row["split"].strip() not in SPLITS:
            raise DatasetError(f"{where}: split {row['split']!r} is not one of {', '.join(SPLITS)}")
        if not undivided and row["split"].strip() != split:
            continue
        start, end = (_seconds(row.get(key, ""), key, where) for key in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            raise DatasetError(f"{where}: end {end:g} s is not after start {start or 0.0:g} s")
        video_id = name if start is None and end is None else f"{name}[{_clock(start)}-{_clock(end)}]"
        samples.append(Sample(video_id, caption, start, end, place / name))
    return samples, undivided


def _seconds(text: str, key: str, where: str) -> float | None:
    if not text.strip():
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise DatasetError(f"{where}: {key} {text.strip()!r} is not a number of seconds, 0 or more")
    return seconds


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else repr(seconds)


def _check_files(root: Path, samples: list[Sample]) -> None:
    paths = dict.fromkeys(sample.path for sample in samples if sample.path is not None)
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        told = f"{len(missing)} of {len(paths)} video files are missing: {first_few(missing)}"
        raise DatasetError(f"{root}: {told}")


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]
