"""Errors that are the user's to mend, and how they are worded. The command line prints each as one line and
exits with code 2."""

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_MACHINE = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EIO)
_FEW = 5
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """Bad input: the message names the culprit and the remedy, in one line whatever a file is called. Base of
    every error below."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ConfigError(UserError):
    """A preset, key or value that does not exist or is impossible."""


class DatasetError(UserError):
    """Annotations or videos that are missing, malformed or do not fit the protocol."""


class AbsentError(DatasetError):
    """A split, or its annotation files, that are not there."""


class VideoError(UserError):
    """A video file that cannot be read; names the file, the decoder and the reason."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unsafe, damaged or of another shape."""


class InputError(UserError, ValueError):
    """Tensors of shapes or values that a model cannot take."""


class TrainingError(UserError):
    """A run that cannot start or go on: a folder in use, a loss that is not finite, a disk that is full."""


@contextmanager
def writing(place: str | Path, then: str = "", kind: type[UserError] = DatasetError) -> Iterator[None]:
    """Files that are written at `place`: a disk that does not take them is one line, which ends in `then`.

    Raises:
        UserError: of this `kind`, instead of an OSError.
    """
    try:
        yield
    except BrokenPipeError:  # not of these files
        raise
    except OSError as error:
        file = error.filename2 or error.filename or place  # the second is what was to be replaced
        raise kind(f"{file}: {one_line(error)}; {disk_remedy(error)}{then}") from error


def disk_remedy(error: BaseException, elsewhere: bool = True) -> str:
    """What to do about a disk that does not take a file; whether it may go `elsewhere`."""
    number = _error_number(error)
    if number == errno.EFBIG:
        return "raise the limit on the size of a file (ulimit -f)"
    if number in _OF_MACHINE:
        return "mend that"
    full = number in (errno.ENOSPC, errno.EDQUOT)
    if not elsewhere:
        return "make room" if full else "mend that"
    return "make room or choose another place" if full else "choose another place"


def one_line(error: BaseException) -> str:
    """An error's reason without line breaks or the C++ stack that torch adds; of a disk error the system's
    own words, whatever it is wrapped in."""
    number = _error_number(error)
    if number in DISK_ERRORS:
        return os.strerror(number)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _error_number(error: BaseException | None) -> int | None:
    """The system's number of a failure, or of the one during whose handling it came about."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        named = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors words it
        if named:
            return int(named[1])
        error = error.__cause__ or error.__context__
    return None


def printable(name: str) -> str:
    """A name, or what holds one, as text in one line that any file and terminal takes: files' names may hold
    line breaks, other control characters, and bytes that are no UTF-8.

    >>> print(printable("a\\nb\\udcff.mp4"))
    a\\nb\\udcff.mp4
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def first_few(names: Iterable[object], between: str = ", ") -> str:
    """Five names at most, and whether there are more.

    >>> first_few("abcdef")
    'a, b, c, d, e, ...'
    """
    shown = [*map(str, names)]
    return between.join([*shown[:_FEW], "..."] if len(shown) > _FEW else shown)


def count_and_first(videos: Sequence[str]) -> str:
    """`3 videos: a, b, c`, at most five names."""
    return f"{len(videos)} video{'s' if len(videos) > 1 else ''}: {first_few(videos)}"
