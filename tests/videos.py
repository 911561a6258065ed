"""Small real video files, made on the spot. Every frame carries its number."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BARS = 8


def picture(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Frame `number` as uint8 `[H, W, 3]`: vertical bars spell the number, the lowest bit on the left."""
    frame = np.zeros((height, width, 3), np.uint8)
    for place, part in enumerate(np.array_split(np.arange(width), BARS)):
        frame[:, part] = 255 * (number >> place & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number in a picture, whatever its size."""
    columns = frame.mean(axis=(0, 2))
    return sum(int(part.mean() > 127) << place for place, part in enumerate(np.array_split(columns, BARS)))


def write_video(
    path: Path,
    frames: list[np.ndarray] | int = 40,
    rate: int = 25,
    codec: str = "libx264",
    times: list[int] | None = None,
    container: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    format: str | None = None,
    pixel_format: str = "yuv420p",
) -> Path:
    """Encode `frames` (or that many numbered ones). `times`: each frame's in units of 1 / `rate` seconds."""
    pictures = [picture(i) for i in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=container or {}, format=format) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, pixel_format)
        stream.codec_context.time_base = Fraction(1, rate)
        for place, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[place] if times else place
            frame.time_base = Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A second of silence and no picture."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        stream.layout = "mono"
        for place in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 1024 * place
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def turn(path: Path, clockwise: int, mirror: bool = False) -> Path:
    """Note in an MP4's track header that a player has to turn the picture by 0, 90, 180 or 270 degrees, and
    before that to mirror it, left to right."""
    one = 1 << 16
    a, b = {0: (one, 0), 90: (0, one), 180: (-one, 0), 270: (0, -one)}[clockwise]
    first = (-a, -b) if mirror else (a, b)
    return overwrite(path, b"tkhd", 40, struct.pack(">9i", *first, 0, -b, a, 0, 0, 0, 1 << 30))


def overwrite(path: Path, box: bytes, offset: int, new: bytes) -> Path:
    """Put other bytes into an MP4's first box of this name, `offset` bytes after the name."""
    data = bytearray(path.read_bytes())
    start = data.index(box) + 4 + offset
    data[start : start + len(new)] = new
    path.write_bytes(data)
    return path


def trim(path: Path, to: Path, seconds: float) -> Path:
    """A copy of an MP4 that skips its beginning by an edit list, not by leaving frames out."""
    with av.open(str(path)) as source, av.open(str(to), "w") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts -= round(seconds / stream.time_base)
                packet.dts -= round(seconds / stream.time_base)
                packet.stream = copy
                output.mux(packet)
    return to


def damage(path: Path, begin: float, end: float, seed: int = 0, every: int = 40) -> Path:
    """Flip one bit in every `every`th byte between two shares of the file's length."""
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for place in range(int(begin * len(data)), int(end * len(data)), every):
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return path
