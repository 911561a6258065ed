"""What every head is: token sets in, logits and named extra losses out. Taps let a reader look inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_lab.registry import Registry
from xclip_lab.tap import Tap as Tap
from xclip_lab.tokens import TokenSet

if TYPE_CHECKING:
    from xclip_lab.config import TemporalConfig
    from xclip_lab.temporal import AggModule


@dataclass(frozen=True)
class HeadOutput:
    """What a head makes of T texts and V videos.

    Attributes:
        logits: `[T, V]` before CLIP's scale: what evaluation ranks and, without `contrasted`, the loss uses.
        aux: named extra losses (keys end in `_loss`, already weighted). A head whose losses are over pairs
            gives them where there are as many texts as videos.
        contrasted: named `(weight, logits [T, V])`, each with a cross entropy of its own, where the loss is a
            weighted sum of several; the keys end in `_loss`.
    """

    logits: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    contrasted: Mapping[str, tuple[float, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadConfig:
    """Of a head with nothing to set."""

    name: str = ""


class Head(nn.Module):
    """Base of all heads. A new one is a new file: a config dataclass and a class like

        @HEADS.register("mine")
        class MyHead(Head):
            config_class = MyConfig
            def __init__(self, config, width, max_words, max_frames): ...
            def forward(self, text, video): return HeadOutput(logits)

    `config_class` is a frozen dataclass with a field `name`. All else has a default that mostly fits; an
    `__init__` of its own hands its arguments on.

    Args:
        config: of that class. width: D. max_words, max_frames: W and F.
    """

    config_class: ClassVar[type] = HeadConfig
    family: ClassVar[str | None] = None
    """The official code whose checkpoints it takes (`families.FAMILIES`), None where there is none."""
    official: ClassVar[Mapping[str, Any]] = {}
    """What that code switches on outside the head, as dotted keys of the config."""
    video_tokens: ClassVar[Literal["frames", "aggregated"]] = "aggregated"
    """Whether the head's video tokens are CLIP's frames before `agg_module` or the ones after it."""
    pairs_alone: ClassVar[bool] = False
    """Whether each score is made of its own text and video and nothing drawn at random, and the loss of the
    scores: then several processes share the rows of the loss out among them."""
    scaled_loss: ClassVar[bool] = True
    """Whether the cross entropy sees exp(logit_scale) * logits."""
    scaled_similarity: ClassVar[bool] = True
    """Whether `similarity` (what evaluation ranks) carries exp(logit_scale)."""

    def __init__(self, config: Any, width: int, max_words: int, max_frames: int) -> None:
        super().__init__()
        self.config, self.width = config, width

    @classmethod
    def check(cls, config: Any, temporal: TemporalConfig, width: int | None) -> None:
        """Refuse settings that make no sense together, with the reason.

        Args:
            config: the head's. temporal: the `agg_module` that it would stand on. width: D, None if unknown.

        Raises:
            ConfigError: says what does fit.
        """

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        raise NotImplementedError

    def backend_on(self, device: torch.device) -> str:
        """Who computes it there; the result's stamp says so."""
        return "formula"

    def block_on(self, device: torch.device) -> tuple[int, int]:
        """How many texts and videos are best scored at a time."""
        return 64, 64

    def encode_text(self, text: TokenSet) -> TokenSet:
        """All that one text can have computed without a video: `TokenSet.extra` may be filled here."""
        return text

    def encode_video(self, frames: Tensor, mask: Tensor, temporal: AggModule) -> TokenSet:
        """All that one video can have computed without a text.

        Args:
            frames: CLIP frame vectors `[B, F, D]`. mask: `[B, F]`. temporal: the `agg_module`.
        """
        aggregated = temporal(frames, mask)
        tokens = frames if self.video_tokens == "frames" else aggregated
        return TokenSet(masked_frame_mean(aggregated, mask), tokens, mask)

    def join(self, temporal: AggModule) -> None:
        """Called once, as the model is built: what the head needs beside an `agg_module` like this one."""

    def start_from_clip(self, clip: CLIP) -> None:
        """Take over what officially starts as a copy of CLIP's towers."""

    def no_weight_decay(self) -> set[str]:
        """Names of the head's own parameters that shall not decay, beside biases, norms and embeddings."""
        return set()


def masked_frame_mean(frames: Tensor, mask: Tensor) -> Tensor:
    """Pooled video `[B, D]`: normalise each frame, mean over the real ones, normalise (CLIP4Clip 3.3)."""
    weights = mask.to(frames.dtype).unsqueeze(-1)
    mean = (normalize(frames, dim=-1) * weights).sum(1) / weights.sum(1)
    return normalize(mean, dim=-1)


HEADS: Registry[type[Head]] = Registry("head")
