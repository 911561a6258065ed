"""RetrievalModel = towers + agg_module + head. The one contract behind which every method stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xclip_lab.backbone import build_towers
from xclip_lab.batching import Batch
from xclip_lab.config import ModelConfig, RunConfig
from xclip_lab.errors import ConfigError, InputError
from xclip_lab.heads import HEADS
from xclip_lab.losses import symmetric_cross_entropy
from xclip_lab.precision import in_float32
from xclip_lab.preprocess import normalise
from xclip_lab.seen import Seen
from xclip_lab.temporal import AGG_MODULES
from xclip_lab.tokens import TokenSet

Complete = Callable[[Tensor], Tensor]
"""Scores of some of a batch's texts `[t, V]` to those of all `[T, V]`."""
Gather = Callable[[TokenSet, TokenSet], tuple[TokenSet, TokenSet, Complete]]


def as_it_is(logits: Tensor) -> Tensor:
    """Of all texts already."""
    return logits


def as_they_are(text: TokenSet, video: TokenSet) -> tuple[TokenSet, TokenSet, Complete]:
    """Of one process alone."""
    return text, video, as_it_is


@dataclass(frozen=True)
class Origin:
    """Where a model's weights came from; `evaluate` stamps it.

    Attributes:
        checkpoint: the file, or what is to be said of weights without one. selection_split: the split that
            chose the checkpoint, None where none did. run: the config it was trained with, if known: frames
            are sampled the same way unless told otherwise. dtypes: of the weights in an official file, by
            their official names. seen: which videos it was trained on and selected by, None where not
            known.
    """

    checkpoint: str
    selection_split: str | None = None
    run: RunConfig | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    seen: Seen | None = None


