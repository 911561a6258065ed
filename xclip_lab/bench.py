"""`xclip-lab bench`: the project's benchmarks, each a script of its own in `benchmarks/`."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from xclip_lab.errors import UserError
from xclip_lab.registry import did_you_mean

FOLDER = Path(__file__).parent.parent / "benchmarks"
_SHARED = ("measure", "models", "official")


def benchmarks() -> dict[str, str]:
    """Names, and what each measures: the first line of its script.

    Raises:
        UserError: the package was installed without them.
    """
    if not FOLDER.is_dir():
        raise UserError(
            f"the benchmarks do not come with an installed package and there are none in {FOLDER}; "
            "work in a clone of the project"
        )
    scripts = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem not in _SHARED}
    docstrings = {name: ast.get_docstring(ast.parse(path.read_text())) for name, path in scripts.items()}
    return {name: (text or "").split("\n")[0] for name, text in docstrings.items()}


def run(name: str, arguments: Sequence[str]) -> None:
    """Run one in this process, with arguments of its own.

    Raises:
        UserError: no such benchmark.
    """
    known = benchmarks()
    if name not in known:
        raise UserError(f"unknown benchmark {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
    script = str(FOLDER / f"{name}.py")
    before, sys.argv = (sys.argv, sys.path), [script, *arguments]
    sys.path = [str(FOLDER.parent), *sys.path]  # for what the benchmarks share
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path = before
