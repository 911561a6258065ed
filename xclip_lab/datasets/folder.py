"""Own videos: a folder of files, or a table of videos and captions."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from xclip_lab.datasets.base import DATASETS, Sample, Source, VideoTextDataset
from xclip_lab.errors import DatasetError

_SUFFIXES = "3gp avi flv gif m4v mkv mov mp4 mpeg mpg ogv ts webm wmv"
VIDEO_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
CAPTIONS_JSON = "captions.json"
_REQUIRED = ("video", "caption")
_SPLITS = ("train", "val", "test")
_SHOWN = 5


@DATASETS.register("folder")
def folder(source: Source) -> VideoTextDataset:
    """Read own videos.

    `root` is one of
    - a folder of video files. A video's caption is the text of `name.txt` beside it (a line a caption), or
      else the file's name in words.
    - a CSV file (UTF-8) with the columns `video,caption` and, where wanted, `start,end` (seconds) and
      `split`; or a folder that holds one CSV file. Paths are relative to the CSV.
    - a folder with `captions.json`: a list of `{"file": ..., "captions": [...]}`.

    Without a column `split` every split has all samples.

    Raises:
        DatasetError: nothing there, wrong columns, missing videos, times that are none.
    """
    root, split, protocol = source.root, source.split, source.protocol
    if split not in _SPLITS:
        raise DatasetError(f"dataset 'folder': no split {split!r} (there are {', '.join(_SPLITS)})")
    if protocol is not None:
        raise DatasetError(f"dataset 'folder' has no protocols, {protocol!r} was asked for")
    samples = _samples(root, split)
    if not samples:
        raise DatasetError(f"{root}: no sample of split {split!r} in it")
    _check_files(root, samples)
    return VideoTextDataset(name="folder", split=split, root=root, samples=samples)


def _samples(root: Path, split: str) -> list[Sample]:
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise DatasetError(f"{root}: not a folder and not a CSV file; set data.root to one of these")
        return _from_csv(root, split)
    tables = sorted(root.glob("*.csv"))
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables[:_SHOWN])
        raise DatasetError(f"{root}: several CSV files ({names}); set data.root to the one that is meant")
    if tables:
        return _from_csv(tables[0], split)
    if (root / CAPTIONS_JSON).is_file():
        return _from_json(root / CAPTIONS_JSON)
    return _from_files(root)


def _from_files(root: Path) -> list[Sample]:
    paths = sorted(path for path in root.rglob("*") if _is_video(path, root))
    if not paths:
        raise DatasetError(f"{root}: no video in it (looked for {', '.join(sorted(VIDEO_SUFFIXES))})")
    samples = []
    for path in paths:
        sidecar = path.with_suffix(".txt")
        captions = _lines(sidecar) if sidecar.is_file() else [name_in_words(path.stem)]
        if not captions:
            raise DatasetError(f"{sidecar}: no caption in it")
        video_id = path.relative_to(root).as_posix()
        samples += [Sample(video_id, caption, path=path) for caption in captions]
    return samples


def _is_video(path: Path, root: Path) -> bool:
    """Hidden files and those in hidden folders are none: macOS, for one, puts a `._a.mp4` beside `a.mp4`."""
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()


def name_in_words(stem: str) -> str:
    """A file's name as a caption.

    >>> name_in_words("a_dog-runs.fast")
    'a dog runs fast'
    """
    return " ".join(re.sub(r"[_\-.]+", " ", stem).split()) or stem


def _from_json(path: Path) -> list[Sample]:
    try:
        entries = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: not valid JSON ({error})") from error
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
        samples += [Sample(name, text, path=path.parent / name) for text in texts]
    return samples


def _is_caption(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _normal(name: str) -> str:
    """One spelling of a path, so that `a.mp4` and `./a.mp4` are one video of the gallery. `..` stays: behind
    a link it leads elsewhere."""
    return Path(name).as_posix()


def _from_csv(path: Path, split: str) -> list[Sample]:
    samples = []
    for where, row in _rows(path):
        name, caption = row["video"].strip(), row["caption"].strip()
        if not name or not caption:
            raise DatasetError(f"{where}: the {'video' if not name else 'caption'} is empty")
        name = _normal(name)
        if "split" in row and row["split"].strip() not in _SPLITS:
            raise DatasetError(f"{where}: split {row['split']!r} is not one of {', '.join(_SPLITS)}")
        if "split" in row and row["split"].strip() != split:
            continue
        start, end = (_seconds(row.get(key, ""), key, where) for key in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            raise DatasetError(f"{where}: end {end:g} s is not after start {start or 0.0:g} s")
        video_id = name if start is None and end is None else f"{name}[{_clock(start)}-{_clock(end)}]"
        samples.append(Sample(video_id, caption, start, end, path.parent / name))
    return samples


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file by column, each with the place that an error message names."""
    # Not `str.splitlines`, which also breaks lines at characters that captions may hold, such as U+2028.
    # `strict`: a quote that is never closed would take all rows after it for one caption.
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _columns(path, cells)
            elif len(cells) != len(columns):
                raise DatasetError(
                    f"{where}: {len(cells)} columns, not {len(columns)}; put a caption with a comma in quotes"
                )
            else:
                yield where, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        if "field larger" in str(error):
            raise DatasetError(
                f"{path}, line {reader.line_num}: a field longer than {csv.field_size_limit()} characters; "
                "a quote that is never closed makes one"
            ) from error
        raise DatasetError(
            f"{path}, line {reader.line_num}: not valid CSV ({error}); a quoted caption ends with a quote "
            "before the comma, and a quote inside it is doubled"
        ) from error
    if not columns:
        _columns(path, [])


def _columns(path: Path, cells: list[str]) -> list[str]:
    columns = [name.strip().lower() for name in cells]
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        other = next((mark for mark in (";", "\t") if len(cells) == 1 and mark in cells[0]), None)
        hint = f"; its columns are separated by {other!r}, save it with commas" if other else ""
        raise DatasetError(
            f"{path}: no column {' and no column '.join(map(repr, missing))} in its first line; found "
            f"{', '.join(map(repr, columns)) or 'nothing'}, expected video,caption[,start,end,split]{hint}"
        )
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice:
        raise DatasetError(f"{path}: two columns {twice!r} in its first line; rename or remove one")
    return columns


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
    missing = [path for path in paths if not path.is_file()]
    if missing:
        first = ", ".join(str(path) for path in missing[:_SHOWN])
        more = ", ..." if len(missing) > _SHOWN else ""
        raise DatasetError(f"{root}: {len(missing)} of {len(paths)} video files are missing: {first}{more}")


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).split("\n") if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
