"""Decode every video of a dataset once, before any run needs it: `xclip-lab data prepare`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from xclip_lab.atomic import write_text
from xclip_lab.clips import load_frames, tower_image_size
from xclip_lab.config import RunConfig
from xclip_lab.datasets import Sample, VideoTextDataset
from xclip_lab.errors import DatasetError, first_few, writing
from xclip_lab.store import ClipStore
from xclip_lab.workers import usable_cores, watched

TIMEOUT_S = 300.0
"""Seconds after which a decoder counts as stuck with a video."""
FAILURES = "failures.json"


@dataclass
class Prepared:
    """What `prepare` did: clips decoded now and found already there, their bytes on disk, and the videos that
    cannot be read, with the reason."""

    decoded: int = 0
    found: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kept = self.decoded + self.found
        a_clip = f", {self.bytes / kept / 1024:,.0f} KiB a clip" if kept else ""
        lines = [
            f"{self.decoded} clips decoded in {self.seconds:.0f} s, {self.found} were there already",
            f"{self.bytes / 2**20:,.1f} MiB on disk{a_clip}",
        ]
        if self.failed:
            reasons = (f"{video}: {reason}" for video, reason in self.failed.items())
            lines.append(f"{len(self.failed)} videos are missing or cannot be read (all in {FAILURES}):")
            lines.append("  " + first_few(reasons, "\n  "))
        return "\n".join(lines)


def prepare(
    datasets: Iterable[VideoTextDataset],
    config: RunConfig,
    workers: int | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: bool = True,
) -> Prepared:
    """Fill `config.data.store` with the frames of all videos of some splits, each decoded once.

    Stopped at any moment it loses nothing: the same call goes on with what is missing. The videos that are
    missing or cannot be read stand in the store's `failures.json`.

    Args:
        workers: processes that decode, None for one a core; 0 decodes in this one.
        timeout_s: seconds after which a decoder is stopped and its video counted as unreadable.

    Raises:
        DatasetError: the store cannot be written.
    """
    began = time.monotonic()
    # A clip is its video and its stretch: however many captions it has, and in how many splits.
    samples = [sample for dataset in datasets for sample in dataset.samples]
    report = Prepared(failed={s.video_id: "no file" for s in samples if s.path is None})
    clips = {(s.path, s.start, s.end): s for s in samples if s.path is not None}
    jobs = [(sample, config) for sample in clips.values()]
    workers = usable_cores() if workers is None else workers
    with contextlib.closing(watched(_keep, jobs, workers, timeout_s)) as outcomes:
        bar = tqdm(outcomes, "decode", len(jobs), unit="video", disable=not progress, smoothing=0.05)
        for number, outcome in bar:
            if isinstance(outcome.value, DatasetError):
                raise outcome.value
            if outcome.error is not None:
                report.failed[jobs[number][0].video_id] = outcome.error
                continue
            decoded, size = outcome.value
            report.decoded += decoded
            report.found += not decoded
            report.bytes += size
    report.seconds = time.monotonic() - began
    _note_failures(Path(str(config.data.store)), report.failed)
    return report


def _note_failures(folder: Path, failed: dict[str, str]) -> None:
    with writing(folder, " (data.store)"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FAILURES, json.dumps(failed, indent=1) + "\n")


def _keep(job: tuple[Sample, RunConfig]) -> Any:
    """Whether a clip was decoded now, and its bytes on disk; the error of a store that cannot be written."""
    sample, config = job
    size = tower_image_size(config)
    store = ClipStore(config.data, config.max_frames, size)
    if store.read(sample) is not None:
        return False, store.path(sample).stat().st_size
    frames = load_frames(sample, config, size)
    try:
        return True, store.write(sample, frames).stat().st_size
    except DatasetError as error:
        return error
