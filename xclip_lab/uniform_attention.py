"""A control of attention: what a model loses when one of its softmaxes looks everywhere alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import local

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from xclip_lab.attention import check_explainable, replaced, tap_names
from xclip_lab.clips import Clip, FrameStore
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.encoding import encode
from xclip_lab.evaluation import score
from xclip_lab.metrics import retrieval_metrics
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.tokens import TokenSet


def softmax_taps(model: RetrievalModel) -> list[str]:
    """The taps of the head that carry attention weights."""
    return [name for name in tap_names(model) if name.startswith("head.") and name.endswith("_softmax")]


@contextmanager
def uniform(model: RetrievalModel, name: str) -> Iterator[None]:
    """Within the block, the softmax of a tap looks everywhere alike: where the model leaves padding out
    (`head.mask_padding`) at every real word or frame, else at every position.

    Raises:
        ConfigError: a model that `attention.explain` does not take, or a tap that it does not have.
    """
    check_explainable(model, "uniform attention")
    over_words = tap_names(model).get(name, "").partition("]")[0].endswith("W")
    seen = local()  # blocks of a similarity matrix are computed in threads

    def see(head: nn.Module, inputs: tuple[TokenSet, TokenSet]) -> None:
        text, video = inputs
        seen.mask = text.mask[:, None] if over_words else video.mask[None]

    def flat(weights: Tensor) -> Tensor:
        if not model.config.head.mask_padding:
            return torch.full_like(weights, 1 / weights.shape[-1])
        mask = seen.mask if weights.ndim == 3 else seen.mask.unsqueeze(2)
        return (mask / mask.sum(-1, keepdim=True)).to(weights.dtype).expand_as(weights)

    hook = model.head.register_forward_pre_hook(see)
    try:
        with replaced(model, {name: flat}):
            yield
    finally:
        hook.remove()


def uniform_stages(
    model: RetrievalModel,
    clip: Clip,
    dataset: VideoTextDataset,
    config: RunConfig,
    store: FrameStore | None = None,
) -> pd.DataFrame:
    """What is lost when one softmax of AOSM is made uniform. Texts and videos are encoded once.

    Args:
        clip: one of the dataset, whose frames can be read.

    Returns:
        A row for the model as it is and for each softmax: the `logit` of `clip` and the text-to-video `R@1`
        of the dataset, in percent.

    Raises:
        ConfigError: a model that `attention.explain` does not take.
    """
    check_explainable(model, "uniform attention")
    encoded = encode(model, dataset, config, store)
    with evaluating(model):
        text = encoded.text[:]
    text_to_video = encoded.dataset.text_to_video
    [row] = np.flatnonzero(encoded.rows == clip.index)
    rows = {}
    for name in ["as it is", *softmax_taps(model)]:
        with nullcontext() if name == "as it is" else uniform(model, name):
            similarity = score(model, text, encoded.video, config.evaluation.block_size)
        recall = retrieval_metrics(similarity, text_to_video, config.evaluation.ties)["t2v"]["R@1"]
        logit = similarity[row, text_to_video[row]].item()
        rows[name.removeprefix("head.")] = {"logit": logit, "R@1": recall}
    return pd.DataFrame.from_dict(rows, orient="index")
