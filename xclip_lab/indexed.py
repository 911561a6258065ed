"""The fast way to read frames of H.264 and H.265: decode only what the wanted ones are made of.

A packet's own headers tell where decoding can begin and which frames no other one refers to. From the last
such beginning before a wanted frame, the frames that others refer to are decoded and those that are wanted;
the rest is not looked at. Where the headers leave a doubt there is no index, and another way has to be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np

from xclip_lab.errors import VideoError

# The formats whose conversion to RGB is the same, bit for bit, in every version of FFmpeg that reads here.
_PIXELS = ("yuv420p", "yuvj420p")


class PacketIndex(NamedTuple):
    """The packets of a stream in the file's order, each of one frame.

    Attributes:
        pts: int64 `[P]` ticks at which the frames are shown. seeks: int64 `[P]` ticks by which the container
            finds a packet. needed: bool `[P]`, false where no frame refers to this one. starts: int64 `[K]`
            packets from which on decoding is exact for all frames that are shown from them on.
        size: width and height of the frames as stored.
    """

    pts: np.ndarray
    seeks: np.ndarray
    needed: np.ndarray
    starts: np.ndarray
    size: tuple[int, int]


class _Headers(NamedTuple):
    """What a packet says of its frame: whether decoding can begin here, whether frames of its own or a higher
    level may refer to it, its level, and whether parameter sets come along."""

    start: bool
    referred: bool
    level: int
    sets: bool


def index_packets(
    packets: Sequence[av.Packet], stream: av.VideoStream, first: av.VideoFrame
) -> PacketIndex | None:
    """The index of a stream of an MP4 or Matroska file, None where it is not to be trusted.

    Args:
        packets: all of the stream, in the file's order. first: its first frame.
    """
    context = stream.codec_context
    known = {"h264": (_read_h264, 4), "hevc": (_read_hevc, 21)}.get(context.name)
    extradata = context.extradata or b""
    if known is None or first.format.name not in _PIXELS or first.interlaced_frame:
        return None
    read, place = known
    if len(extradata) <= place or extradata[0] != 1:  # packets of another layout
        return None
    pts = [packet.pts for packet in packets]
    if None in pts or len(set(pts)) < len(pts):
        return None
    if any(packet.is_corrupt or packet.has_sidedata("new_extradata") for packet in packets):
        return None
    try:
        headers = [read(list(_units(packet, (extradata[place] & 3) + 1))) for packet in packets]
    except (ValueError, IndexError):
        return None
    starts = [place for place, header in enumerate(headers) if header.start]
    with_sets = [place for place, header in enumerate(headers) if header.sets]
    if starts[:1] != [0] or with_sets not in ([], starts):
        return None
    top = max(header.level for header in headers)
    by_dts = "mp4" in stream.container.format.name and all(packet.dts is not None for packet in packets)
    return PacketIndex(
        pts=np.array(pts, dtype=np.int64),
        seeks=np.array([packet.dts for packet in packets] if by_dts else pts, dtype=np.int64),
        needed=np.array([header.referred or header.level < top for header in headers]),
        starts=np.array(starts),
        size=(first.width, first.height),
    )


def decode(
    container: av.container.InputContainer, stream: av.VideoStream, index: PacketIndex, wanted: np.ndarray
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The wanted frames, each once, with their numbers in the order of time.

    Args:
        container: just opened, and `stream` of it that `index` is of.

    Raises (while iterating):
        VideoError: a frame is missing, damaged or of another form. Other errors are FFmpeg's.
    """
    stream.codec_context.thread_count = 1
    shown = np.argsort(index.pts)
    numbers = {int(index.pts[shown[number]]): number for number in np.unique(wanted).tolist()}
    for run in _runs(index, shown[np.unique(wanted)]):
        missing = {int(index.pts[packet]) for packet in run.wanted}
        for frame in _decode_run(container, stream, index, run):
            if frame.is_corrupt and (frame.pts is None or frame.pts >= index.pts[run.start]):
                raise VideoError(f"the frame at tick {frame.pts} is damaged")
            if frame.pts in missing:
                if (frame.width, frame.height) != index.size or frame.format.name not in _PIXELS:
                    raise VideoError(f"the frame at tick {frame.pts} has another form than the first")
                missing.remove(frame.pts)
                yield numbers[frame.pts], frame
        if missing:
            raise VideoError(f"the frame at tick {min(missing)} is missing")


