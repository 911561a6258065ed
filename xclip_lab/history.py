"""What a run writes while it trains: one JSON line a logged step, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

Row = dict[str, Any]


def read_history(run_dir: str | Path) -> list[Row]:
    """The rows of a run's `history.jsonl`; a last line that a kill cut short is left out."""
    path = Path(run_dir) / "history.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class History:
    """`history.jsonl` is the record, `tensorboard/` a view of it that is drawn anew when a run goes on."""

    def __init__(self, run_dir: Path, rows: int) -> None:
        """Keep the first `rows` rows of the record: those the checkpoint knows of."""
        self.rows = read_history(run_dir)[:rows]
        path = run_dir / "history.jsonl"
        if path.exists():
            os.truncate(path, sum(len(line) for line in path.read_bytes().splitlines(keepends=True)[:rows]))
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
