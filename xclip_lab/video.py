"""Videos: which frames to take, their pixels. By an index of the packets where the file allows it, else by
decord, or PyAV where that cannot; Pillow for folders of frames.

decord is built for few platforms; where it is not installed PyAV reads every file.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from xclip_lab import frame_folder, indexed, sampling
from xclip_lab.container import VideoInfo, open_container, probe, reason
from xclip_lab.errors import VideoError
from xclip_lab.indexed import PacketIndex
from xclip_lab.memory import available_memory

try:
    import decord
except ImportError:
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)

__all__ = ["Decoder", "Sampler", "VideoFrames", "VideoInfo", "frame_indices", "iterate_frames", "probe"]
__all__ += ["read_frames", "read_frames_and_decoder"]

Decoder = Literal["indexed", "decord", "pyav", "frames"]
Sampler = Literal["official", "clip2video", "glscl", "uniform"]

_CLOCK_ERROR = 1e-4
# From version 17 on PyAV takes as many threads as there are cores for each frame: more than that is worth.
_ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


class VideoFrames(NamedTuple):
    """`frames` uint8 `[F, H, W, 3]` RGB, upright; `timestamps` float64 `[F]` seconds from the first frame."""

    frames: np.ndarray
    timestamps: np.ndarray


def frame_indices(
    info: VideoInfo,
    sampler: Sampler = "official",
    max_frames: int = 12,
    feature_framerate: int = 1,
    slice_framepos: int = 2,
    start: float | None = None,
    end: float | None = None,
    jitter: np.random.Generator | np.random.RandomState | None = None,
) -> list[int]:
    """The frames that a sampler takes from a video, at most `max_frames`, in the order they are shown.

    `official` is CLIP4Clip's and X-CLIP's, `glscl` and `clip2video` are those families' (see
    `sampling.official_indices` and so on); `slice_positions` cuts what they give (GLSCL and CLIP2Video always
    evenly: `slice_framepos` 2). `uniform` takes frames evenly in time. `start` and `end` in seconds. Empty
    where the stretch holds no frame, and of `clip2video` where the video has fewer JPEGs than
    `feature_framerate`. `clip2video` may name a frame twice; a folder's frames are to it
    those that CLIP2Video wrote. `jitter` moves them as CLIP2Video does in training
    (`sampling.jitter_positions`).

    Raises:
        ValueError: another sampler or `slice_framepos`, a `feature_framerate` below 1, or the sampler cannot
            serve such a frame rate or start.
    """
    if feature_framerate < 1:
        raise ValueError(f"feature_framerate {feature_framerate} is not 1 or more")
    if sampler == "uniform":
        return sampling.uniform_indices(info.timestamps, info.duration, max_frames, start, end)
    if sampler == "official":
        sampled = sampling.official_indices(info.frame_count, info.fps, feature_framerate, start, end)
    elif sampler == "glscl":
        sampled = sampling.glscl_indices(info.frame_count, info.fps, feature_framerate, start, end)
    elif sampler == "clip2video":
        sampled = sampling.clip2video_indices(
            info.timestamps, info.duration, feature_framerate, start, end, in_folder=bool(info.files)
        )
    else:
        names = ", ".join(repr(name) for name in get_args(Sampler))
        raise ValueError(f"sampler {sampler!r} is not one of {names}")
    positions = sampling.slice_positions(len(sampled), max_frames, slice_framepos)
    if jitter is not None:
        positions = sampling.jitter_positions(positions, jitter)
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
        path: the video file, or a folder of frames.
        indices: which frames, in any order, repeats allowed; None for every frame.
        start, end: with `indices` None, only frames that begin in `[start, end)` seconds; where none does,
            the one on display at `start`.
        info: what `probe` returned for this file, to spare the second look.
        verify: where decord reads them, decode these frames once more with PyAV, without converting them to
            RGB, because decord hands out whatever it made of damaged data. May be left out for a file that
            has passed before.

    Raises:
        VideoError: the file cannot be read in full, or it has no such frames; names file, decoder and reason.
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
    wanted = _wanted(info, indices, start, end)
    if len(wanted) == 0:
        return VideoFrames(np.zeros((0, info.height, info.width, 3), np.uint8), np.zeros(0)), "pyav"
    _check_memory(info, len(wanted))
    frames, decoder = _decode(info, wanted, verify)
    return VideoFrames(frames, info.timestamps[wanted]), decoder


def _wanted(
    info: VideoInfo, indices: Sequence[int] | None, start: float | None, end: float | None
) -> np.ndarray:
    """The frames to read, int64 `[F]`. Raises VideoError where they are none of the file's."""
    try:
        if indices is None:
            indices = sampling.indices_between(info.timestamps, info.duration, start, end)
        wanted = [operator.index(index) for index in indices]
    except TypeError as error:
        asked = f"start {start!r}, end {end!r}" if indices is None else f"indices {indices!r}"[:80]
        raise VideoError(f"{info.path}: {asked}: give seconds, or whole numbers of frames") from error
    for index in wanted:
        if not 0 <= index < info.frame_count:
            raise VideoError(f"{info.path}: frame {index} was asked for, it has {info.frame_count}")
    return np.asarray(wanted, dtype=np.int64)