class _Run(NamedTuple):
    """Packets from a start to the last wanted one of `wanted`."""

    start: int
    wanted: set[int]


def _runs(index: PacketIndex, wanted: np.ndarray) -> list[_Run]:
    """What to decode for these packets, without overlap."""
    groups: dict[int, set[int]] = {}
    for packet in wanted.tolist():
        before = index.starts[: np.searchsorted(index.starts, packet, side="right")]
        # What follows a start in the file and is shown before it may refer to what lies before the start.
        before = before[index.pts[before] <= index.pts[packet]]
        if not len(before):
            raise VideoError(f"nothing to begin with before packet {packet}")
        groups.setdefault(int(before[-1]), set()).add(packet)
    runs: list[_Run] = []
    for start, packets in sorted(groups.items()):
        if runs and start <= max(runs[-1].wanted) + 1:
            runs[-1].wanted.update(packets)
        else:
            runs.append(_Run(start, packets))
    return runs


def _decode_run(
    container: av.container.InputContainer, stream: av.VideoStream, index: PacketIndex, run: _Run
) -> Iterator[av.VideoFrame]:
    """All frames that are decoded for a run, in the order of time."""
    container.seek(int(index.seeks[run.start]), stream=stream)
    place, last = None, max(run.wanted)
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if place is None:  # a container may find an earlier packet
            place = int(np.flatnonzero(index.pts == packet.pts)[0])
            if place > run.start:
                raise VideoError(f"seeking leads past packet {run.start}")
        if packet.pts != index.pts[place]:
            raise VideoError(f"packet {place} is not where it was")
        if place >= run.start and (index.needed[place] or place in run.wanted):
            yield from stream.codec_context.decode(packet)
        place += 1
        if place > last:
            break
    yield from stream.codec_context.decode(None)


def _units(packet: av.Packet, width: int) -> Iterator[memoryview]:
    """The units of a packet, each after its length in `width` bytes."""
    data = memoryview(packet)
    place = 0
    while place < len(data):
        begin = place + width
        place = begin + int.from_bytes(data[place:begin], "big")
        if not begin < place <= len(data):
            raise ValueError("a unit that is not all there")
        yield data[begin:place]


def _read_h264(units: list[memoryview]) -> _Headers:
    """ITU-T H.264, 7.3.1 and 7.4.1; the recovery point of D.2.8 (D.1.8) begins an open group of pictures."""
    kinds = [unit[0] & 31 for unit in units]
    if not {1, 5} & set(kinds) or not set(kinds) <= {1, 5, 6, 7, 8, 9, 12}:
        raise ValueError("parts of a picture that are not known here")
    # First message: of kind 6; recovery after 0 frames, exact, no broken link: bits 1, 1, 0.
    recovers = any(
        unit[1] == 6 and unit[3] >> 5 == 0b110 for unit, kind in zip(units, kinds, strict=True) if kind == 6
    )
    referred = any(unit[0] & 0x60 for unit, kind in zip(units, kinds, strict=True) if kind in (1, 5))
    return _Headers(5 in kinds or (recovers and referred), referred, 0, bool({7, 8} & set(kinds)))


def _read_hevc(units: list[memoryview]) -> _Headers:
    """ITU-T H.265, 7.3.1.2 and table 7-1: even kinds below 16 serve higher sub-layers only."""
    kinds = [unit[0] >> 1 & 63 for unit in units]
    pictures = {kind for kind in kinds if kind < 32}
    if not pictures or not set(kinds) <= {*range(10), 19, 20, 21, 32, 33, 34, 35, 38, 39, 40}:
        raise ValueError("parts of a picture that are not known here")
    if any(unit[0] & 1 or unit[1] >> 3 for unit in units):
        raise ValueError("more than one layer")
    referred = any(kind >= 16 or kind % 2 for kind in pictures)
    level = max(unit[1] & 7 for unit in units)
    return _Headers(min(pictures) >= 16, referred, level, bool({32, 33, 34} & set(kinds)))
