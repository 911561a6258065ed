"""Video files: what is in them, which frames to take, their pixels. decord, or PyAV where it cannot.

decord is built for few platforms; where it is not installed PyAV reads everything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import av
import numpy as np
from av.stream import Disposition

from xclip_lab import sampling
from xclip_lab.errors import VideoError

try:
    import decord
except ImportError:
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)

Decoder = Literal["decord", "pyav"]
Sampler = Literal["official", "clip2video", "glscl", "uniform"]

# Demuxers that make "video" of what is none: pictures, text art, lists of other files.
_NOT_VIDEO = ("_pipe", "image2", "tty", "concat", "hls", "dash")
# Where decord's seeking lands on the right frame; elsewhere it hands out another one and says nothing.
_DECORD_SEEKS = ("mp4", "matroska")
# A file whose last frame ends this much before the length that the container declares was cut off. Declared
# lengths are rounded, and the sound may run on a little.
_MISSING_SECONDS = 0.5
_CLOCK_ERROR = 1e-4


class VideoFrames(NamedTuple):
    """`frames` uint8 `[F, H, W, 3]` RGB, upright; `timestamps` float64 `[F]` seconds from the first frame."""

    frames: np.ndarray
    timestamps: np.ndarray


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video.

    Attributes:
        frame_count: frames that can be shown. fps: the mean rate, frames a second. duration: seconds.
        width, height: pixels as displayed (after rotation). rotation: degrees counter-clockwise that a player
            turns the stored picture by. codec: FFmpeg's name.
        timestamps: float64 `[F]`, seconds from the first frame.
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
    _stream: int = field(repr=False)
    _clock_start: float | None = field(repr=False)
    _keys: np.ndarray = field(repr=False)
    _decord_fits: bool = field(repr=False)


def probe(path: str | Path) -> VideoInfo:
    """Describe a video without decoding more than its first frame.

    Raises:
        VideoError: no such file, not a video, without a frame, or shorter than it says it is.
    """
    path = Path(path)
    try:
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
        raise VideoError(f"{path}: PyAV: {_reason(error)}") from error


def frame_indices(
    info: VideoInfo,
    sampler: Sampler = "official",
    max_frames: int = 12,
    feature_framerate: int = 1,
    slice_framepos: int = 2,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """The frames that a sampler takes from a video, at most `max_frames`, in the order they are shown.

    `official` is CLIP4Clip's and X-CLIP's, `glscl` and `clip2video` are those families' (see
    `sampling.official_indices` and so on); `slice_positions` cuts what they give (GLSCL and CLIP2Video always
    evenly: `slice_framepos` 2). `uniform` takes frames evenly in time. `start` and `end` in seconds. Empty
    where the stretch holds no frame. `clip2video` may name a frame twice.

    Raises:
        ValueError: another sampler or `slice_framepos`, or the sampler cannot serve such a frame rate,
            start or length.
    """
    if sampler == "uniform":
        return sampling.uniform_indices(info.timestamps, info.duration, max_frames, start, end)
    if sampler == "official":
        sampled = sampling.official_indices(info.frame_count, info.fps, feature_framerate, start, end)
    elif sampler == "glscl":
        sampled = sampling.glscl_indices(info.frame_count, info.fps, feature_framerate, start, end)
    elif sampler == "clip2video":
        sampled = sampling.clip2video_indices(info.timestamps, info.duration, feature_framerate, start, end)
    else:
        names = ", ".join(repr(name) for name in get_args(Sampler))
        raise ValueError(f"sampler {sampler!r} is not one of {names}")
    positions = sampling.slice_positions(len(sampled), max_frames, slice_framepos)
    return [sampled[position] for position in positions]


def read_frames(
    path: str | Path,
    indices: list[int] | None = None,
    start: float | None = None,
    end: float | None = None,
    info: VideoInfo | None = None,
    verify: bool = True,
) -> VideoFrames:
    """Decode frames, upright, as RGB.

    Args:
        path: the video file.
        indices: which frames, in any order, repeats allowed; None for every frame.
        start, end: with `indices` None, only frames that begin in `[start, end)` seconds.
        info: what `probe` returned for this file, to spare the second look.
        verify: decode these frames once more with PyAV, without converting them to RGB, because decord hands
            out whatever it made of damaged data. May be left out for a file that has passed before.

    Raises:
        VideoError: the file cannot be read in full; names file, decoder and reason.
    """
    return read_frames_and_decoder(path, indices, start, end, info, verify)[0]


def read_frames_and_decoder(
    path: str | Path,
    indices: list[int] | None = None,
    start: float | None = None,
    end: float | None = None,
    info: VideoInfo | None = None,
    verify: bool = True,
) -> tuple[VideoFrames, Decoder]:
    """As `read_frames`, with the name of the decoder that gave the frames."""
    info = info or probe(path)
    if indices is None:
        indices = sampling.indices_between(info.timestamps, info.duration, start, end)
    wanted = np.asarray(indices, dtype=np.int64)
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= info.frame_count):
        raise VideoError(
            f"{info.path}: frame {wanted.max() if wanted.max() >= info.frame_count else wanted.min()} "
            f"was asked for, it has {info.frame_count}"
        )
    if len(wanted) == 0:
        return VideoFrames(np.zeros((0, info.height, info.width, 3), np.uint8), np.zeros(0)), "pyav"
    frames, decoder = _decode(info, wanted, verify)
    return VideoFrames(frames, info.timestamps[wanted]), decoder


def _decode(info: VideoInfo, wanted: np.ndarray, verify: bool) -> tuple[np.ndarray, Decoder]:
    refused = "decord: not installed" if decord is None else "decord: cannot place this file's frames"
    if decord is not None and info._decord_fits:
        try:
            frames = _decode_decord(info, wanted)
        except Exception as error:  # decord raises bare RuntimeErrors and its own
            refused = f"decord: {_reason(error)}"
        else:
            if verify:
                _verify(info, wanted)
            return frames, "decord"
    try:
        return _decode_pyav(info, wanted), "pyav"
    except Exception as error:
        raise VideoError(f"{info.path}: {refused}; PyAV: {_reason(error)}") from error


def _decode_decord(info: VideoInfo, wanted: np.ndarray) -> np.ndarray:
    # Without fault_tol decord puts a copy of a neighbour where a frame cannot be decoded, and says nothing.
    reader = decord.VideoReader(os.path.abspath(info.path), num_threads=1, fault_tol=1e-9)
    if len(reader) != info.frame_count:
        raise VideoError(f"counts {len(reader)} frames where the container holds {info.frame_count}")
    frames = reader.get_batch(wanted.tolist()).asnumpy()
    if frames.shape != (len(wanted), info.height, info.width, 3):
        raise VideoError(f"frames of shape {frames.shape[1:3]} where {info.height, info.width} was expected")
    return frames


def _verify(info: VideoInfo, wanted: np.ndarray) -> None:
    try:
        for _ in _pyav_frames(info, wanted):
            pass
    except Exception as error:
        raise VideoError(f"{info.path}: decord conceals damage; PyAV: {_reason(error)}") from error


def _decode_pyav(info: VideoInfo, wanted: np.ndarray) -> np.ndarray:
    places: dict[int, list[int]] = {}
    for place, index in enumerate(wanted.tolist()):
        places.setdefault(index, []).append(place)
    frames = np.empty((len(wanted), info.height, info.width, 3), np.uint8)
    quarter_turns = info.rotation // 90
    width, height = (info.height, info.width) if quarter_turns % 2 else (info.width, info.height)
    for index, frame in _pyav_frames(info, wanted):
        if index in places:
            pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
            frames[places[index]] = np.rot90(pixels, quarter_turns)
    return frames


def _pyav_frames(info: VideoInfo, wanted: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
    """All wanted frames, and those that they refer to, with their indices and undamaged; else VideoError."""
    with _open(info.path) as container:
        for first, last in _stretches(info, wanted):
            reached = first
            for index, frame in _run(info, container, first):
                if index < reached:  # shown before the key frame that the seek led to
                    continue
                if index > reached:
                    break
                if frame.is_corrupt:
                    raise VideoError(f"frame {index} is damaged")
                yield index, frame
                reached += 1
                if reached > last:
                    break
            if reached <= last:
                yield from _from_the_start(info, reached, last)


def _from_the_start(info: VideoInfo, first: int, last: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames `first` to `last` without seeking, for files whose seeking leads past them."""
    count = 0
    with _open(info.path) as container:
        for index, frame in _run(info, container, 0):
            if frame.is_corrupt:
                raise VideoError(f"frame {index} is damaged")
            count = index + 1
            if index >= first:
                yield index, frame
            if index == last:
                return
    raise VideoError(f"only {count} frames can be decoded where the container holds {info.frame_count}")


