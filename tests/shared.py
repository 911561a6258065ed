"""Where the reference data lie that the repository does not carry, and how tests say that they are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("XCLIP_LAB_SHARED", ROOT.parent / "shared"))


def shared(*parts: str) -> Path:
    """The path of a reference file or folder."""
    return SHARED.joinpath(*parts)


def needs_shared(*parts: str) -> pytest.MarkDecorator:
    """Skip a test, with the reason in words, where a reference file or folder is absent."""
    name = "/".join(parts)
    return pytest.mark.skipif(
        not shared(*parts).exists(), reason=f"reference data {name!r} not found: set XCLIP_LAB_SHARED"
    )
