"""What is in a video file: its stream, the number and times of its frames, and whether all of it is there."""

from __future__ import annotations

import itertools
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.stream import Disposition

from xclip_lab import frame_folder, matroska
from xclip_lab.errors import VideoError
from xclip_lab.indexed import PacketIndex, index_packets

# Demuxers that make "video" of what is none: pictures, text art, lists of other files.
_NOT_VIDEO = ("_pipe", "image2", "ico", "tty", "concat", "hls", "dash")
# Where seeking lands on the right frame; elsewhere decord hands out another one and says nothing.
_SEEKS = ("mp4", "matroska")
# A file whose last frame ends this much before the length that the container declares was cut off. Declared
# lengths are rounded, and the sound may run on a little.
_MISSING_SECONDS = 0.5


@dataclass(frozen=True)
class VideoInfo:
    """What a file, or a folder of frames, says of its video.

    Attributes:
        frame_count: frames that can be shown. fps: the mean rate, frames a second. duration: seconds.
        width, height: pixels as displayed (after rotation). rotation: degrees counter-clockwise that a player
            turns the stored picture by. codec: FFmpeg's name, `frames` for a folder.
        timestamps: float64 `[F]`, seconds from the first frame.
        files: the frames of a folder, in order; empty for a file.
    """

    path: Path
    frame_count: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    codec: str
    timestamps: np.ndarray = field(repr=False)
    files: tuple[Path, ...] = field(default=(), repr=False)
    _mirrored: bool = False
    _stream: int = field(default=0, repr=False)
    _clock_start: float | None = field(default=None, repr=False)
    _keys: np.ndarray = field(default_factory=lambda: np.zeros(1, int), repr=False)
    _decord_fits: bool = field(default=False, repr=False)
    _packets: PacketIndex | None = field(default=None, repr=False)


def probe(path: str | Path) -> VideoInfo:
    """Describe a video file or a folder of frames, decoding no more than the first frame.

    Not every format says how much there is: of a transport stream cut between two packets, an MPEG program
    stream, a bare codec stream or an ASF recorded live, nobody can tell that the end is missing.

    Raises:
        VideoError: no path, no such file, not a video, without a frame, or shorter than it says it is.
    """
    try:
        path = Path(path)
    except TypeError as error:
        raise VideoError(f"{path!r} is no path; give a video file or a folder of frames") from error
    try:
        if path.is_dir():
            return _scan_folder(path)
        if not path.exists():
            raise VideoError(f"{path}: no such file")
        if not path.is_file():
            raise VideoError(f"{path}: not a file")
        if path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty (0 bytes)")
        return _scan(path)
    except VideoError:
        raise
    except Exception as error:  # FFmpeg's errors derive from half a dozen built-in ones
        raise VideoError(f"{path}: PyAV: {reason(error)}") from error


def open_container(path: Path, **options: str) -> av.container.InputContainer:
    """Open a video file with PyAV and nothing but this file."""
    # An absolute path, or FFmpeg would take what stands before a colon in a file's name for a protocol.
    container = av.open(os.path.abspath(path), options={"protocol_whitelist": "file"} | options)
    for stream in container.streams.video:
        if stream.codec_context is not None:
            # Not by the number of cores: FFmpeg's VP8 reports damage only where it runs more than one thread.
            stream.codec_context.thread_count = 2
    return container


