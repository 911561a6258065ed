"""A run's state on disk: checkpoints that appear whole or not at all, and the lock on the run folder."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xclip_lab.atomic import TEMPORARY, point_link, sync
from xclip_lab.checkpoint import MODEL_FILE, save_model
from xclip_lab.errors import TrainingError
from xclip_lab.model import RetrievalModel

STATE_FILE = "training.pt"
STAMP_FILE = "stamp.json"


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
            torch.save(state, temporary / STATE_FILE)
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
        self.clean()
        if not self.last.exists():
            return None
        try:
            state = torch.load(self.last / STATE_FILE, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(self._damaged(error)) from error
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
        try:
            model.load_state_dict(load_file(self.last / MODEL_FILE))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrainingError(self._damaged(error)) from error

    def clean(self) -> None:
        """Remove what no link names: the remains of a kill, and checkpoints that are no longer wanted."""
        named = {os.readlink(link) for link in (self.last, self.best) if link.is_symlink()}
        for path in self.folder.glob("*"):
            if path.name.startswith("step-") and path.name not in named:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(TEMPORARY):
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

    def _save_failed(self, step: int, error: Exception) -> str:
        reason = one_line(error)
        kept = f"the checkpoint in {self.last} is intact" if self.last.exists() else "there is no earlier one"
        return (
            f"cannot save the checkpoint of step {step} in {self.folder}: {reason}; {kept}; "
            "free some space and start again"
        )

    def _damaged(self, error: Exception) -> str:
        reason = one_line(error)
        return f"the checkpoint {self.last} cannot be read: {reason}; remove {self.folder} to start anew"


def one_line(error: Exception) -> str:
    """An error's reason without line breaks or the C++ stack that torch adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` against other processes.

    Raises:
        TrainingError: another process trains there, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise TrainingError(f"cannot write to the run folder {run_dir}: {one_line(error)}") from error
    with file:
        try:
            # A record lock: unlike flock's, loader workers that outlive a killed run do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"another process is training in {run_dir}; choose another run folder"
            ) from error
        yield


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch: a model's dropout may use any of them."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global generator, in types that a weights-only load accepts."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    inner = numpy_state["state"]
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**inner, "key": torch.from_numpy(inner["key"].astype(np.int64))}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo everything that was drawn since `random_state`."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    key = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": key}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
