"""Errors that are the user's to mend. The command line prints each as one line and exits with code 2."""

import errno


def disk_remedy(error: OSError) -> str:
    """What to do about a disk that does not take a file."""
    return (
        "make room or choose another place"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "choose another place"
    )


class UserError(Exception):
    """Bad input: the message names the culprit and the remedy. Base of every error below."""


class ConfigError(UserError):
    """A preset, key or value that does not exist or is impossible."""


class DatasetError(UserError):
    """Annotations or videos that are missing, malformed or do not fit the protocol."""


class AbsentError(DatasetError):
    """A split, or its annotation files, that are not there."""


class VideoError(UserError):
    """A video file that cannot be read; names the file, the decoder and the reason, in one line whatever the
    file is called."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", "\\n"))


class CheckpointError(UserError):
    """A checkpoint that is missing, unsafe, damaged or of another shape."""


class TrainingError(UserError):
    """A run that cannot start or go on: a folder in use, a loss that is not finite, a disk that is full."""
