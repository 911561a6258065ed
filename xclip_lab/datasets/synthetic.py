"""Generated clips (`xclip_lab.synthetic`) as a dataset.

On disk: `videos/<video_id>.mp4`; `<split>.jsonl`, a line per clip: `video_id, caption, level, group, frames,
fps`, `events` (things, action, the frames `[start, stop)`, whether the caption tells it) and `words`
(`[word, class, [[start, stop], ...]]`); `generate.yaml`, the configuration it was made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from xclip_lab.datasets.base import DATASETS, SPLITS, Sample, Source, VideoTextDataset
from xclip_lab.datasets.reading import read_text
from xclip_lab.errors import AbsentError, DatasetError
from xclip_lab.registry import did_you_mean

CONFIG_FILE = "generate.yaml"


def video_path(root: Path, video_id: str) -> Path:
    """Where a clip's file lies."""
    return root / "videos" / f"{video_id}.mp4"


def annotation_path(root: Path, split: str) -> Path:
    """Where a split's annotations lie."""
    return root / f"{split}.jsonl"


def read_annotations(root: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a split.

    Raises:
        DatasetError: the split was not generated, or its file is damaged.
    """
    if split not in SPLITS:
        near = did_you_mean(split, SPLITS)
        raise DatasetError(f"dataset 'synthetic': no split {split!r}{near} (there are {', '.join(SPLITS)})")
    path = annotation_path(root, split)
    remedy = f"run: xclip-lab data generate --root {root}"
    if not path.is_file():
        if (root / CONFIG_FILE).is_file():
            raise AbsentError(
                f"{root}: no generated split {split!r}: its {CONFIG_FILE} asks for no {split} clips, or "
                f"generating was interrupted; to go on, {remedy}"
            )
        raise AbsentError(f"{root}: no generated clips here; {remedy}")
    lines = read_text(path).splitlines()
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is damaged ({error}); delete it and {remedy}") from error


@DATASETS.register("synthetic")
def synthetic(source: Source) -> VideoTextDataset:
    """Read generated clips. `groups` are the numbers of the pairs: clips that differ in their motions
    only, or in their order only, share one; every other clip has its own.

    Raises:
        DatasetError: not generated yet, or damaged.
    """
    root, split = source.root, source.split
    if source.protocol is not None:
        raise DatasetError(f"dataset 'synthetic' has no protocols, {source.protocol!r} was asked for")
    clips = read_annotations(root, split)
    samples = [
        Sample(clip["video_id"], clip["caption"], path=video_path(root, clip["video_id"])) for clip in clips
    ]
    groups = np.array([clip["group"] for clip in clips], dtype=np.int64)
    return VideoTextDataset("synthetic", split, root, samples, groups=groups)
