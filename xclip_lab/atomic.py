"""Files that are either there whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xclip_lab.errors import DatasetError, UserError, writing

TEMPORARY = ".tmp-"
"""Prefix of everything that is being written; what carries it after a kill is rubbish."""


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Where to write the file or folder that then takes the place of `path`; it is gone if that fails. By
    default one beside it, for a single writer."""
    temporary = temporary or path.with_name(TEMPORARY + path.name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`. Raises OSError and leaves the old file where it cannot."""
    with replacing(path) as temporary:
        temporary.write_text(text)
        sync(temporary)
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path`, in a folder that is made where it is not there. Through a temporary file of its own,
    whatever process on whatever machine writes beside it. Raises OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{path.name}")) as temporary:
        temporary.write_bytes(content)
        sync(temporary)


def check_writable(folder: str | Path, then: str = "", kind: type[UserError] = DatasetError) -> None:
    """Refuse, before long work, a folder that would not take its outcome. Nothing is made: where it is not
    there yet, the folder is tried that it would be made in.

    Raises:
        UserError: of this `kind`; the line ends in `then`, as of `errors.writing`.
    """
    folder = Path(folder)
    with writing(folder, then, kind):
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:  # it names the temporary file
            raise OSError(error.errno, error.strerror, str(there)) from error


def point_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to its sibling `target`, in one step whether or not it existed."""
    temporary = link.with_name(TEMPORARY + link.name)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
