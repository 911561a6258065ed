"""Does a word's attention lie on the frames that the word speaks of? Scored against the generated truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from xclip_lab import text
from xclip_lab.attention_maps import Pair, each_pair, pair_maps
from xclip_lab.attention_scores import mass
from xclip_lab.clips import FrameStore
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.errors import ConfigError, DatasetError
from xclip_lab.evaluation import video_clusters
from xclip_lab.model import RetrievalModel
from xclip_lab.stats import Interval, cluster_mean_interval
from xclip_lab.synthetic import ClipTruth

CONTENT_CLASSES = ("colour", "shape", "motion")
_MAP = "frame_softmax"


@dataclass(frozen=True)
class Pointing:
    """How much attention content words put on their own frames.

    Attributes:
        words: one row a word: `video_id`, `word`, `word_class`, `inside` (its attention mass on its own
            frames, 0 to 1), `uniform` (what a uniform map would put there) and `cluster` (its video pair).
        excess: mean of `inside - uniform`, with its 95% interval clustered by video pair.
        ratio: mean `inside` over mean `uniform`.
    """

    words: pd.DataFrame = field(repr=False)
    excess: Interval
    ratio: float

    @property
    def points(self) -> bool:
        """Whether the interval lies above 0 and the mean is at least 1.5 times uniform."""
        return self.excess.low > 0 and self.ratio >= 1.5

    def __str__(self) -> str:
        return (
            f"{self.words['inside'].mean():.3f} of the attention inside, "
            f"uniform {self.words['uniform'].mean():.3f}: "
            f"{self.ratio:.2f} times; excess {self.excess.value:+.3f} "
            f"[{self.excess.low:+.3f}, {self.excess.high:+.3f}] over {len(self.words)} words: "
            f"{'points at the truth' if self.points else 'does not point at the truth'}"
        )


def point_at_truth(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    truth: Mapping[str, ClipTruth],
    config: RunConfig,
    store: FrameStore | None = None,
    shuffle_truth: bool = False,
) -> Pointing:
    """Score `frame_softmax` on matching pairs of generated clips.

    Args:
        truth: by video id (`synthetic.load_truth`). store: frames decoded before.
        shuffle_truth: a control; each clip's truth is laid over its frames in a random order.

    Raises:
        ConfigError: a map that the model does not have. DatasetError: no content word in any caption.
    """
    clusters = dict(zip(dataset.videos, video_clusters(dataset).tolist(), strict=True))
    shuffler = np.random.default_rng(config.seed)
    rows = []
    for pair in each_pair(pair_maps(model, dataset, config, store, baselines=False), dataset):
        if _MAP not in pair.seen.maps:
            raise ConfigError(f"this model has no map {_MAP!r} (its maps: {', '.join(pair.seen.maps)})")
        own = truth[pair.video_id].at(pair.timestamps)
        if shuffle_truth:
            own = own[:, shuffler.permutation(pair.frames)]
        rows += _score_words(pair, own, truth[pair.video_id].classes)
    if not rows:
        raise DatasetError(
            f"{dataset.name} / {dataset.split}: no {', '.join(CONTENT_CLASSES)} word within the first "
            f"{model.config.max_words} tokens of a caption; there is nothing to point at"
        )
    words = pd.DataFrame(rows)
    words["cluster"] = words["video_id"].map(clusters)
    excess = cluster_mean_interval(words["inside"] - words["uniform"], words["cluster"])
    return Pointing(words, excess, float(words["inside"].mean() / words["uniform"].mean()))


def _score_words(pair: Pair, own: np.ndarray, classes: list[str]) -> list[dict[str, object]]:
    """One row for each content word that has tokens left; `own [n_words, frames]`."""
    weights = pair.word_rows(_MAP)
    padded = np.pad(own, ((0, 0), (0, weights.shape[1] - pair.frames)))[: len(weights)]
    inside = mass(weights, padded)
    return [
        {
            "video_id": pair.video_id,
            "word": word.strip(","),
            "word_class": classes[index],
            "inside": float(inside[index]),
            "uniform": float(own[index].mean()),
        }
        for index, word in enumerate(text.caption_words(pair.caption)[: len(weights)])
        if classes[index] in CONTENT_CLASSES
    ]
