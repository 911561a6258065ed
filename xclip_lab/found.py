"""What a query found in a library: the videos and, in each, the frames that answered."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from xclip_lab.contact_sheet import Strip, contact_sheet, read_pictures, time_code


@dataclass(frozen=True)
class Hit:
    """One video of an answer.

    Attributes:
        video: its path within the folder. seconds: `[n]`, when the frames that the model saw are shown.
        weights: `[n]`, how much each of them answers (`Found.weighed_by`).
    """

    rank: int
    video: str
    path: Path
    score: float
    seconds: np.ndarray
    weights: np.ndarray

    def best(self, count: int) -> list[float]:
        """Seconds of the frames that answer most, the strongest first."""
        return list(dict.fromkeys(self.seconds[np.argsort(-self.weights, kind="stable")].tolist()))[:count]


@dataclass(frozen=True, repr=False)
class Found:
    """The answer to a query. In a notebook it shows itself as text; `show` draws it.

    Attributes:
        hits: the best first. gallery: how many videos were asked. shortlist: how many of them the head
            scored, None for all. weighed_by: what `Hit.weights` are.
    """

    query: str
    hits: list[Hit]
    gallery: int
    shortlist: int | None
    weighed_by: str

    @property
    def scoring(self) -> str:
        """How the videos were ranked, in words."""
        if self.shortlist is None:
            return f"all {self.gallery} videos scored by the head"
        return (
            f"{self.gallery} videos by their pooled vectors, the nearest {self.shortlist} scored by the head"
        )

    def table(self) -> pd.DataFrame:
        """A row a video: rank, video, score, the times of its three best frames."""
        rows = [
            (hit.rank, hit.video, f"{hit.score:.3f}", "  ".join(map(time_code, hit.best(3))))
            for hit in self.hits
        ]
        return pd.DataFrame(rows, columns=["rank", "video", "score", "best frames"])

    def __repr__(self) -> str:
        return f"\u201c{self.query}\u201d: {self.scoring}\n{self.table().to_string(index=False)}"

    def show(self, frames: int = 5) -> Figure:
        """A contact sheet: of each video its `frames` best frames in the order of time, the best outlined.

        Raises:
            VideoError: a video can no longer be read.
        """
        strips = []
        for hit in self.hits:
            times = sorted(hit.best(frames))
            heading = f"{hit.rank}   {hit.video}   score {hit.score:.3f}"
            weights = dict(zip(hit.seconds.tolist(), hit.weights.tolist(), strict=True))
            labels = [f"{time_code(time)}  ({weights[time]:.2f})" for time in times]
            pictures = read_pictures(hit.path, times)
            strips.append(Strip(heading, labels, pictures, times.index(hit.best(1)[0])))
        return contact_sheet(
            strips, f"\u201c{self.query}\u201d", f"{self.scoring}; outlined: most {self.weighed_by}"
        )


def file_name(query: str) -> str:
    """A name for the figure of a query, another one for each.

    >>> file_name("a dog runs")
    'a-dog-runs-1138b700'
    """
    words = "-".join(re.findall(r"\w+", query.lower()))[:40]
    return f"{words}-{hashlib.sha256(query.encode()).hexdigest()[:8]}"