class RetrievalModel(nn.Module):
    """Finds videos by text. Build it with `create_model`, `load_model` or `load_official`.

    Attributes:
        config: what it was built from. clip: the towers. temporal: `agg_module`. head: the similarity.
        origin: where its weights came from.
    """

    def __init__(self, config: ModelConfig, load_pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        self.origin = Origin(f"none: untrained (towers: {config.towers.pretrained or 'random weights'})")
        self.clip = build_towers(config.towers, load_pretrained)
        sizes = self.clip.sizes
        agg_module = AGG_MODULES[config.temporal.agg_module]
        self.temporal = agg_module(config.temporal, sizes.embed_dim, sizes.context_length)
        head_class = HEADS[config.head.name]
        self.head = head_class(config.head, sizes.embed_dim, config.max_words, config.max_frames)
        self.head.join(self.temporal)
        if sizes.embed_dim == sizes.text_width:
            for part in (self.temporal, self.head):
                part.start_from_clip(self.clip)

    @property
    def logit_scale(self) -> nn.Parameter:
        """CLIP's scale, as its logarithm."""
        return self.clip.logit_scale

    @property
    def image_size(self) -> int:
        """Side of the square frames, in pixels."""
        return self.clip.sizes.image_size

    def encode_text(self, token_ids: Tensor, mask: Tensor) -> TokenSet:
        """Sentence and word features.

        Args:
            token_ids: int64 `[B, W]`; or `[B, W, D]`, what the text tower makes of them (`features`).
            mask: `[B, W]`, 1 = real.

        Raises:
            InputError: a mask of another shape, more words than the text tower has positions, or (on the CPU)
                an id that is not in its vocabulary.
        """
        self._check_text_mask(token_ids, mask)
        if token_ids.is_floating_point():
            words, last = token_ids, mask.sum(-1) - 1  # the last real token is the end mark
            sentence = words[torch.arange(len(words), device=words.device), last]
        else:
            sentence, words = self.clip.words(token_ids, mask)
        return self.text_set(sentence, words, mask)

    def text_set(self, sentence: Tensor, words: Tensor, mask: Tensor) -> TokenSet:
        """What the head makes of the text tower's `sentence [B, D]` and `words [B, W, D]`."""
        with in_float32(words.device):
            return self.head.encode_text(TokenSet(sentence, words, mask))

    def encode_video(self, video: Tensor, mask: Tensor) -> TokenSet:
        """Everything that a video can have computed without a text.

        Args:
            video: `[B, F, 3, H, W]`; uint8 pixels, normalised here, or float already normalised. Or
                `[B, F, D]`, what the image tower makes of them (`frame_features`).
            mask: `[B, F]`, 1 = real.

        Raises:
            InputError: no video, one without a single valid frame (ledger 13), frames of another size, or
                more of them than learned positions.
        """
        self._check_mask(video, mask)
        frames = video if video.ndim == 3 else self.frame_features(video, mask)
        with in_float32(video.device):
            return self.head.encode_video(frames, mask, self.temporal)

    def frame_features(self, video: Tensor, mask: Tensor) -> Tensor:
        """One vector a frame, `[B, F, D]` float32, before `agg_module`. Arguments as of `encode_video`.

        Raises:
            InputError: frames of another size.
        """
        if video.ndim != 5 or video.shape[2:] != (3, self.image_size, self.image_size):
            raise InputError(
                f"video must be [B, F, 3, {self.image_size}, {self.image_size}], got {list(video.shape)}"
            )
        return self.clip.frames(self._normalise(video, mask))

    def similarity(self, text: TokenSet, video: TokenSet) -> Tensor:
        """`[T, V]`: what the paper's evaluation ranks, on its scale."""
        logits = self._head_output(text, video).logits
        return logits * self.logit_scale.exp() if self.head.scaled_similarity else logits

    def loss(self, batch: Batch, gather: Gather = as_they_are) -> dict[str, Tensor]:
        """`loss` and its named parts: symmetric cross entropy over the batch, and the head's own losses.

        Args:
            gather: what joins the features with those of other processes (`distributed.gather_pairs`), so
                that the loss is that of the whole batch.

        Raises:
            InputError: as of `check_pairs`, or shapes that do not fit.
        """
        self.check_pairs(batch)
        text = self.encode_text(batch.token_ids, batch.text_mask)
        return self.pair_loss(*gather(text, self.encode_video(batch.video, batch.video_mask)))

    def check_pairs(self, batch: Batch) -> None:
        """Raises InputError: another number of captions than of videos, a mask of another shape, or a video
        without a valid frame."""
        if len(batch.token_ids) != len(batch.video):
            raise InputError(
                f"a loss needs pairs: {len(batch.token_ids)} captions with {len(batch.video)} videos"
            )
        self._check_text_mask(batch.token_ids, batch.text_mask)
        self._check_mask(batch.video, batch.video_mask)

    def pair_loss(self, text: TokenSet, video: TokenSet, complete: Complete = as_it_is) -> dict[str, Tensor]:
        """`loss` of features: text i belongs to video i.

        Args:
            complete: where the texts are not all of the batch's, what makes theirs the scores of all.
        """
        output = self._head_output(text, video)
        scale = self.logit_scale.exp() if self.head.scaled_loss else 1.0
        if output.aux and complete is not as_it_is:
            raise ValueError(f"head {self.config.head.name} has losses of its own: pairs_alone must be False")
        contrasted = output.contrasted or {"contrastive_loss": (1.0, output.logits)}
        parts = {
            name: weight * symmetric_cross_entropy(complete(logits) * scale)
            for name, (weight, logits) in contrasted.items()
        }
        parts |= output.aux
        return {"loss": sum(value for name, value in parts.items() if name.endswith("_loss")), **parts}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss, so that wrappers which know only `forward` can train the model."""
        return self.loss(batch)

    def _head_output(self, text: TokenSet, video: TokenSet):
        # A temperature of 0.01 amplifies an error of the scores a hundred times.
        with in_float32(text.pooled.device):
            return self.head(text, video)

    def _normalise(self, video: Tensor, mask: Tensor) -> Tensor:
        """Pixels to CLIP's input. Padded frames are zeros after it, as in the official loaders.

        What comes normalised is taken as it is, unless `towers.mask_padded_frames` says otherwise.
        """
        as_pixels = video.dtype == torch.uint8
        pixels = normalise(video) if as_pixels else video
        if not as_pixels and not self.config.towers.mask_padded_frames:
            return pixels
        return pixels * mask[:, :, None, None, None].to(pixels.dtype)

    def _check_text_mask(self, token_ids: Tensor, mask: Tensor) -> None:
        if mask.ndim != 2 or mask.shape != token_ids.shape[:2]:
            raise InputError(f"token_ids are {list(token_ids.shape)} but their mask is {list(mask.shape)}")

    def _check_mask(self, video: Tensor, mask: Tensor) -> None:
        if mask.ndim != 2 or mask.shape != video.shape[:2]:
            raise InputError(f"video is {list(video.shape)} but its mask is {list(mask.shape)}")
        if not len(video):
            raise InputError("video: there is none; give one or more")
        empty = (mask.sum(-1) == 0).nonzero().flatten().tolist()
        if empty:
            raise InputError(f"no valid frame in video(s) {empty} of the batch; leave them out")


@contextmanager
def computed_by(model: RetrievalModel, backend: str | None) -> Iterator[None]:
    """Within the block another backend computes the head (`XClipHead.backend_on`); None changes nothing.

    Raises:
        ConfigError: a head that has only one.
    """
    before: Any = model.head.config
    if backend is not None:
        if not hasattr(before, "backend"):
            raise ConfigError(f"backend: {backend!r}: head {before.name} has but one way; leave it out")
        model.head.config = replace(before, backend=backend)
    try:
        yield
    finally:
        model.head.config = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block: evaluation mode and no gradients; afterwards each module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def create_model(config: ModelConfig | RunConfig) -> RetrievalModel:
    """A model as configured: pretrained towers where named, everything added initialised as officially.

    Raises:
        ConfigError: impossible sizes or names. CheckpointError: pretrained weights that cannot be had.
    """
    return RetrievalModel(config.model if isinstance(config, RunConfig) else config)


def official_name(name: str) -> str:
    """The name that the official code gives a parameter of this model.

    >>> official_name("temporal.frame_position_embeddings.weight")
    'frame_position_embeddings.weight'
    """
    return name.removeprefix("temporal.").removeprefix("head.")
