"""Where the reference data lie that the repository does not carry, and how tests say that they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("XCLIP_LAB_SHARED", ROOT.parent / "shared"))
CARRIED = Path(__file__).parent / "parity" / "data"


def shared(*parts: str) -> Path:
    """The path of a reference file or folder."""
    return SHARED.joinpath(*parts)


def golden_path(*parts: str) -> Path:
    """A file of the official code's numbers: the full one where it is, else the cut one that tests carry."""
    full = shared("goldens", *parts)
    return full if full.exists() else CARRIED.joinpath(*parts)


def golden_paths(pattern: str) -> list[Path]:
    """Every file of the official code's numbers that matches, from the same two places."""
    return sorted(shared("goldens").glob(pattern)) or sorted(CARRIED.glob(pattern))


def needs_shared(*parts: str) -> pytest.MarkDecorator:
    """Skip a test, with the reason in words, where a reference file or folder is absent."""
    return _needs(shared(*parts), "/".join(parts))


def needs_golden(*parts: str) -> pytest.MarkDecorator:
    """Skip a test, with the reason in words, where the official code's numbers are absent."""
    return _needs(golden_path(*parts), "/".join(("goldens", *parts)))


def _needs(path: Path, name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not path.exists(), reason=f"reference data {name!r} not found: set XCLIP_LAB_SHARED"
    )
