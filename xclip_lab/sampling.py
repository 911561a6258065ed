"""Which frames of a video are looked at: pure functions from counts and times to frame indices."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.random import Generator, RandomState

# Containers round times to their clock; a frame that is a rounding error early still counts.
_CLOCK_ERROR = 1e-4
FOLDER_RATE = 5
"""CLIP2Video reads folders of JPEGs that were written at this many a second."""


class Shuffler(Protocol):
    """`numpy.random.Generator` or `numpy.random.RandomState`."""

    def permutation(self, x: int, /) -> np.ndarray: ...


def official_indices(
    frame_count: int,
    fps: float,
    feature_framerate: int = 1,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """The frames that CLIP4Clip and X-CLIP read: `feature_framerate` frames of every second.

    The frame rate is cut to a whole number (29.97 counts as 29) and of each second the first
    `feature_framerate` entries of `range(0, fps, fps // feature_framerate)` are taken. The second in which
    `end` falls belongs to it, so `[start, end]` spans `end - start + 1` seconds. With `start` after `end` the
    two are swapped, and with `start` equal to `end` one second is added, as the official loaders do.

    Args:
        frame_count: frames in the file. fps: frames a second. start, end: seconds, both or neither.

    Raises:
        ValueError: a frame rate below one a second or below `feature_framerate`, or a negative `start`. So do
            the official readers of frames; of the loaders around them DiDeMo's makes an empty video of it.

    >>> official_indices(151, 29.97)
    [0, 29, 58, 87, 116, 145]
    >>> official_indices(300, 30.0, start=3, end=4)
    [90, 120]
    """
    whole_fps = int(fps)
    if whole_fps < 1:
        raise ValueError(f"the official sampler needs one frame a second or more, not {fps:g}")
    if feature_framerate > whole_fps:
        raise ValueError(f"feature_framerate {feature_framerate} exceeds the {whole_fps} frames of a second")
    last_second = float((frame_count + whole_fps - 1) // whole_fps)
    first_second = 0.0
    if start is not None or end is not None:
        first_second = 0.0 if start is None else float(start)
        end = last_second if end is None else float(end)
        if first_second > end:
            first_second, end = end, first_second
        elif first_second == end:
            end += 1
        last_second = min(end, last_second)
    if first_second < 0:
        raise ValueError(f"start {first_second:g} s lies before the video")
    offsets = range(0, whole_fps, whole_fps // feature_framerate)[:feature_framerate]
    indices: list[int] = []
    for second in np.arange(first_second, last_second + 1):
        base = int(second * whole_fps)
        indices += [base + offset for offset in offsets if base + offset < frame_count]
    return indices


def glscl_indices(
    frame_count: int,
    fps: float,
    feature_framerate: int = 1,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """The frames that GLSCL reads with decord: one every `round(fps / feature_framerate)` frames.

    `start` and `end` are cut to whole seconds, and the frame on which `end` falls belongs to the stretch. A
    negative time counts as 0; swapped or equal ones are treated as in `official_indices`.

    Args:
        frame_count: frames in the file. fps: frames a second. start, end: seconds.

    Raises:
        ValueError: the step would be no frame at all.

    >>> glscl_indices(90, 25.0, 2)
    [0, 12, 24, 36, 48, 60, 72, 84]
    """
    step = round(fps / feature_framerate)
    if step < 1:
        raise ValueError(
            f"feature_framerate {feature_framerate} is twice the video's {fps:g} frames a second or more"
        )
    first_second = max(int(start or 0), 0)
    first, last = int(first_second * fps), frame_count - 1
    if end is not None:
        last_second = max(int(end), 0)
        if first_second > last_second:
            first_second, last_second = last_second, first_second
        elif first_second == last_second:
            last_second += 1
        first, last = int(first_second * fps), min(int(last_second * fps), last)
    return list(range(first, last + 1, step))


def clip2video_indices(
    timestamps: np.ndarray,
    duration: float,
    feature_framerate: int = 1,
    start: float | None = None,
    end: float | None = None,
    in_folder: bool = False,
) -> list[int]:
    """The frames that CLIP2Video reads of the folder of JPEGs that it makes of a video.

    Its test-time frames: in training its code also moves them (`jitter_positions`). It knows no `start` and
    `end`: a stretch is treated as a file of its own.

    Args:
        timestamps: `[F]` seconds, increasing. duration: seconds of the whole video.
        feature_framerate: of so many JPEGs one is read (the opposite of what the name says).
        in_folder: the frames are those JPEGs already.

    Returns:
        Nothing where the folder holds fewer JPEGs than `feature_framerate`: the released code makes an empty
        video of it (ledger 13).

    >>> clip2video_indices(np.arange(40) / 25, 1.6, 2)
    [0, 4, 14, 24, 39]
    """
    inside = indices_between(timestamps, duration, start, end)
    if not inside:
        return []
    folder = list(range(len(inside)))
    if not in_folder:
        folder = folder_frames(timestamps[inside] - timestamps[inside[0]], shown_for(timestamps, duration))
    return [inside[folder[place]] for place in strided_positions(len(folder), feature_framerate)]


def shown_for(timestamps: np.ndarray, duration: float) -> float:
    """How long a frame of a video is shown, as a rule, in seconds."""
    return float(np.median(np.diff(timestamps, append=duration)))


def folder_frames(timestamps: np.ndarray, frame_seconds: float, fps: float = FOLDER_RATE) -> list[int]:
    """The source frame of every JPEG that CLIP2Video's `ffmpeg -i FILE -r 5` writes, in order.

    FFmpeg writes a frame when it lies less than about one slot behind the next one, so the first two frames
    are written and then the last before each further slot; a slow video's frames are written several times.
    Exact where the frame rate is constant (checked against FFmpeg 9), else within a slot.

    Args:
        timestamps: `[F]` seconds, the first 0. frame_seconds: how long a frame is shown. fps: JPEGs a second.

    >>> folder_frames(np.arange(20) / 25, 1 / 25)
    [0, 1, 4, 9, 14, 19]
    """
    written: list[int] = []
    # FFmpeg moves times off exact halves by this much.
    slots = timestamps * fps + (timestamps > 0) / 2**17
    for index, slot in enumerate(slots):
        lead = float(slot) - len(written)
        lead_at_end = lead + frame_seconds * fps
        if lead_at_end < -1.1:
            continue
        copies = round(lead_at_end) if lead_at_end > 1.1 else 1
        of_the_one_before = round(lead - 0.6) if lead > 1.1 else 0
        written += [index - 1] * of_the_one_before + [index] * (copies - of_the_one_before)
    return written


def strided_positions(count: int, step: int) -> list[int]:
    """CLIP2Video's `count // step` evenly spaced ones of `count`, the first and the last among them.

    >>> strided_positions(11, 2)
    [0, 2, 5, 7, 10]
    """
    return np.linspace(0, count - 1, num=count // step, dtype=int).tolist()


def uniform_indices(
    timestamps: np.ndarray,
    duration: float,
    max_frames: int,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """Up to `max_frames` frames evenly spaced in time: those on display at the middles of equal intervals.

    Time rules, not the frame number, so a variable frame rate is looked at evenly; a frame that is on display
    at several of the middles is taken once. A stretch with `max_frames` frames or fewer gives all of them.

    Args:
        timestamps: `[F]` seconds, increasing. duration: seconds of the whole video.
        start, end: seconds, None for the video's own.

    >>> uniform_indices(np.arange(16) / 8, 2.0, 4)
    [2, 6, 10, 14]
    """
    inside = indices_between(timestamps, duration, start, end)
    if len(inside) <= max_frames:
        return inside
    first = max(start or 0.0, 0.0)
    last = duration if end is None else min(end, duration)
    middles = first + (np.arange(max_frames) + 0.5) * (last - first) / max_frames
    shown = np.searchsorted(timestamps, middles + _CLOCK_ERROR, side="right") - 1
    return np.unique(shown.clip(inside[0], inside[-1])).tolist()


def indices_between(
    timestamps: np.ndarray, duration: float, start: float | None = None, end: float | None = None
) -> list[int]:
    """Indices of the frames that begin in `[start, end)`; where none does, the one on display at `start`.

    Empty when `start` lies behind the video, or behind `end`.
    """
    first = 0.0 if start is None else start
    last = np.inf if end is None else end
    inside = np.flatnonzero((timestamps >= first - _CLOCK_ERROR) & (timestamps < last - _CLOCK_ERROR))
    if len(inside) == 0 and len(timestamps) and 0 <= first < duration and first <= last:
        return [int(np.searchsorted(timestamps, first + _CLOCK_ERROR, side="right")) - 1]
    return inside.tolist()


def slice_positions(count: int, max_frames: int, slice_framepos: int) -> list[int]:
    """Which of `count` sampled frames stay: 0 the head, 1 the tail, 2 evenly spaced, at most `max_frames`.

    Raises:
        ValueError: another `slice_framepos`.

    >>> slice_positions(10, 4, 2)
    [0, 3, 6, 9]
    """
    _check("slice_framepos", slice_framepos)
    if count <= max_frames:
        return list(range(count))
    if slice_framepos == 0:
        return list(range(max_frames))
    if slice_framepos == 1:
        return list(range(count - max_frames, count))
    return np.linspace(0, count - 1, num=max_frames, dtype=int).tolist()


def jitter_positions(positions: list[int], random: Generator | RandomState) -> list[int]:
    """CLIP2Video's training frames: of what `slice_positions` gives, all but the first and the last move.

    Each moves by up to half the distance of the first two, where that half is more than 2: they stay in
    order. `random` draws one number a moved position, and none where nothing moves.

    >>> jitter_positions([0, 10, 20, 30], np.random.default_rng(0))
    [0, 13, 21, 30]
    """
    half = (positions[1] - positions[0]) // 2 if len(positions) > 2 else 0
    if half <= 2:
        return positions
    draw = random.integers if isinstance(random, Generator) else random.randint
    moves = draw(-half, half, len(positions) - 2).tolist()
    inner = [position + move for position, move in zip(positions[1:-1], moves, strict=True)]
    return [positions[0], *inner, positions[-1]]


def order_frames(indices: list[int], frame_order: int, shuffler: Shuffler | None = None) -> list[int]:
    """0 as they are, 1 reversed, 2 shuffled by `shuffler`.

    Raises:
        ValueError: another order, or order 2 without a `shuffler` (nothing here is random unless it is told
            how).
    """
    _check("frame_order", frame_order)
    if frame_order == 1:
        return indices[::-1]
    if frame_order == 2:
        if shuffler is None:
            raise ValueError("frame_order 2 shuffles and needs a random generator")
        return [indices[i] for i in shuffler.permutation(len(indices))]
    return indices


def _check(name: str, value: int) -> None:
    if value not in (0, 1, 2):
        raise ValueError(f"{name} {value!r} is not one of 0, 1, 2")
