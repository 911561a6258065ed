"""What every head is: token sets in, logits and named extra losses out. Taps let a reader look inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_lab.registry import Registry
from xclip_lab.tokens import TokenSet


class Tap(nn.Module):
    """Identity with a name. A forward hook on it reads the value, and replaces it by what it returns.

    Args:
        shape: the axes of what passes, for example `"[T, V, W, F]"`.
    """

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return self.shape


@dataclass(frozen=True)
class HeadOutput:
    """`logits [T, V]` before CLIP's scale, and named extra losses (keys end in `_loss`, already weighted)."""

    logits: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)


class Head(nn.Module):
    """Base of all heads. A new one is a new file: a config dataclass and a class like

        @HEADS.register("mine")
        class MyHead(Head):
            config_class = MyConfig
            def __init__(self, config, width, max_words, max_frames): ...
            def forward(self, text, video): return HeadOutput(logits)

    `config_class` is a frozen dataclass with a field `name`.
    """

    config_class: ClassVar[type]
    video_tokens: ClassVar[Literal["frames", "aggregated"]] = "aggregated"
    """Whether the head's video tokens are CLIP's frames before `agg_module` or the ones after it."""
    scaled_loss: ClassVar[bool] = True
    """Whether the cross entropy sees exp(logit_scale) * logits."""
    scaled_similarity: ClassVar[bool] = True
    """Whether `similarity` (what evaluation ranks) carries exp(logit_scale)."""

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of the head's own parameters that shall not decay, beside biases, norms and embeddings."""
        return set()

    def video_token_set(self, frames: Tensor, aggregated: Tensor, mask: Tensor) -> TokenSet:
        """All that one video can have computed without a text.

        Args:
            frames: CLIP frame vectors `[B, F, D]`. aggregated: the same after `agg_module`. mask: `[B, F]`.
        """
        tokens = frames if self.video_tokens == "frames" else aggregated
        return TokenSet(masked_frame_mean(aggregated, mask), tokens, mask)


def masked_frame_mean(frames: Tensor, mask: Tensor) -> Tensor:
    """Pooled video `[B, D]`: normalise each frame, mean over the real ones, normalise (CLIP4Clip 3.3)."""
    weights = mask.to(frames.dtype).unsqueeze(-1)
    mean = (normalize(frames, dim=-1) * weights).sum(1) / weights.sum(1)
    return normalize(mean, dim=-1)


HEADS: Registry[type[Head]] = Registry("head")
