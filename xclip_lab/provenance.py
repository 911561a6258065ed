"""What a result was made with: versions of code and libraries, and a fingerprint of the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from xclip_lab.datasets.base import VideoTextDataset

_LIBRARIES = ("xclip-lab", "torch", "torchvision", "open_clip_torch", "decord", "av", "numpy")


def versions() -> dict[str, str | None]:
    """Version of the package, of Python and of each library that can change a number; None where absent.

    `git` is the commit of the working copy that the package lies in, with `+changes` where it is not clean.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "git": _git_commit()}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def dataset_fingerprint(dataset: VideoTextDataset) -> str:
    """SHA-256 of the list of samples (ids, captions, times; not where the files lie)."""
    rows = [(s.video_id, s.caption, s.start, s.end) for s in dataset.samples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def _git_commit() -> str | None:
    package = Path(__file__).parent
    # An installed copy may lie inside some other project's working copy: ask whether git knows this file.
    if _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    return commit and commit + ("+changes" if _git(package, "status", "--porcelain", "-uno", ".") else "")


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
