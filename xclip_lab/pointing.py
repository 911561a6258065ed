"""Does a word's attention lie on the frames that the word speaks of? Scored against the generated truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from xclip_lab import text
from xclip_lab.attention import run_with_cache
from xclip_lab.batching import make_loader
from xclip_lab.clips import ClipDataset, FrameStore
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.errors import DatasetError
from xclip_lab.evaluation import video_clusters
from xclip_lab.model import RetrievalModel
from xclip_lab.stats import Interval, cluster_mean_interval
from xclip_lab.synthetic import ClipTruth

CONTENT_CLASSES = ("colour", "shape", "motion")
_PAIRS = 8  # scored at once: the head computes all texts with all videos, only the diagonal is used


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
    tap: str = "head.frame_softmax",
    shuffle_truth: bool = False,
) -> Pointing:
    """Score one attention map on matching pairs of generated clips.

    Args:
        truth: by video id (`synthetic.load_truth`). store: frames decoded before.
        tap: a tap whose axes are `[T, V, W, F]` and which sums to 1 over frames.
        shuffle_truth: a control; each clip's truth is laid over its frames in a random order.

    Raises:
        ConfigError: a tap that the model does not have. DatasetError: no content word in any caption.
    """
    clips = ClipDataset(dataset, config.with_model(model.config), store=store, image_size=model.image_size)
    clusters = dict(zip(dataset.videos, video_clusters(dataset).tolist(), strict=True))
    device = next(model.parameters()).device
    shuffler = np.random.default_rng(config.seed)
    rows = []
    for batch in make_loader(clips, None, _PAIRS):
        _, cache = run_with_cache(model, batch.to(device), [tap])
        assert batch.index is not None  # a loader fills it, and the timestamps
        assert batch.timestamps is not None
        for pair, sample in enumerate(batch.index.tolist()):
            frames = int(batch.video_mask[pair].sum())
            caption, video_id = dataset.samples[sample].caption, dataset.samples[sample].video_id
            own = truth[video_id].at(batch.timestamps[pair, :frames].numpy())
            if shuffle_truth:
                own = own[:, shuffler.permutation(frames)]
            weights = cache[tap][pair, pair].float().cpu().numpy()
            rows += _score_words(caption, weights, own, truth[video_id].classes, video_id)
    if not rows:
        raise DatasetError(
            f"{dataset.name} / {dataset.split}: no {', '.join(CONTENT_CLASSES)} word within the first "
            f"{model.config.max_words} tokens of a caption; there is nothing to point at"
        )
    words = pd.DataFrame(rows)
    words["cluster"] = words["video_id"].map(clusters)
    excess = cluster_mean_interval(words["inside"] - words["uniform"], words["cluster"])
    return Pointing(words, excess, float(words["inside"].mean() / words["uniform"].mean()))


def _score_words(
    caption: str, weights: np.ndarray, own: np.ndarray, classes: list[str], video_id: str
) -> list[dict[str, object]]:
    """One row for each content word; `weights [W, F]` (F padded), `own [n_words, frames]`."""
    token_words = np.array(text.token_words(caption, len(weights)))
    rows: list[dict[str, object]] = []
    for index, word in enumerate(text.caption_words(caption)):
        tokens = token_words == index
        if classes[index] in CONTENT_CLASSES and tokens.any():
            inside = weights[tokens, : own.shape[1]][:, own[index]].sum(-1).mean()
            rows.append(
                {
                    "video_id": video_id,
                    "word": word.strip(","),
                    "word_class": classes[index],
                    "inside": float(inside),
                    "uniform": float(own[index].mean()),
                }
            )
    return rows
