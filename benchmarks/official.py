"""X-CLIP's score in the shape of the released module: all pairs at once, texts and videos in separate axes
`[T, W, V, F]`, which every mixing matrix turns around and back. The naive way of the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from xclip_lab.heads.xclip import XClipHead
from xclip_lab.tokens import TokenSet


def official_scores(head: XClipHead, text: TokenSet, video: TokenSet) -> Tensor:
    """`[T, V]` before CLIP's scale, unmasked (X-CLIP eq. 5 to 17)."""
    tau = head.config.temperature
    sentence, words = normalize(text.pooled, dim=-1), normalize(text.tokens, dim=-1)
    frames = normalize(video.tokens, dim=-1)
    of_words = (words @ video.pooled.T).permute(0, 2, 1)  # [T, V, W]
    of_frames = (frames @ sentence.T).permute(2, 0, 1)  # [T, V, F]
    fine = (words.flatten(0, 1) @ head.local_mat_weight @ frames.flatten(0, 1).T).view(
        len(words), words.shape[1], len(frames), frames.shape[1]
    )  # [T, W, V, F]
    over_words = torch.softmax(fine / tau, dim=1).permute(0, 2, 3, 1) @ head.word_mat_weight
    over_frames = torch.softmax(fine / tau, dim=-1) @ head.frame_mat_weight
    word_level = (over_words.permute(0, 3, 1, 2) * fine).sum(1)  # [T, V, F]
    frame_level = (over_frames * fine).sum(-1).permute(0, 2, 1)  # [T, V, W]
    matrix = (
        _attended(word_level, head.frame_mat_weight2, tau)
        + _attended(frame_level, head.word_mat_weight2, tau)
    ) / 2
    return (
        sentence @ head.global_mat_weight @ video.pooled.T
        + _attended(of_words, head.word_logit_weight, tau)
        + _attended(of_frames, head.frame_logit_weight, tau)
        + matrix
    ) / 4


def _attended(scores: Tensor, mixing: Tensor, tau: float) -> Tensor:
    return ((torch.softmax(scores / tau, dim=-1) @ mixing) * scores).sum(-1)
