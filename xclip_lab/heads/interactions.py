"""Token-wise baselines: MaxSim (ColBERT) and the token interactions of DRL (Wang et al. 2022), all masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_lab.aosm.formula import masked_softmax
from xclip_lab.heads.base import HEADS, Head, HeadOutput, Tap
from xclip_lab.tokens import TokenSet

if TYPE_CHECKING:
    from xclip_lab.temporal import AggModule


WEIGHTS = "weights"
"""The name of the tokens' weights in `TokenSet.extra`."""


class _Interaction(Head):
    """What these heads share: the matrix of cosines of real words and real frames."""

    pairs_alone = True

    def __init__(self, config: Any, width: int, max_words: int, max_frames: int) -> None:
        super().__init__(config, width, max_words, max_frames)
        self.word_frame_similarity = Tap("[T, V, W, F]")

    def best_matches(self, text: TokenSet, video: TokenSet) -> tuple[Tensor, Tensor]:
        """Each word's best frame `[T, W, V]` and each frame's best word `[T, F, V]`; 0 where padded."""
        words, frames = normalize(_without_padding(text), dim=-1), normalize(_without_padding(video), dim=-1)
        # With the videos innermost a maximum compares whole vectors.
        scores = words.flatten(0, 1) @ frames.transpose(0, 1).flatten(0, 1).T
        scores = scores.view(*words.shape[:2], frames.shape[1], len(frames))  # [T, W, F, V]
        scores = self.word_frame_similarity(scores.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return scores.amax(2) * text.mask[:, :, None], scores.amax(1) * video.mask.T


def _without_padding(tokens: TokenSet) -> Tensor:
    """The tokens with the first real one in the padded places: there it changes no maximum."""
    first = tokens.tokens[torch.arange(len(tokens)), tokens.mask.int().argmax(1)]
    return torch.where(tokens.mask.bool()[..., None], tokens.tokens, first[:, None])


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.sum(1) / mask.sum(-1)


@HEADS.register("maxsim")
class MaxSimHead(_Interaction):
    """Each word looks for its best frame; the mean over words (ColBERT's late interaction)."""

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        of_words, _ = self.best_matches(text, video)
        return HeadOutput(_mean(of_words, text.mask[:, None]))


@HEADS.register("ti")
class TokenInteractionHead(_Interaction):
    """MaxSim in both directions: words look for frames, frames for words; the mean of both (DRL 3.2)."""

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        of_words, of_frames = self.best_matches(text, video)
        return HeadOutput((_mean(of_words, text.mask[:, None]) + _mean(of_frames, video.mask[None])) / 2)


@HEADS.register("wti")
class WeightedTokenInteractionHead(_Interaction):
    """As `ti`, with weights of words and of frames that two small networks learn (DRL 3.2, eq. 4)."""

    def __init__(self, config: Any, width: int, max_words: int, max_frames: int) -> None:
        super().__init__(config, width, max_words, max_frames)
        self.text_weight_fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.video_weight_fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.word_softmax = Tap("[T, W]: over words")
        self.frame_softmax = Tap("[V, F]: over frames")

    def encode_text(self, text: TokenSet) -> TokenSet:
        """Adds the words' weights."""
        return self._weigh(text, self.text_weight_fc, self.word_softmax)

    def encode_video(self, frames: Tensor, mask: Tensor, temporal: AggModule) -> TokenSet:
        """Adds the frames' weights."""
        return self._weigh(
            super().encode_video(frames, mask, temporal), self.video_weight_fc, self.frame_softmax
        )

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        of_words, of_frames = self.best_matches(text, video)
        from_words = torch.einsum("twv,tw->tv", of_words, text.extra[WEIGHTS])
        from_frames = torch.einsum("tfv,vf->tv", of_frames, video.extra[WEIGHTS])
        return HeadOutput((from_words + from_frames) / 2)

    def _weigh(self, of: TokenSet, network: nn.Module, tap: Tap) -> TokenSet:
        weights = tap(masked_softmax(network(of.tokens).squeeze(-1), of.mask, -1))
        return TokenSet(of.pooled, of.tokens, of.mask, {WEIGHTS: weights})
