"""Draws a clip's frames and encodes them as H.264 in MP4."""

from __future__ import annotations

import io
import math
from fractions import Fraction

import av
import numpy as np

from xclip_lab.synthetic.plan import Clip
from xclip_lab.synthetic.scenes import COLOURS, Event, Pose


def render(clip: Clip, size: int, hold: int) -> np.ndarray:
    """The frames of a clip, uint8 `[F, size, size, 3]` RGB, before encoding; `hold` in a row are the same."""
    background = _background(clip.background, size)
    poses = np.concatenate(
        [
            _event(event, (stop - start) // hold, background)
            for event, (start, stop) in zip(clip.events, clip.spans, strict=True)
        ]
    )
    return np.repeat(poses, hold, axis=0)


def encode(frames: np.ndarray, fps: float) -> bytes:
    """An MP4 file of uint8 `[F, H, W, 3]` RGB frames. The same frames give the same bytes."""
    file = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(file, "w", format="mp4") as container:
        # One thread: x264's output depends on how many there are.
        options = {"crf": "18", "preset": "superfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _event(event: Event, poses: int, background: np.ndarray) -> np.ndarray:
    """uint8 `[poses, S, S, 3]`: drawn forwards and then turned round, so that opposites match exactly."""
    time = np.linspace(0, 1, poses, dtype=np.float32)
    things = event.action.things
    image = np.broadcast_to(background, (poses, *background.shape))
    image = _paint(image, things[0].shape, COLOURS[things[0].colour], event.start, event.end, time)
    if event.still is not None:
        image = _paint(image, things[1].shape, COLOURS[things[1].colour], event.still, event.still, time)
    drawn = np.rint(image).astype(np.uint8)
    return drawn[::-1] if event.action.reverse else drawn


def _paint(
    image: np.ndarray, shape: str, colour: tuple[int, int, int], start: Pose, end: Pose, time: np.ndarray
) -> np.ndarray:
    """`image` `[n, S, S, 3]` with one shape over it that goes from `start` to `end`."""
    size = image.shape[1]
    x, y, radius, angle = (
        np.float32(getattr(start, name)) + time * np.float32(getattr(end, name) - getattr(start, name))
        for name in ("x", "y", "radius", "angle")
    )
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    across = pixels[None, None, :] - x[:, None, None]
    down = pixels[None, :, None] - y[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    radius = radius[:, None, None]
    distance = _OUTLINES[shape]((across * cos + down * sin) / radius, (down * cos - across * sin) / radius)
    cover = np.clip(0.5 - distance * radius * size, 0, 1)[..., None]
    return image + cover * (np.asarray(colour, dtype=np.float32) - image)


# Outlines: signed distance (negative inside, exact near the edge but for corners) to a shape of radius about
# 1 at (x, y), y downwards. Sizes are set so that the shapes cover similar areas.


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.9


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.8, 0.8)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 1.0, 0.33), _box(x, y, 0.33, 1.0))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner and two discs on its upper sides."""
    half = 0.58
    y = y - 0.1
    diagonal = math.sqrt(0.5)
    square = _box((x + y) * diagonal, (x - y) * diagonal, half, half)
    centre = half * diagonal
    discs = np.hypot(np.abs(x) - centre, y + centre) - half
    return np.minimum(square, discs)


def _spikes(x: np.ndarray, y: np.ndarray, tips: int, outer: float, inner: float) -> np.ndarray:
    """A star or regular polygon, one tip upwards: tips at `outer`, notches (edge middles) at `inner`."""
    sector = 2 * math.pi / tips
    theta = np.arctan2(x, -y)
    theta = np.abs(theta - sector * np.rint(theta / sector))
    rho = np.hypot(x, y)
    notch = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    edge = notch[0] - outer, notch[1]
    length = math.hypot(*edge)
    along, across = rho * np.cos(theta) - outer, rho * np.sin(theta)
    return (edge[1] * along - edge[0] * across) / length


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _spikes(x, y - 0.2, 3, 1.2, 0.6)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _spikes(x, y, 5, 1.2, 0.52)


_OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


def _background(seed: int, size: int) -> np.ndarray:
    """`[S, S, 3]` float32: a dark tone with a slow variation, the same in every frame of a clip."""
    rng = np.random.default_rng(seed)
    tone = rng.uniform(25, 55) + rng.uniform(-6, 6, 3)
    coarse = rng.uniform(-7, 7, (4, 4))
    at = np.linspace(0, 3, size)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(4)))
    return (tone + (weights @ coarse @ weights.T)[..., None]).astype(np.float32)