def reason(error: Exception) -> str:
    """An error in one line, without the addresses and source lines that decord adds."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"^\[[\d:]+\] \S+: ", "", lines[0]) if lines else ""
    return re.sub(r"\[[\d:]+\] \S+/(\S+?): ", "", text) or type(error).__name__


def _scan_folder(path: Path) -> VideoInfo:
    files = tuple(frame_folder.images(path))
    height, width = frame_folder.size(files[0])
    fps = frame_folder.rate(path)
    return VideoInfo(
        path=path,
        frame_count=len(files),
        fps=fps,
        duration=len(files) / fps,
        width=width,
        height=height,
        rotation=0,
        codec="frames",
        timestamps=np.arange(len(files)) / fps,
        files=files,
    )


def _scan(path: Path) -> VideoInfo:
    """Read every packet's header: the one way to a frame count and times that holds for every container."""
    with open_container(path) as container:
        kind = container.format.name
        if any(name.endswith(_NOT_VIDEO) for name in kind.split(",")):
            raise VideoError(f"{path}: PyAV: not a video ({container.format.long_name})")
        stream = _video_stream(container)
        if stream is None:
            raise VideoError(f"{path}: PyAV: no video stream in it (sound or cover art only)")
        if stream.codec_context is None:
            raise VideoError(f"{path}: PyAV: no decoder for its codec; it may be encrypted")
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = [packet for packet in packets if not (packet.is_discard or _is_hidden(packet, stream))]
        if not shown:
            raise VideoError(f"{path}: PyAV: no frame in it")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        # AVI numbers the slots of its frames in the file's order; what is read as times there is a guess.
        is_avi = "avi" in kind
        ticks = [packet.dts if is_avi else packet.pts for packet in shown]
        step = float(stream.time_base or 1)
        times = np.sort([tick * step for tick in ticks if tick is not None])
        is_timed = len(times) == len(shown) and bool((np.diff(times) > 0).all())
        clocked = is_timed and not is_avi
        timestamps = times - times[0] if is_timed else np.arange(len(shown)) / (fps or 1.0)
        tail = (shown[-1].duration or 0) * step
        duration = float(timestamps[-1]) + (tail or (1 / fps if fps else 0.0))
        end = float(times[0]) + duration if clocked else None
        _check_whole(path, container, stream, packets, end)
        key_times = [(packet.pts or 0) * step for packet in shown if clocked and packet.is_keyframe]
        codec, index = stream.codec_context.codec.canonical_name, container.streams.video.index(stream)
        seeks = clocked and len(shown) == len(packets) and any(name in kind for name in _SEEKS)
        # decord's FFmpeg is older than AV1.
        decord_fits = seeks and codec != "av1" and not _has_open_groups(packets)
        frame = _first_frame(path, stream, packets[0])
        packet_index = index_packets(packets, stream, frame) if seeks else None
    rotation, mirrored, width, height = _geometry(frame)
    return VideoInfo(
        path=path,
        frame_count=len(shown),
        fps=fps or len(shown) / duration,
        duration=duration,
        width=width,
        height=height,
        rotation=rotation,
        codec=codec,
        timestamps=timestamps,
        _mirrored=mirrored,
        _stream=index,
        _clock_start=float(times[0]) if clocked else None,
        _keys=np.union1d([0], np.searchsorted(times, key_times)).astype(int),
        _decord_fits=decord_fits and not mirrored,
        _packets=packet_index,
    )


def _video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The stream that a player would show; a cover picture is none."""
    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    return next((stream for stream in moving if stream is best), moving[0] if moving else None)


def _is_hidden(packet: av.Packet, stream: av.VideoStream) -> bool:
    """VP8's alternate reference frames are never shown; a bit of their first byte says so."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def _has_open_groups(packets: list[av.Packet]) -> bool:
    """Whether frames that follow a key frame in the file are shown before it; decord then seeks wrongly."""
    key = None
    for packet in packets:
        if packet.is_keyframe:
            key = packet.pts
        elif key is not None and packet.pts is not None and packet.pts < key:
            return True
    return False


def _check_whole(
    path: Path,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: list[av.Packet],
    end: float | None,
) -> None:
    """Raise VideoError where the file holds less than it declares: frames, bytes or seconds (as far as `end`,
    None where the frames have no times)."""
    kind = container.format.name
    # In AVI a slot without data repeats the frame before it.
    there = (packets[-1].dts or 0) + 1 if "avi" in kind else len(packets)
    if stream.frames > max(there, len(packets)) and not _is_trimmed(path, container, stream):
        raise VideoError(f"{path}: PyAV: cut off: {len(packets)} of {stream.frames} frames are there")
    least_size = next((least for name, least in _LEAST_SIZES.items() if name in kind), None)
    if least_size is not None:
        size = path.stat().st_size
        with path.open("rb") as file:
            if least_size(file, size) > size:
                raise VideoError(f"{path}: PyAV: cut off: it does not end as its format does")
    if "matroska" in kind:
        matroska.check_whole(path)
    seconds = _declared_seconds(container, stream)
    if seconds is not None and end is not None and end < seconds - _MISSING_SECONDS:
        raise VideoError(f"{path}: PyAV: cut off: {end:.2f} of {seconds:.2f} seconds are there")


