"""Annotation files, read with care: what is wrong in one is told with its place and a remedy."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xclip_lab.datasets.base import PROTOCOLS, Source
from xclip_lab.errors import AbsentError, DatasetError
from xclip_lab.registry import did_you_mean

REMEDY = "data/README.md says which files belong there and what stands in them"


def asked_for(dataset: str, source: Source) -> tuple[str, tuple[Path, ...]]:
    """The name of the protocol that is asked for, and its annotation files of the split.

    Raises:
        DatasetError: no such protocol (letters and digits alone count). AbsentError: it has no such split.
    """
    protocols = PROTOCOLS[dataset]
    called = {name: (name, *each.aliases) for name, each in protocols.items()}
    names = {_plain(alias): name for name, aliases in called.items() for alias in aliases}
    name = next(iter(protocols)) if source.protocol is None else names.get(_plain(str(source.protocol)))
    if name is None:
        raise DatasetError(
            f"dataset {dataset!r} has no protocol {source.protocol!r}"
            f"{did_you_mean(str(source.protocol), sum(called.values(), ()))} "
            f"(there are {', '.join(map(' or '.join, called.values()))})"
        )
    protocol = protocols[name]
    if source.split not in protocol.splits:
        raise AbsentError(
            f"dataset {dataset!r}, protocol {name!r}: no split {source.split!r} "
            f"(there are {', '.join(protocol.splits)}){protocol.lacks and '; ' + protocol.lacks}"
        )
    return name, tuple(source.root / file for file in protocol.files[source.split])


def own_name(dataset: str, split: str, protocol: str | None) -> str:
    """What a split is called here: `test` where it is the official code's `val` (`Protocol.val_is_test`).

    Raises:
        DatasetError: no such protocol.
    """
    if dataset not in PROTOCOLS or split != "val":
        return split
    try:
        name, _ = asked_for(dataset, Source(Path(), "test", protocol))
    except AbsentError:
        return split
    return "test" if PROTOCOLS[dataset][name].val_is_test else split


def listed_entry(data: dict[str, Any], video: str, data_file: Path, list_file: Path) -> tuple[Any, str]:
    """What a file holds of a listed video, and the place that an error message names."""
    where = f"{data_file}, video {video!r}"
    if video not in data:
        raise DatasetError(f"{where}: not in it, though {list_file.name} lists it; {REMEDY}")
    return data[video], where


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises AbsentError where there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except FileNotFoundError as error:
        raise AbsentError(f"{path}: no such file; {REMEDY}") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error}); {REMEDY}") from error


def read_list(path: Path) -> list[Any]:
    """A JSON file that holds a list."""
    return of_kind(read_json(path), list, str(path))


def read_dict(path: Path) -> dict[str, Any]:
    """A JSON file that holds a dictionary."""
    return of_kind(read_json(path), dict, str(path))


def of_kind(value: Any, kind: type[list] | type[dict], where: str) -> Any:
    """`value`, which has to be a list or a dict."""
    if not isinstance(value, kind):
        name = "list" if kind is list else "dictionary"
        raise DatasetError(f"{where}: {_cut(value)} where a {name} is expected; {REMEDY}")
    return value


def text_at(entry: Any, key: str, where: str, blank: bool = False) -> str:
    """The text of an entry at `key`, as it stands, blanks at its ends and all; where `blank`, it may be no
    more than blanks, as the official loaders have it with captions."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not (blank or value.strip()):
        raise DatasetError(f"{where}: no text at {key!r} in {_cut(entry)}; {REMEDY}")
    return value


def texts_of(value: Any, where: str) -> list[str]:
    """`value`, which has to be a list of texts. It and they may be empty."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DatasetError(f"{where}: {_cut(value)} where a list of texts is expected; {REMEDY}")
    return value


def _cut(value: Any) -> str:
    return repr(value)[:80]


def read_ids(path: Path) -> list[str]:
    """A list of ids, one a line, each once."""
    ids = list(dict.fromkeys(line.strip() for line in read_text(path).split("\n") if line.strip()))
    if not ids:
        raise DatasetError(f"{path}: no id in it; {REMEDY}")
    return ids


def read_rows(path: Path, required: Sequence[str], expected: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file by column, each with the place that an error message names. `expected` are its
    columns in words."""
    # Not `str.splitlines`, which also breaks lines at characters that captions may hold, such as U+2028.
    # `strict`: a quote that is never closed would take all rows after it for one caption.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _columns(path, cells, required, expected)
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
        _columns(path, [], required, expected)


def _columns(path: Path, cells: list[str], required: Sequence[str], expected: str) -> list[str]:
    columns = [name.strip().lower() for name in cells]
    missing = [name for name in required if name not in columns]
    if missing:
        other = next((mark for mark in (";", "\t") if len(cells) == 1 and mark in cells[0]), None)
        hint = f"; its columns are separated by {other!r}, save it with commas" if other else ""
        raise DatasetError(
            f"{path}: no column {' and no column '.join(map(repr, missing))} in its first line; found "
            f"{', '.join(map(repr, columns)) or 'nothing'}, expected {expected}{hint}"
        )
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice:
        raise DatasetError(f"{path}: two columns {twice!r} in its first line; rename or remove one")
    return columns
