"""What scoring costs: multiply-accumulates after the towers, counted by torch as the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from xclip_lab.model import RetrievalModel, computed_by
from xclip_lab.tokens import TokenSet

_SIZES = ((4, 5), (8, 5), (4, 7), (8, 7))  # never as many texts as videos: a head may take them for pairs


@dataclass(frozen=True)
class ScoringCost:
    """Multiply-accumulates of matrix products after the towers, in units of one.

    Attributes:
        text, video: of one more text or video (`agg_module`, what the head computes of one modality alone,
            and the head's projections). pair: of one more pair.
    """

    text: float
    video: float
    pair: float

    def gmac(self, texts: int, videos: int) -> float:
        """Of scoring all texts with all videos, in 10^9."""
        return (self.text * texts + self.video * videos + self.pair * texts * videos) / 1e9


def scoring_cost(model: RetrievalModel) -> ScoringCost:
    """Count what a model computes from CLIP's features on, at its own `max_words` and `max_frames`.

    The count of T texts and V videos is `k + a T + b V + c T V`; four small galleries tell a, b and c.
    Softmaxes, sums and other element-wise work are not in it, as in the papers' counts. torch counts nothing
    for an LSTM: its four gates, each of a frame and of the state before it, are added by hand.
    """
    counts = [_count(model, texts, videos) for texts, videos in _SIZES]
    terms = np.array([(1, texts, videos, texts * videos) for texts, videos in _SIZES], dtype=float)
    _, of_text, of_video, of_pair = np.linalg.solve(terms, counts)
    if model.config.temporal.agg_module == "seqLSTM":
        of_video += 8 * model.clip.sizes.embed_dim**2 * model.config.max_frames
    return ScoringCost(float(of_text), float(of_video), float(of_pair))


def random_features(
    model: RetrievalModel, texts: int, videos: int
) -> tuple[TokenSet, torch.Tensor, torch.Tensor]:
    """Features as the towers would give them: a text set, frames `[V, F, D]` and their mask."""
    width, config = model.clip.sizes.embed_dim, model.config
    words = torch.randn(texts, config.max_words, width)
    text = TokenSet(words[:, -1], words, torch.ones(texts, config.max_words, dtype=torch.int64))
    frames = torch.randn(videos, config.max_frames, width)
    return text, frames, torch.ones(videos, config.max_frames, dtype=torch.int64)


def _count(model: RetrievalModel, texts: int, videos: int) -> float:
    text, frames, mask = random_features(model, texts, videos)
    # With gradients on: attention without them takes a fused way that torch does not count, nor does it count
    # what other threads do.
    one_way = "formula" if hasattr(model.head.config, "backend") else None
    with computed_by(model, one_way), FlopCounterMode(display=False) as counter, torch.enable_grad():
        model.similarity(model.head.encode_text(text), model.head.encode_video(frames, mask, model.temporal))
    return counter.get_total_flops() / 2
