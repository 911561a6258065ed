"""The first decode of a clip, opening included, against the official way: a seek a second with OpenCV.

    pip install opencv-python-headless
    xclip-lab bench first_decode --videos FOLDER [--rounds 3]

Takes the folder's H.264 files of at least 8 s. Both ways give the same kind of 12 frames of 224 x 224; they
take turns, in one process with one thread. The frames are compared with those of decord, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.frame_store import FRAMES, SIDE, official_way
from xclip_lab import video
from xclip_lab.errors import VideoError
from xclip_lab.preprocess import preprocess

SECONDS = 8
AIM, GOAL = 4, 5.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, required=True, help="a folder of videos")
    parser.add_argument("--rounds", type=int, default=3, help="how often each file is read each way")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "threads;1"
    paths = sorted(path for path in arguments.videos.iterdir() if is_long(path))
    ratios = [compare(path, arguments.rounds) for path in paths]
    if not ratios:
        raise SystemExit(f"{arguments.videos}: no H.264 file of {SECONDS} s or more")
    print(
        f"median of {len(ratios)} files: {statistics.median(ratios):.1f} times as fast as the official way "
        f"(aim {AIM}, goal {GOAL}); load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


def is_long(path: Path) -> bool:
    try:
        info = video.probe(path)
    except VideoError:
        return False
    return info.codec == "h264" and info.duration >= SECONDS


def compare(path: Path, rounds: int) -> float:
    """Print what each way takes; how many times as fast the first decode is as the official way."""
    ways: dict[str, Callable[[Path], object]] = {
        "official": official_way,
        "first decode": first_decode,
        "decord, verified": lambda path: first_decode(path, with_index=False),
        "probe alone": video.probe,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way(path)
            times[name].append(1e3 * (time.perf_counter() - began))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    assert torch.equal(first_decode(path), first_decode(path, with_index=False))
    ratio = medians["official"] / medians["first decode"]
    told = ", ".join(f"{name} {median:.0f} ms" for name, median in medians.items())
    print(f"{path.name:<40} {ratio:5.1f} times as fast: {told}", flush=True)
    return ratio


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
