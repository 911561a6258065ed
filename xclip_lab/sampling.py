"""Which frames of a video are looked at: pure functions from counts and times to frame indices."""

from __future__ import annotations

from typing import Protocol

import numpy as np

# Containers round times to their clock; a frame that is a rounding error early still counts.
_CLOCK_ERROR = 1e-4


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
        ValueError: a frame rate below one a second or below `feature_framerate`, or a negative `start`.

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

    Empty when `start` lies behind the video.
    """
    first = 0.0 if start is None else start
    last = np.inf if end is None else end
    inside = np.flatnonzero((timestamps >= first - _CLOCK_ERROR) & (timestamps < last - _CLOCK_ERROR))
    if len(inside) == 0 and len(timestamps) and 0 <= first < duration:
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
