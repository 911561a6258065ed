"""The first decode of a clip, opening included, against the official way: a seek a second with OpenCV.

    pip install opencv-python-headless
    xclip-lab bench first_decode --videos FOLDER [--rounds 5]

Takes the folder's H.264 files of at least 8 s. Both ways give the same kind of 12 frames of 224 x 224; they
take turns, in one process with one thread. The frames are compared with those of decord, bit for bit.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import Machine, Options, Row, folder, in_turn, report
from benchmarks.models import FRAMES, SIDE
from benchmarks.official import official_decode, opencv
from xclip_lab import video
from xclip_lab.errors import UserError, VideoError
from xclip_lab.preprocess import preprocess

SECONDS, AIM = 8, 4


def main() -> None:
    parser = Options(__doc__, rounds=5)
    parser.add_argument("--videos", type=folder, required=True, help="a folder of videos")
    arguments = parser.parse_args()
    opencv()
    machine = Machine.measured()
    torch.set_num_threads(1)
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "threads;1"
    rows = [compare(path, arguments.rounds) for path in sorted(arguments.videos.iterdir()) if is_long(path)]
    if not rows:
        raise UserError(f"{arguments.videos}: no H.264 file of {SECONDS} s or more")
    report("first_decode", "The first decode of a clip", machine, rows)
    median = statistics.median(row.ratio or 0 for row in rows)
    print(f"median of {len(rows)} files: {median:.1f} times as fast as the official way (aim {AIM})")


def is_long(path: Path) -> bool:
    try:
        info = video.probe(path)
    except VideoError:
        return False
    return info.codec == "h264" and info.duration >= SECONDS


def compare(path: Path, rounds: int) -> Row:
    """What each way takes, with the same frames; the note names the decoder."""
    ways: dict[str, Callable[[], object]] = {
        "official": lambda: official_decode(path),
        "ours": lambda: first_decode(path),
        "decord, verified": lambda: first_decode(path, with_index=False),
        "probe": lambda: video.probe(path),
    }
    if not torch.equal(first_decode(path), first_decode(path, with_index=False)):
        raise UserError(f"{path}: other frames than decord's")
    seconds = in_turn(ways, rounds)
    note = f"{video.read_frames_and_decoder(path, [0])[1]}; "
    note += ", ".join(f"{name} {1e3 * seconds[name]:.0f} ms" for name in ("decord, verified", "probe"))
    return Row(path.name, seconds["ours"], seconds["official"], aim=AIM, note=note)


def first_decode(path: Path, with_index: bool = True) -> torch.Tensor:
    """Open, choose and read the frames of a file never seen before: uint8 `[F, 3, S, S]`."""
    info = video.probe(path)
    if not with_index:
        info = dataclasses.replace(info, _packets=None)
    return preprocess(
        video.read_frames(path, video.frame_indices(info, max_frames=FRAMES), info=info).frames, SIDE
    )


if __name__ == "__main__":
    main()
