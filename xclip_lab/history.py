"""What a run writes while it trains: one JSON line a logged step, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from xclip_lab.errors import TrainingError

Row = dict[str, Any]
_NUMBERS = ("step", "seconds")  # in every row


def read_history(run_dir: str | Path, rows: int | None = None) -> list[Row]:
    """The rows of a run's `history.jsonl`; a last line that a kill cut short is left out.

    Args:
        rows: read so many rows, those a checkpoint knows of, and look at none after them; None for all.

    Raises:
        TrainingError: a line that is no row, or fewer than `rows` rows.
    """
    path = Path(run_dir) / "history.jsonl"
    lines = _lines(path)[:rows]
    if rows is not None and len(lines) < rows:
        found = f"has {len(lines)} of the {rows} rows that" if path.exists() else "is gone, and"
        raise TrainingError(f"{path} {found} the checkpoint counts on it; {_remedy(run_dir)}")
    return [_row(line, number, path) for number, line in enumerate(lines, start=1)]


def _lines(path: Path) -> list[bytes]:
    """The whole lines of the record, with their line ends."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _row(line: bytes, number: int, path: Path) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), int | float) for key in _NUMBERS):
        raise TrainingError(f"{path}, line {number} is damaged; {_remedy(path.parent)}")
    return row


def _remedy(run_dir: str | Path) -> str:
    return (
        f"put the file back from a copy, or move {run_dir} aside or give another --run-dir to start anew "
        "(the models in its checkpoints folder can still be loaded)"
    )


class History:
    """`history.jsonl` is the record, `tensorboard/` a view of it that is drawn anew when a run goes on."""

    def __init__(self, run_dir: Path, rows: int) -> None:
        """Keep the first `rows` rows of the record: those the checkpoint knows of.

        Raises:
            TrainingError: they are not all there.
        """
        self.rows = read_history(run_dir, rows)
        path = run_dir / "history.jsonl"
        if path.exists():
            os.truncate(path, sum(map(len, _lines(path)[:rows])))
        self._file = path.open("a")
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        self._board = SummaryWriter(str(run_dir / "tensorboard"))
        for row in self.rows:
            self._draw(row)

    def append(self, row: Row) -> None:
        """Record a row; `step` must be in it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.rows.append(row)
        self._draw(row)

    def sync(self) -> None:
        """Wait until all rows are on the disk; a checkpoint that counts them may be written then."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._board.close()

    def _draw(self, row: Row) -> None:
        for name, value in row.items():
            if name not in ("step", "seconds"):
                tag = name if "/" in name else f"train/{name}"
                self._board.add_scalar(tag, value, row["step"])
