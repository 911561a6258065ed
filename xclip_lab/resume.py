"""A run's state on disk: checkpoints that appear whole or not at all, and the lock on the run folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xclip_lab.atomic import TEMPORARY, point_link, sync
from xclip_lab.checkpoint import MODEL_FILE, save_model
from xclip_lab.errors import DISK_ERRORS, CheckpointError, TrainingError, disk_remedy, one_line, writing
from xclip_lab.model import RetrievalModel
from xclip_lab.pretrained import load_strictly

STATE_FILE = "training.pt"
STAMP_FILE = "stamp.json"

_NUMBER = (int, float)
_STAMP_FIELDS = {
    "step": int,
    "total_steps": int,
    "epoch": int,
    "selection_split": (str, type(None)),
    "selection_metric": str,
    "selection_value": (*_NUMBER, type(None)),
}
_STATE_FIELDS = {
    "config": dict,
    "data": dict,
    "step": int,
    "seconds": _NUMBER,
    "best": (dict, type(None)),
    "history_rows": int,
    "tower_chunk": (int, type(None)),
    "optimizer": dict,
}


class Checkpoints:
    """`<run_dir>/checkpoints/`: a folder a saved step, and the links `last` and `best` that name two of them.

    A folder holds the model, `training.pt` (what a resumed run needs) and `stamp.json` (step, and which
    split and metric selected it). A save fills a temporary folder, renames it, then moves the links, `last`
    first: at no moment does a link name less than a whole checkpoint. What no link names is rubbish.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "last"

    @property
    def best(self) -> Path:
        """The one that validation chose; the newest where nothing is validated."""
        return self.folder / "best"

    def save(self, model: RetrievalModel, state: dict[str, Any], stamp: dict[str, Any], best: bool) -> None:
        """Write a checkpoint of `state["step"]` and drop those that are neither last nor best any more.

        Raises:
            TrainingError: it could not be written; the previous checkpoint is as it was.
        """
        name = f"step-{state['step']:08d}"
        temporary = self.folder / (TEMPORARY + name)
        try:
            temporary.mkdir(parents=True)
            save_model(model, temporary)
            write_state(state, temporary / STATE_FILE)
            (temporary / STAMP_FILE).write_text(json.dumps(stamp, indent=2) + "\n")
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            os.replace(temporary, self.folder / name)
            sync(self.folder)
            point_link(self.last, name)
            if best:
                point_link(self.best, name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk
            raise TrainingError(self._save_failed(state["step"], error)) from error
        finally:
            self.clean()

    def load(self) -> dict[str, Any] | None:
        """The state of the last checkpoint, None where there is none. Finishes what a kill interrupted.

        Raises:
            TrainingError: it is damaged.
        """
        for link in (self.last, self.best):
            if link.exists() and not link.is_symlink():
                raise TrainingError(
                    f"{link} is a folder and must be a link to one; copy runs with their links (cp -a), "
                    f"or {_elsewhere(self.folder.parent)}"
                )
        if self.last.is_symlink() and not self.last.exists():
            raise TrainingError(damaged(self.last, f"{os.readlink(self.last)} is gone", self.folder.parent))
        self.clean()
        if not self.last.exists():
            return None
        state = self._read_state()
        newest = os.readlink(self.last)
        chosen = state["best"] is not None and state["best"]["step"] == state["step"]
        if chosen and not (self.best.is_symlink() and os.readlink(self.best) == newest):
            point_link(self.best, newest)
            self.clean()
        return state

    def load_weights(self, model: RetrievalModel) -> None:
        """Put the last checkpoint's weights into `model`, in place.

        Raises:
            TrainingError: damaged, or of another shape.
        """
        file = self.last / MODEL_FILE
        try:
            load_strictly(model, load_file(file), str(file))
        except CheckpointError as error:
            raise TrainingError(f"{error}; {_elsewhere(self.folder.parent)}") from error
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrainingError(damaged(file, one_line(error), self.folder.parent)) from error

    def restore(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Put a loaded state's optimiser state into `optimizer`.

        Raises:
            TrainingError: it is not what a save of this run wrote.
        """
        try:
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises almost anything at what is not its own
            reason = f"its optimiser state does not fit ({one_line(error)})"
            raise TrainingError(damaged(self.last / STATE_FILE, reason, self.folder.parent)) from error

    def clean(self) -> None:
        """Remove what no link names: the remains of a kill, and checkpoints that are no longer wanted."""
        named = {os.readlink(link) for link in (self.last, self.best) if link.is_symlink()}
        for path in self.folder.glob("*"):
            if path.name.startswith("step-") and path.name not in named:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(TEMPORARY):
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

    def _save_failed(self, step: int, error: Exception) -> str:
        kept = f"the checkpoint in {self.last} is intact" if self.last.exists() else "there is no earlier one"
        return (
            f"cannot save the checkpoint of step {step} in {self.folder}: {one_line(error)}; {kept}; "
            f"{disk_remedy(error, elsewhere=False)} and start again"
        )

    def _read_state(self) -> dict[str, Any]:
        file = self.last / STATE_FILE
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's advice about pickles that are not its own
                state = torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # torch's unpickler raises almost anything at bytes that are not its own
            missing = isinstance(error, FileNotFoundError | PermissionError)
            reason = one_line(error) if missing else "the file is cut off or holds something else"
            raise TrainingError(damaged(file, reason, self.folder.parent)) from error
        if isinstance(state, dict):
            state.setdefault("tower_chunk", None)  # runs begun before there were chunks
        mismatch = _mismatch(state, _STATE_FIELDS)
        if not mismatch and state["best"] is not None:
            mismatch = _mismatch(state["best"], _STAMP_FIELDS)
        if mismatch:
            raise TrainingError(damaged(file, mismatch, self.folder.parent))
        return state


def read_stamp(folder: Path, run_dir: Path) -> dict[str, Any]:
    """The `stamp.json` of a checkpoint of `run_dir`.

    Raises:
        TrainingError: missing or damaged.
    """
    file = folder / STAMP_FILE
    try:
        stamp = json.loads(file.read_bytes())
    except OSError as error:
        raise TrainingError(damaged(file, one_line(error), run_dir)) from error
    except ValueError as error:
        raise TrainingError(damaged(file, "it is not valid JSON", run_dir)) from error
    reason = _mismatch(stamp, _STAMP_FIELDS)
    if reason:
        raise TrainingError(damaged(file, reason, run_dir))
    return stamp


def write_state(state: dict[str, Any], path: Path) -> None:
    """`torch.save` to a file. Given a path instead, torch would hide why a write failed."""
    with path.open("wb") as file:
        torch.save(state, file)


def damaged(file: Path, reason: str, run_dir: Path) -> str:
    """What to say of a file of a run that cannot be used."""
    return f"{file} cannot be read: {reason}; put it back from a copy, or {_elsewhere(run_dir)}"


def _elsewhere(run_dir: Path) -> str:
    return f"move {run_dir} aside or give another --run-dir to start anew"


def _mismatch(content: Any, fields: dict[str, Any]) -> str | None:
    """Why `content` is not a dict with values of these types; None where it is one."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    missing = [name for name in fields if name not in content]
    if missing:
        return f"it has no {', '.join(map(repr, missing))}"
    wrong = [name for name, kind in fields.items() if not isinstance(content[name], kind)]
    return f"its {wrong[0]!r} is {str(content[wrong[0]])[:40]!r}" if wrong else None


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` against other processes.

    Raises:
        TrainingError: another process trains there, or the folder cannot be written.
    """
    with writing(run_dir, " for the run", TrainingError):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    with file:
        try:
            # A record lock: unlike flock's, loader workers that outlive a killed run do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"another process is training in {run_dir}; choose another run folder"
            ) from error
        yield


@contextmanager
def disk_errors(run_dir: Path) -> Iterator[None]:
    """A full disk as one clear TrainingError, wherever it strikes."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise TrainingError(
            f"cannot write to {run_dir}: {error.strerror}; "
            f"{disk_remedy(error, elsewhere=False)} and start again to go on"
        ) from error


def differing_keys(saved: Any, given: Any, prefix: str = "") -> Iterator[str]:
    """`key (saved there, given here)` for each dotted key whose values differ."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in {**saved, **given}:
            yield from differing_keys(saved.get(key), given.get(key), f"{prefix}.{key}" if prefix else key)
    elif saved != given:
        yield f"{prefix} ({saved} there, {given} here)"