def _stretches(info: VideoInfo, wanted: np.ndarray) -> list[tuple[int, int]]:
    """Stretches from a key frame to a wanted frame that hold all wanted frames, without overlap."""
    stretches: list[tuple[int, int]] = []
    for index in np.unique(wanted).tolist():
        key = int(info._keys[np.searchsorted(info._keys, index, side="right") - 1])
        if stretches and key <= stretches[-1][1] + 1:
            stretches[-1] = (stretches[-1][0], index)
        else:
            stretches.append((key, index))
    return stretches


def _run(
    info: VideoInfo, container: av.container.InputContainer, first: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their indices: from the first on by counting, from a later key frame on by the clock."""
    stream = container.streams.video[info._stream]
    if first == 0:
        yield from enumerate(container.decode(stream))
        return
    start = info._clock_start or 0.0
    container.seek(int((info.timestamps[first] + start) / float(stream.time_base or 1)), stream=stream)
    for frame in container.decode(stream):
        seconds = (frame.time or 0.0) - start
        yield int(np.searchsorted(info.timestamps, seconds - _CLOCK_ERROR)), frame


def _open(path: Path) -> av.container.InputContainer:
    # An absolute path, or FFmpeg would take what stands before a colon in a file's name for a protocol.
    container = av.open(os.path.abspath(path), options={"protocol_whitelist": "file"})
    for stream in container.streams.video:
        if stream.codec_context is not None:
            # Not by the number of cores: FFmpeg's VP8 reports damage only where it runs more than one thread.
            stream.codec_context.thread_count = 2
    return container


def _scan(path: Path) -> VideoInfo:
    """Read every packet's header: the one way to a frame count and times that holds for every container."""
    with _open(path) as container:
        if any(name.endswith(_NOT_VIDEO) for name in container.format.name.split(",")):
            raise VideoError(f"{path}: PyAV: not a video ({container.format.long_name})")
        stream = _video_stream(container)
        if stream is None:
            raise VideoError(f"{path}: PyAV: no video stream in it (sound or cover art only)")
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = [packet for packet in packets if not (packet.is_discard or _is_hidden(packet, stream))]
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        times = np.sort([float(packet.pts * packet.time_base) for packet in shown if packet.pts is not None])
        # AVI has no clock: its frames follow each other evenly, and what is read as times there is a guess.
        clocked = (
            "avi" not in container.format.name and len(times) == len(shown) > 0 and (np.diff(times) > 0).all()
        )
        timestamps = times - times[0] if clocked else np.arange(len(shown)) / (fps or 1.0)
        tail = float((shown[-1].duration or 0) * shown[-1].time_base) if shown else 0.0
        duration = (float(timestamps[-1]) if len(timestamps) else 0.0) + (tail or (1 / fps if fps else 0.0))
        if stream.frames > len(packets):
            raise VideoError(f"{path}: PyAV: cut off: {len(packets)} of {stream.frames} frames are there")
        if not shown:
            raise VideoError(f"{path}: PyAV: no frame in it")
        declared = _declared_seconds(container, stream)
        if (
            declared is not None
            and (float(times[0]) if clocked else 0.0) + duration < declared - _MISSING_SECONDS
        ):
            raise VideoError(f"{path}: PyAV: cut off: {duration:.2f} of {declared:.2f} seconds are there")
        key_packets = [packet for packet in shown if clocked and packet.is_keyframe]
        key_times = [float((packet.pts or 0) * packet.time_base) for packet in key_packets]
        keys = np.union1d([0], np.searchsorted(times, key_times)).astype(int)
        decord_fits = (
            len(shown) == len(packets)
            and any(name in container.format.name for name in _DECORD_SEEKS)
            and not _has_open_groups(packets)
        )
        codec, index = stream.codec_context.codec.canonical_name, container.streams.video.index(stream)
    rotation, width, height = _geometry(path, index)
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
        _stream=index,
        _clock_start=float(times[0]) if clocked else None,
        _keys=keys,
        _decord_fits=decord_fits,
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


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """The end of the video stream as Matroska and WebM note it; other containers count their frames."""
    if "matroska" not in container.format.name:
        return None
    if "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else None


def _geometry(path: Path, stream: int) -> tuple[int, int, int]:
    """Rotation in degrees counter-clockwise, then width and height after it, as the first frame has them."""
    with _open(path) as container:
        frame = next(container.decode(container.streams.video[stream]), None)
    if frame is None:
        raise VideoError(f"{path}: PyAV: not one frame can be decoded")
    rotation = round(frame.rotation / 90) * 90 % 360
    width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
    return rotation, width, height


def _reason(error: Exception) -> str:
    """An error in one line, without the addresses and source lines that decord adds."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"^\[[\d:]+\] \S+: ", "", lines[0]) if lines else ""
    return re.sub(r"\[[\d:]+\] \S+/(\S+?): ", "", text) or type(error).__name__
