"""Whether a Matroska or WebM file is whole: FFmpeg leaves out in silence what it cannot make out there."""

from __future__ import annotations

import os
import zlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO

from xclip_lab.errors import VideoError

_SEGMENT, _INFO, _TRACKS, _CLUSTER, _CRC = 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0xBF
_TRACK_ENTRY, _TRACK_NUMBER, _BLOCK_GROUP, _BLOCKS = 0xAE, 0xD7, 0xA0, {0xA1, 0xA3}
# All that RFC 9559 lets stand anywhere, in a segment, in a cluster and in a group of blocks.
_KNOWN = {0x1A45DFA3, _SEGMENT, 0xEC, _CRC}
_KNOWN |= {_INFO, _TRACKS, _CLUSTER, 0x114D9B74, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
_KNOWN |= {_BLOCK_GROUP, *_BLOCKS, 0xE7, 0x5854, 0xA7, 0xAB, 0xAF}
_KNOWN |= {0xA2, 0x75A1, 0x9B, 0xFA, 0xFB, 0xFD, 0xA4, 0x75A2, 0x8E, 0xC8}


def check_whole(path: Path) -> None:
    """Look at the headers of a file's elements, and at the checksums of the clusters that have one.

    Raises:
        VideoError: an element does not follow the one before it, is cut off or is data of no track, or a
            cluster does not fit its checksum.
    """
    tracks, used = set(), {}  # used, by track: where data of it are
    cluster: tuple[int, int | None] = (0, None)
    try:
        with path.open("rb", buffering=0) as file:
            size, masters = file.seek(0, os.SEEK_END), {_SEGMENT, _CLUSTER, _BLOCK_GROUP}
            for kind, begin, end in _elements(file, 0, size, masters, _KNOWN):
                if kind in _BLOCKS:
                    used[_number(_read(file, begin, 8))[0]] = begin
                elif kind == _CLUSTER:
                    cluster = begin, end
                elif kind == _CRC and begin == cluster[0] + 2 and cluster[1]:  # first in a cluster
                    _check_sum(file, begin, begin + 4, cluster[1])
                elif kind in (_TRACKS, _INFO) and end:
                    for inner, first, last in _elements(file, begin, end, {_TRACK_ENTRY}):
                        if inner == _TRACK_NUMBER and last:
                            tracks.add(int.from_bytes(_read(file, first, last - first), "big"))
        for track in used.keys() - tracks:
            raise ValueError(f"the data at byte {used[track]} belong to no track")
    except ValueError as error:
        raise VideoError(f"{path}: PyAV: damaged or cut off: {error}") from error


def _elements(
    file: BinaryIO, place: int, end: int, masters: Container[int], known: Container[int] | None = None
) -> Iterator[tuple[int, int, int | None]]:
    """Kind of the elements between two places, begin and end (None: untold) of what is in them; those within
    `masters` too. What follows a segment is not looked at."""
    ends = [end]
    while place < ends[0]:
        header = _read(file, place, 12)
        width = _number(header)[1]
        kind = int.from_bytes(header[:width], "big")
        length, more = _number(header[width:])
        if width > 4 or more > 8 or not (known is None or kind in known):
            raise ValueError(f"no element begins at byte {place}")
        begin, after = place + width + more, place + width + more + length
        is_open = length == (1 << 7 * more) - 1 and kind in (_SEGMENT, _CLUSTER)
        if after > ends[-1] and not is_open:
            raise ValueError(f"the element at byte {place} is not all there")
        yield kind, begin, None if is_open else after
        if kind in masters and not is_open:
            ends = [after] if kind == _SEGMENT else [*ends, after]
        place = begin if kind in masters else after
        while place == ends[-1] and len(ends) > 1:
            ends.pop()


def _number(data: bytes) -> tuple[int, int]:
    """A number and how many bytes it takes, which its leading zero bits tell; 9 where there is none."""
    width = 9 - (data[0] if data else 0).bit_length()
    return int.from_bytes(data[:width], "big") & ((1 << 7 * width) - 1), width


def _check_sum(file: BinaryIO, place: int, begin: int, end: int) -> None:
    found = 0
    for start in range(begin, end, 1 << 20):
        found = zlib.crc32(_read(file, start, min(1 << 20, end - start)), found)
    if found != int.from_bytes(_read(file, place, 4), "little"):
        raise ValueError(f"bytes {begin} to {end} do not fit their checksum")


def _read(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