def iterate_frames(info: VideoInfo, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Frames one by one as uint8 `[H, W, 3]`, with their indices, in the order of time, each once.

    However many there are, few are in memory.

    Raises (while iterating):
        VideoError: as `read_frames`.
    """
    wanted = np.unique(np.asarray(indices, dtype=np.int64))
    if info.files:
        for index in wanted.tolist():
            yield index, frame_folder.read([info.files[index]], (info.height, info.width))[0]
        return
    try:
        yield from _upright_frames(info, wanted, _pyav_frames(info, wanted))
    except Exception as error:
        raise VideoError(f"{info.path}: PyAV: {reason(error)}") from error


def _check_memory(info: VideoInfo, count: int) -> None:
    """Better an error than a process that the system kills: a file's header may speak of any size."""
    needed, free = count * info.height * info.width * 3, available_memory()
    if free is not None and needed > free:
        raise VideoError(
            f"{info.path}: {count} frames of {info.width} x {info.height} pixels need "
            f"{needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free; read fewer at a time"
        )


def _decode(info: VideoInfo, wanted: np.ndarray, verify: bool) -> tuple[np.ndarray, Decoder]:
    if info.files:
        return frame_folder.read([info.files[i] for i in wanted], (info.height, info.width)), "frames"
    refused = []
    if info._packets is not None:
        try:
            return _decode_indexed(info, info._packets, wanted), "indexed"
        except (VideoError, av.FFmpegError, IndexError, ValueError) as error:
            refused.append(f"by its index: {reason(error)}")  # the other ways may get around it
    if decord is None:
        refused.append("decord: not installed")
    elif not info._decord_fits:
        refused.append("decord: cannot place this file's frames")
    else:
        if verify:  # before decord sees the file, which speaks to the terminal of what it finds
            _verify(info, wanted)
        try:
            return _decode_decord(info, wanted), "decord"
        except Exception as error:  # decord raises bare RuntimeErrors and its own
            refused.append(f"decord: {reason(error)}")
    try:
        return _decode_pyav(info, wanted), "pyav"
    except Exception as error:
        raise VideoError(f"{info.path}: {'; '.join(refused)}; PyAV: {reason(error)}") from error


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
        raise VideoError(f"{info.path}: PyAV: {reason(error)} (decord would conceal it)") from error


def _decode_indexed(info: VideoInfo, packets: PacketIndex, wanted: np.ndarray) -> np.ndarray:
    # The index knows the stream: opening need not decode its first frame to get to know it.
    with open_container(info.path, skip_frame="all") as container:
        frames = indexed.decode(container, container.streams.video[info._stream], packets, wanted)
        return _stack(info, wanted, _upright_frames(info, wanted, frames))


def _decode_pyav(info: VideoInfo, wanted: np.ndarray) -> np.ndarray:
    return _stack(info, wanted, _upright_frames(info, wanted, _pyav_frames(info, wanted)))


def _stack(info: VideoInfo, wanted: np.ndarray, upright: Iterator[tuple[int, np.ndarray]]) -> np.ndarray:
    """Frames as they were asked for, of those that come one by one."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(wanted.tolist()):
        places.setdefault(index, []).append(place)
    frames = np.empty((len(wanted), info.height, info.width, 3), np.uint8)
    for index, pixels in upright:
        frames[places[index]] = pixels
    return frames


def _upright_frames(
    info: VideoInfo, wanted: np.ndarray, decoded: Iterator[tuple[int, av.VideoFrame]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Those of the decoded frames that are wanted, as uint8 `[H, W, 3]` RGB."""
    quarter_turns = info.rotation // 90
    width, height = (info.height, info.width) if quarter_turns % 2 else (info.width, info.height)
    needed, reformatter = set(wanted.tolist()), VideoReformatter()  # one for all: it takes time to set up
    for index, frame in decoded:
        if index in needed:
            pixels = reformatter.reformat(frame, width, height, "rgb24", **_ONE_THREAD).to_ndarray()
            yield index, np.rot90(pixels[:, ::-1] if info._mirrored else pixels, quarter_turns)


def _pyav_frames(info: VideoInfo, wanted: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
    """All wanted frames, and those that they refer to, with their indices and undamaged; else VideoError."""
    with open_container(info.path) as container:
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
    with open_container(info.path) as container:
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
