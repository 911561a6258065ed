"""Video files: what is in them, which frames to take, and their pixels. decord first, PyAV where it cannot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import av
import decord
import numpy as np

from xclip_lab import sampling
from xclip_lab.errors import VideoError

decord.logging.set_level(decord.logging.QUIET)

# Demuxers that make "video" of what is none: pictures, text art, lists of other files.
_NOT_VIDEO = ("_pipe", "image2", "tty", "concat", "hls", "dash")
# Packets of these codecs may rightly show nothing (alternate reference frames, packed B-frames).
_HIDES_FRAMES = {"vp8", "mpeg4", "msmpeg4v2", "msmpeg4v3"}
# How much of a stream's own declared length may be missing before it counts as cut off, in seconds.
_MISSING_TAIL = 1.0


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
    timestamps: np.ndarray
    stream: int
    decord_fits: bool


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
    sampler: Literal["official", "uniform"] = "official",
    max_frames: int = 12,
    feature_framerate: int = 1,
    slice_framepos: int = 2,
    frame_order: int = 0,
    start: float | None = None,
    end: float | None = None,
    shuffler: sampling.Shuffler | None = None,
) -> list[int]:
    """The frames that a sampler takes from a video, at most `max_frames`, in the order they are shown.

    `official` is CLIP4Clip's and X-CLIP's (see `sampling.official_indices`, `slice_positions`), `uniform`
    takes frames evenly in time. `start` and `end` in seconds. Empty where the stretch holds no frame.

    Raises:
        ValueError: the official sampler cannot serve such a frame rate or start; `frame_order` 2 without
            `shuffler`.
    """
    if sampler == "uniform":
        chosen = sampling.uniform_indices(info.timestamps, info.duration, max_frames, start, end)
    else:
        sampled = sampling.official_indices(info.frame_count, info.fps, feature_framerate, start, end)
        positions = sampling.slice_positions(len(sampled), max_frames, slice_framepos)
        chosen = [sampled[position] for position in positions]
    return sampling.order_frames(chosen, frame_order, shuffler)


def read_frames(
    path: str | Path,
    indices: list[int] | None = None,
    start: float | None = None,
    end: float | None = None,
    info: VideoInfo | None = None,
) -> VideoFrames:
    """Decode frames, upright, as RGB.

    Args:
        path: the video file.
        indices: which frames, in any order, repeats allowed; None for every frame.
        start, end: with `indices` None, only frames that begin in `[start, end)` seconds.
        info: what `probe` returned for this file, to spare the second look.

    Raises:
        VideoError: the file cannot be read in full; names file, decoder and reason.
    """
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
        return VideoFrames(np.zeros((0, info.height, info.width, 3), np.uint8), np.zeros(0))
    return VideoFrames(_decode(info, wanted), info.timestamps[wanted])


def _decode(info: VideoInfo, wanted: np.ndarray) -> np.ndarray:
    refused = "decord: not asked, the file hides frames"
    if info.decord_fits:
        try:
            return _decode_decord(info, wanted)
        except Exception as error:
            refused = f"decord: {_reason(error)}"
    try:
        return _decode_pyav(info, wanted)
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


def _decode_pyav(info: VideoInfo, wanted: np.ndarray) -> np.ndarray:
    """Decode the whole file, so that damage anywhere in it shows, and keep the wanted frames."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(wanted.tolist()):
        places.setdefault(index, []).append(place)
    frames = np.empty((len(wanted), info.height, info.width, 3), np.uint8)
    quarter_turns = info.rotation // 90
    width, height = (info.height, info.width) if quarter_turns % 2 else (info.width, info.height)
    count = 0
    with _open(info.path) as container:
        for frame in container.decode(container.streams[info.stream]):
            if frame.is_corrupt:
                raise VideoError(f"frame {count} is damaged")
            if count in places:
                pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
                frames[places[count]] = np.rot90(pixels, quarter_turns)
            count += 1
    if count != info.frame_count:
        raise VideoError(f"{count} frames could be decoded where the container holds {info.frame_count}")
    return frames


def _open(path: Path) -> av.container.InputContainer:
    # An absolute path, or FFmpeg would take what stands before a colon in a file's name for a protocol.
    return av.open(os.path.abspath(path), options={"protocol_whitelist": "file"})


def _scan(path: Path) -> VideoInfo:
    """Read every packet's header: the one way to a frame count and times that hold for every container."""
    with _open(path) as container:
        if any(name.endswith(_NOT_VIDEO) for name in container.format.name.split(",")):
            raise VideoError(f"{path}: PyAV: not a video ({container.format.long_name})")
        stream = _video_stream(container, path)
        codec = stream.codec_context
        if codec is None:
            raise VideoError(f"{path}: PyAV: no decoder for the video stream")
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = [packet for packet in packets if not packet.is_discard]
        fps = float(stream.guessed_rate or stream.average_rate or 0)
        _check_complete(path, stream, packets)
        name = codec.name
        clocked = "avi" not in container.format.name  # AVI has no clock: its frames follow each other evenly
        times = [float(packet.pts * packet.time_base) for packet in shown if packet.pts is not None]
        last = float((shown[-1].duration or 0) * shown[-1].time_base) if shown else 0.0
        declared = stream.frames
        index = stream.index
    first, decoded = _first_frame(path, index, count_all=codec.name in _HIDES_FRAMES)
    frame_count = len(shown) if decoded is None else decoded
    timestamps = np.sort(np.asarray(times))
    if not clocked or len(times) != frame_count or (np.diff(timestamps) <= 0).any():
        timestamps = np.arange(frame_count) / (fps or 1.0)
    timestamps = timestamps - timestamps[0]
    del declared
    rotation = first.rotation % 360
    width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
    return VideoInfo(
        path=path,
        frame_count=frame_count,
        fps=fps,
        duration=float(timestamps[-1]) + (last or (1 / fps if fps else 0.0)),
        width=width,
        height=height,
        rotation=rotation,
        codec=name,
        timestamps=timestamps,
        stream=index,
        decord_fits=len(packets) == frame_count,
    )
