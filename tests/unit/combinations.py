"""Every head on every `agg_module` that it can stand on, at the smallest sizes, and batches for them."""

from __future__ import annotations

import torch

from xclip_lab import Batch
from xclip_lab.heads import HEADS
from xclip_lab.temporal import AGG_MODULES

HEAD_SETTINGS = {
    "glscl": {"head.feed_forward": 16, "head.layers": 2, "head.queries": 3},
    "tightTransf": {"head.layers": 1, "head.positions": 6},
}
ONLY = {"tightTransf": ["meanP"]}
CENTER_PROJ = {"meanP": "plain", "seqLSTM": "TAB", "seqTransf": "TAB", "tdb": "TAB_TDB"}
END = 59  # the largest token id of the tiny vocabulary


def settings_of(head: str, agg_module: str) -> dict:
    """Dotted keys of a combination."""
    settings = {"head.name": head, "temporal.agg_module": agg_module, **HEAD_SETTINGS.get(head, {})}
    if head == "clip2video":
        settings["head.center_proj"] = CENTER_PROJ[agg_module]
    return settings


PAIRS = [(head, agg_module) for head in HEADS.names() for agg_module in ONLY.get(head, sorted(AGG_MODULES))]


def batch_of(texts: int = 4, videos: int = 4, seed: int = 1, words: int = 8, frames: int = 4) -> Batch:
    """Captions of 2 to `words` tokens, videos of 1 to `frames` frames. Padded frames are no zeros, so that
    what leaks shows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, END - 1, (texts, words), generator=generator)
    lengths = torch.randint(2, words + 1, (texts, 1), generator=generator)
    place = torch.arange(words)
    ids = ids.masked_fill(place == lengths - 1, END).masked_fill(place >= lengths, 0)
    counts = torch.randint(1, frames + 1, (videos, 1), generator=generator)
    video = torch.randn(videos, frames, 3, 32, 32, generator=generator)
    return Batch(ids, (place < lengths).long(), video, (torch.arange(frames) < counts).long())
