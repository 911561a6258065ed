"""Which word speaks of which frame: what attention maps are scored against."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xclip_lab.datasets.synthetic import read_annotations


@dataclass(frozen=True)
class ClipTruth:
    """The truth about one clip.

    Attributes:
        level: 1 objects, 2 motion, 3 order, 4 distractors. group: the number of its pair.
        words: the caption's whitespace-separated words. classes: of each word, one of colour, shape, motion,
            order, function.
        frames: bool `[n_words, n_frames]` over all frames of the file: the word speaks of what is seen there.
            Rows of order and function words are empty.
        fps: frames a second.
    """

    level: int
    group: int
    words: list[str]
    classes: list[str]
    frames: np.ndarray = field(repr=False)
    fps: float

    def at(self, timestamps: np.ndarray) -> np.ndarray:
        """The truth for sampled frames: `timestamps [F]` in seconds -> bool `[n_words, F]`, of the frames of
        the file that are nearest in time."""
        nearest = np.rint(np.asarray(timestamps, dtype=np.float64) * self.fps).astype(np.int64)
        return self.frames[:, np.clip(nearest, 0, self.frames.shape[1] - 1)]


def load_truth(root: str | Path, split: str) -> dict[str, ClipTruth]:
    """The truth about every clip of a split, by video id.

    Raises:
        DatasetError: not generated yet, or damaged.
    """
    return {clip["video_id"]: clip_truth(clip) for clip in read_annotations(Path(root), split)}


def clip_truth(clip: dict[str, Any]) -> ClipTruth:
    """The truth in one line of `<split>.jsonl`."""
    words, classes, spans = zip(*clip["words"], strict=True)
    frames = np.zeros((len(words), clip["frames"]), dtype=bool)
    for row, row_spans in zip(frames, spans, strict=True):
        for start, stop in row_spans:
            row[start:stop] = True
    return ClipTruth(clip["level"], clip["group"], list(words), list(classes), frames, clip["fps"])
