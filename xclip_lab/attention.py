"""Looking inside: read and replace what passes the taps, take one logit apart into what made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from xclip_lab import text
from xclip_lab.batching import Batch, collate
from xclip_lab.clips import Clip
from xclip_lab.errors import ConfigError
from xclip_lab.heads import Tap
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.registry import did_you_mean
from xclip_lab.tokens import TokenSet


def tap_names(model: nn.Module) -> dict[str, str]:
    """Every tap of a model: name -> the axes of what passes it."""
    return {name: module.shape for name, module in model.named_modules() if isinstance(module, Tap)}


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the block, what passes a tap is replaced: by a tensor, or by a function of the value.

    Raises:
        ConfigError: a tap that the model does not have.
    """
    hooks = []
    known = tap_names(model)
    try:
        for name, value in values.items():
            hooks.append(_tap(model, name, known).register_forward_hook(_replacement(value)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_with_cache(
    model: RetrievalModel, batch: Batch, names: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Similarity `[T, V]` of a batch's texts with its videos, and what passed the taps on the way.

    The batch may hold other numbers of texts than of videos. Nothing else of the model changes.

    Args:
        names: the taps to keep, None for all.

    Raises:
        ConfigError: a tap that the model does not have.
    """
    with recorded(model, names) as cache:
        text = model.encode_text(batch.token_ids, batch.text_mask)
        video = model.encode_video(batch.video, batch.video_mask)
        similarity = model.similarity(text, video)
    return similarity, cache


@contextmanager
def recorded(model: RetrievalModel, names: Iterable[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Within the block, which is in evaluation mode and without gradients, what passes the taps is kept.

    Args:
        names: the taps to keep, None for all.

    Raises:
        ConfigError: a tap that the model does not have.
    """
    cache: dict[str, Tensor] = {}
    names = tap_names(model) if names is None else names
    with evaluating(model), replaced(model, {name: _recorder(cache, name) for name in names}):
        yield cache


@dataclass(frozen=True)
class Explanation:
    """How X-CLIP's logit of one caption with one video comes about. W tokens and F frames, padding left out.

    Attributes:
        tokens: what each token reads. words: its word's index in the caption, -1 for the marks.
        pixels: uint8 `[F, H, W, 3]`. timestamps: `[F]` seconds.
        similarity: `[W, F]`, the matrix that AOSM attends over.
        over_words: `[W, F]`, softmax weights down each frame's column; over_frames: along each word's row.
        frame_weights: `[F]`, second stage, how much each frame counts; word_weights: `[W]` likewise.
        contributions: what each contrast adds to the logit; they sum to `logit`.
    """

    caption: str
    video_id: str
    tokens: list[str]
    words: list[int]
    pixels: np.ndarray = field(repr=False)
    timestamps: np.ndarray = field(repr=False)
    similarity: np.ndarray = field(repr=False)
    over_words: np.ndarray = field(repr=False)
    over_frames: np.ndarray = field(repr=False)
    frame_weights: np.ndarray = field(repr=False)
    word_weights: np.ndarray = field(repr=False)
    contributions: dict[str, float]
    logit: float


def check_explainable(model: RetrievalModel, what: str) -> None:
    """Refuse, in the name of `what`, a model without X-CLIP's attention over similarities.

    Raises:
        ConfigError: a head other than X-CLIP with the contrast `frame-word` and the fusion `aosm`.
    """
    head = model.config.head
    if head.name != "xclip" or head.fusion != "aosm" or "frame-word" not in head.contrasts:
        raise ConfigError(
            f"{what} needs a model with head.name=xclip, head.fusion=aosm and frame-word among head.contrasts"
        )


def explain(model: RetrievalModel, clip: Clip) -> Explanation:
    """Take apart the logit of a clip's caption with its frames.

    Raises:
        ConfigError: a head other than X-CLIP with the contrast `frame-word` and the fusion `aosm`.
    """
    config = model.config
    batch = collate([clip], config.max_words, config.max_frames).to(next(model.parameters()).device)
    with evaluating(model):
        words = model.encode_text(batch.token_ids, batch.text_mask)
        video = model.encode_video(batch.video, batch.video_mask)
    return explain_features(model, clip, words, video)


def explain_features(
    model: RetrievalModel, clip: Clip, text_features: TokenSet, video_features: TokenSet
) -> Explanation:
    """As `explain`, of features that are there already: of `clip.caption` and of its frames, one each."""
    check_explainable(model, "explain")
    settings = model.config.head
    with recorded(model) as cache:
        logit = model.similarity(text_features, video_features)
    seen = {name.removeprefix("head."): value[0, 0].double().cpu().numpy() for name, value in cache.items()}
    ids, mask = text.tokenize(clip.caption, model.config.max_words)
    tokens, frames = int(mask.sum()), int(video_features.mask.sum())
    scale = model.logit_scale.exp().item() / len(settings.contrasts)
    return Explanation(
        caption=clip.caption,
        video_id=clip.video_id,
        tokens=text.token_texts(ids[0].tolist())[:tokens],
        words=text.token_words(clip.caption, model.config.max_words)[:tokens],
        pixels=clip.pixels.permute(0, 2, 3, 1).numpy(),
        timestamps=clip.timestamps.numpy(),
        similarity=seen["word_frame_similarity"][:tokens, :frames],
        over_words=seen["word_softmax"].T[:tokens, :frames],
        over_frames=seen["frame_softmax"][:tokens, :frames],
        frame_weights=seen["sentence_to_frame_softmax"][:frames],
        word_weights=seen["video_to_word_softmax"][:tokens],
        contributions={name: scale * float(seen[f"scores.{name}"]) for name in settings.contrasts},
        logit=logit.item(),
    )


def _tap(model: nn.Module, name: str, known: Iterable[str]) -> nn.Module:
    if name not in known:
        raise ConfigError(f"no tap {name!r}{did_you_mean(name, known)} (taps: {', '.join(known)})")
    return model.get_submodule(name)


def _replacement(value: Tensor | Callable[[Tensor], Tensor]):
    return lambda module, inputs, output: value(output) if callable(value) else value


def _recorder(cache: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    def record(value: Tensor) -> Tensor:
        cache[name] = value.detach()
        return value

    return record
