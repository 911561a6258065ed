"""A clip out of the decode-once store against the official way: a seek a frame with OpenCV, Pillow for each.

    pip install opencv-python-headless
    xclip-lab bench frame_store [--videos FOLDER] [--clips 24]

Without --videos, textured clips of 320 x 240 and 15 s are made (H.264, 25 frames a second, a key frame
every 10 s). Every way gives 12 frames of 224 x 224 of the same clips, in turns, in one process with one
thread. Then an epoch: how many clips two workers read from the store, and how long a step of ViT-B/32 with
X-CLIP's head waits for them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn.functional import interpolate

from benchmarks.measure import Machine, Options, Row, folder, in_turn, report
from benchmarks.models import SIDE
from benchmarks.official import official_decode, opencv
from xclip_lab import load_config, load_dataset
from xclip_lab.batching import make_loader
from xclip_lab.clips import ClipDataset, load_frames
from xclip_lab.config import RunConfig
from xclip_lab.model import create_model
from xclip_lab.prepare import prepare

EPOCH_BATCH, EPOCH_STEPS, AIM = 4, 6, 100


def main() -> None:
    parser = Options(__doc__, clips=24)
    parser.add_argument("--videos", type=folder, help="a folder of videos of your own")
    arguments = parser.parse_args()
    opencv()
    machine = Machine.measured()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        videos = arguments.videos or make_clips(Path(temporary) / "videos", arguments.clips)
        rows = compare(videos, Path(temporary))
        report("frame_store", "A clip out of the store", machine, rows)
        epoch(videos, Path(temporary))


def compare(videos: Path, temporary: Path) -> list[Row]:
    """Time each way on every clip, and check that raw frames are the decoder's."""
    kept: dict[str, ClipDataset] = {}
    for format in ("raw", "jpeg"):
        config = config_of(videos, temporary / "store", format)
        dataset = load_dataset("folder", "train", videos)
        print(f"{format}: {prepare([dataset], config, workers=2, progress=False)}")
        kept[format] = ClipDataset(dataset, config, unique_videos=True)
    samples = kept["raw"].samples
    for index, sample in enumerate(samples[:5]):
        assert torch.equal(kept["raw"][index].pixels, load_frames(sample, config, SIDE).pixels)
    ways: dict[str, Callable] = {
        "official": lambda index: official_decode(samples[index].path),
        "decoded in one call": lambda index: load_frames(samples[index], config, SIDE),
        "store, JPEG": lambda index: kept["jpeg"][index],
        "store, raw": lambda index: kept["raw"][index].pixels.clone(),
    }
    taken = [in_turn({name: partial(way, at) for name, way in ways.items()}, 1) for at in range(len(samples))]
    naive, rows = statistics.median(clip.pop("official") for clip in taken), []
    for name in taken[0]:
        seconds, aim = [clip[name] for clip in taken], AIM if name.startswith("store") else None
        note = f"slowest {1e3 * max(seconds):.2f} ms"
        rows.append(Row(name, statistics.median(seconds), naive, aim=aim, note=note))
    return rows


def epoch(videos: Path, temporary: Path) -> None:
    """Two workers read from the store beside a model that trains."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = config_of(videos, temporary / "store", "raw")
    clips = ClipDataset(load_dataset("folder", "train", videos), config, unique_videos=True)
    order = [index % len(clips) for index in range(EPOCH_BATCH * EPOCH_STEPS)]
    many = [index % len(clips) for index in range(100 * len(clips))]
    began = time.perf_counter()
    for _ in make_loader(clips, many, EPOCH_BATCH, workers=2):
        pass
    reading = len(many) / (time.perf_counter() - began)
    model = create_model(config).train()
    waited, computed = [], []
    batches = iter(make_loader(clips, order, EPOCH_BATCH, workers=2))
    for _ in range(EPOCH_STEPS):
        began = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - began)
        began = time.perf_counter()
        model.loss(batch)["loss"].backward()
        computed.append(time.perf_counter() - began)
    pace = EPOCH_BATCH / statistics.median(computed)
    share = sum(waited[1:]) / (sum(waited[1:]) + sum(computed[1:]))
    print(
        f"two workers read {reading:,.0f} clips a second; a ViT-B/32 trains {pace:.2f} a second here and "
        f"waits {100 * share:.2f}% of the time (first batch, start of the workers: {waited[0]:.1f} s)"
    )


def config_of(videos: Path, store: Path, format: str) -> RunConfig:
    settings = {"data.root": str(videos), "data.store": str(store), "data.store_format": format}
    return load_config("xclip-folder-b32", settings | {"towers.pretrained": None, "towers.precision": "fp32"})


def make_clips(place: Path, count: int) -> Path:
    """Clips with texture that moves, so that decoding and JPEG have as much to do as in real ones."""
    place.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = torch.from_numpy(rng.normal(size=(1, 3, 120, 160))).float()
        parts = ((n, noise[..., : 120 // n, : 160 // n]) for n in (2, 8, 24))
        scene = sum(n * interpolate(part, (480, 640), mode="bicubic") for n, part in parts)
        scene = ((scene - scene.min()) / (scene.max() - scene.min()) * 255)[0].byte().permute(1, 2, 0).numpy()
        with av.open(str(place / f"clip{number:03}.mp4"), "w") as output:
            stream = output.add_stream("libx264", rate=25, options={"g": "250", "crf": "23"})
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for frame in range(375):
                x, y = (int(160 + 150 * np.sin(frame / 60 + number)), int(120 + 110 * np.cos(frame / 45)))
                picture = np.ascontiguousarray(scene[y : y + 240, x : x + 320])
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode())
    return place


if __name__ == "__main__":
    main()