def _is_trimmed(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether all declared frames are there and an edit list leaves some of them out."""
    if "mp4" not in container.format.name:
        return False
    with open_container(path, ignore_editlist="1") as whole:
        return sum(packet.size > 0 for packet in whole.demux(whole.streams[stream.index])) >= stream.frames


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box of a fragmented MP4 ends by its own word; other MP4 files count their frames."""
    place, fragments = 0, 0
    while place < size:
        file.seek(place)
        header = file.read(8)
        length, kind = struct.unpack(">I4s", header.ljust(8, b"-"))
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length < 8 or not (kind.isalnum() or len(header) < 8):  # to the end of the file, or no box
            break
        fragments += kind == b"moof"
        place += length
    return place if fragments else 0


def _end_of_gif(file: BinaryIO, size: int) -> int:
    """A GIF ends with a semicolon."""
    file.seek(-min(size, 1024), os.SEEK_END)
    return size if file.read().rstrip(b"\0\r\n").endswith(b";") else size + 1


def _end_of_packets(file: BinaryIO, size: int) -> int:
    """A transport stream is made of packets of equal length, each with a byte 0x47 at the same place."""
    head, lengths = file.read(1 << 12), (188, 192, 204)
    fitting = [n for n in lengths if any({*head[place::n]} == {0x47} for place in range(n))] or lengths
    return size if any(size % length == 0 for length in fitting) else size + 1


def _end_of_asf_data(file: BinaryIO, size: int) -> int:
    """Where the packets of an ASF (WMV) end, by the length that stands before them; 0 for what was sent live,
    before anyone knew."""
    header = file.read(1 << 16)
    place = int.from_bytes(header[16:24], "little")
    file.seek(place)
    data, properties = file.read(24), header.find(_ASF_PROPERTIES)
    flags = header[properties + 88 : properties + 89]
    if properties < 0 or not flags or flags[0] & 1 or not data.startswith(_ASF_DATA):
        return 0
    return place + int.from_bytes(data[16:], "little")


_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")


# By a part of FFmpeg's name of the format: how many bytes a whole file has at least.
_LEAST_SIZES: dict[str, Callable[[BinaryIO, int], int]] = {
    "mp4": _end_of_boxes,
    "gif": _end_of_gif,
    "mpegts": _end_of_packets,
    "asf": _end_of_asf_data,
}


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """The end of the video stream as Matroska, WebM and FLV note it; other containers count their frames."""
    if container.format.name not in ("matroska,webm", "flv"):
        return None
    if "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else None


def _first_frame(path: Path, stream: av.VideoStream, packet: av.Packet) -> av.VideoFrame:
    """The first frame that can be decoded: as a rule that of the first packet."""
    frames = [*stream.codec_context.decode(packet), *stream.codec_context.decode(None)]
    if not frames:
        with open_container(path) as container:
            video = container.streams.video[stream.container.streams.video.index(stream)]
            frames = list(itertools.islice(container.decode(video), 1))
    if not frames:
        raise VideoError(f"{path}: PyAV: not one frame can be decoded")
    return frames[0]


def _geometry(frame: av.VideoFrame) -> tuple[int, bool, int, int]:
    """Rotation in degrees counter-clockwise, whether the picture is mirrored left to right before it, then
    width and height after it."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    rotation, mirrored = _turn(bytes(matrix)) if isinstance(matrix, SideData) else (0, False)
    width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
    return rotation, mirrored, width, height


def _turn(display_matrix: bytes) -> tuple[int, bool]:
    """Quarter turns in degrees counter-clockwise and mirroring (before them) of FFmpeg's 3 x 3 matrix."""
    a, b, _, c, d = struct.unpack("=5i", display_matrix[:20])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return round(np.degrees(np.arctan2(-b, a)) / 90) * 90 % 360, mirrored
