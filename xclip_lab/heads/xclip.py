"""X-CLIP (Ma et al. 2022): four contrasts between sentence, words, video and frames, fused by AOSM."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_lab.aosm import blocked, kernels
from xclip_lab.aosm.backend import Backend, Choice, choose
from xclip_lab.aosm.formula import attend, pool
from xclip_lab.aosm.matrices import Matrices
from xclip_lab.errors import ConfigError, InputError
from xclip_lab.heads.base import HEADS, Head, HeadOutput, Tap
from xclip_lab.ranges import PositiveFloat
from xclip_lab.tokens import TokenSet

Contrast = Literal["video-sentence", "video-word", "sentence-frame", "frame-word"]
CONTRASTS: tuple[Contrast, ...] = ("video-sentence", "video-word", "sentence-frame", "frame-word")


@dataclass(frozen=True)
class XClipConfig:
    """X-CLIP's settings.

    `contrasts`: which of the four are averaged. `fusion`: how similarity vectors and the similarity matrix
    become one score: `aosm`; `mean-max` and its like (first step on the matrix, then the step that leaves one
    number, the paper's table 7); `transformer`, a small encoder over the scores. `mask_padding` leaves padded
    words and frames out of the three fine contrasts; officially they take part (ledger 1). `backend`: who
    computes those three (`XClipHead.backend_on`).
    """

    name: str = "xclip"
    temperature: PositiveFloat = 0.01
    contrasts: tuple[Contrast, ...] = CONTRASTS
    fusion: Literal["aosm", "mean-mean", "max-max", "max-mean", "mean-max", "transformer"] = "aosm"
    mask_padding: bool = False
    backend: Choice = "auto"

    def __post_init__(self) -> None:
        if not self.contrasts or len(set(self.contrasts)) != len(self.contrasts):
            raise ConfigError(
                f"head.contrasts: {list(self.contrasts)} is not allowed "
                f"(one or more of {', '.join(CONTRASTS)}, each once)"
            )
        ways = {"aosm": "", "transformer": "auto, formula"}.get(self.fusion, "auto, formula, blocked")
        if ways and self.backend not in ways.split(", "):
            raise ConfigError(
                f"head.backend: {self.backend} does not go with head.fusion={self.fusion} (one of {ways})"
            )


class _Features(NamedTuple):
    """Of T texts and V videos, normalised. The masks are None where padding takes part."""

    sentence: Tensor  # [T, D]
    words: Tensor  # [T, W, D]
    video: Tensor  # [V, D]
    frames: Tensor  # [V, F, D]
    word_mask: Tensor | None  # [T, W]
    frame_mask: Tensor | None  # [V, F]


@HEADS.register("xclip")
class XClipHead(Head):
    """The head. Its matrices have the official names, stand in the formulas untransposed, start as identity.

    Args:
        width: D. max_words: W. max_frames: F; the learned matrices have these sizes (ledger 2).
    """

    config_class = XClipConfig
    pairs_alone = True
    family = "xclip"
    video_tokens = "frames"

    def __init__(self, config: XClipConfig, width: int, max_words: int, max_frames: int) -> None:
        super().__init__(config, width, max_words, max_frames)
        self.max_words, self.max_frames = max_words, max_frames
        self._kernels_fail = False
        self.global_mat_weight = nn.Parameter(torch.eye(width))
        self.local_mat_weight = nn.Parameter(torch.eye(width))
        if config.fusion == "aosm":
            self.word_logit_weight = nn.Parameter(torch.eye(max_words))
            self.frame_logit_weight = nn.Parameter(torch.eye(max_frames))
            self.word_mat_weight = nn.Parameter(torch.eye(max_words))
            self.frame_mat_weight = nn.Parameter(torch.eye(max_frames))
            self.word_mat_weight2 = nn.Parameter(torch.eye(max_words))
            self.frame_mat_weight2 = nn.Parameter(torch.eye(max_frames))
        elif config.fusion == "transformer":
            self.word_fusion = TransformerFusion(1, max_words)
            self.frame_fusion = TransformerFusion(1, max_frames)
            self.matrix_fusion = TransformerFusion(max_frames, max_words)

        self.word_similarity = Tap("[T, V, W]")
        self.frame_similarity = Tap("[T, V, F]")
        self.word_frame_similarity = Tap("[T, V, W, F]")
        self.video_word_softmax = Tap("[T, V, W]: over words")
        self.sentence_frame_softmax = Tap("[T, V, F]: over frames")
        self.word_softmax = Tap("[T, V, F, W]: over words, for each frame")
        self.frame_softmax = Tap("[T, V, W, F]: over frames, for each word")
        self.word_level = Tap("[T, V, F]")
        self.frame_level = Tap("[T, V, W]")
        self.sentence_to_frame_softmax = Tap("[T, V, F]: over frames")
        self.video_to_word_softmax = Tap("[T, V, W]: over words")
        self.sentence_to_frame = Tap("[T, V]")
        self.video_to_word = Tap("[T, V]")
        self.scores = nn.ModuleDict({name: Tap("[T, V]") for name in CONTRASTS})

    def no_weight_decay(self) -> set[str]:
        """The matrices over similarities: they start as identity, and decay would pull the scores to 0."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        """Logits before CLIP's scale: the mean of the contrasts that are on (X-CLIP eq. 17).

        Raises:
            InputError: token counts other than `max_words` and `max_frames`.
        """
        self._check_lengths(text, video)
        sentence, words = normalize(text.pooled, dim=-1), normalize(text.tokens, dim=-1)
        frames = normalize(video.tokens, dim=-1)
        word_mask = text.mask if self.config.mask_padding else None
        frame_mask = video.mask if self.config.mask_padding else None
        features = _Features(sentence, words, video.pooled, frames, word_mask, frame_mask)
        backend = self.backend_on(words.device)
        contrasts = {
            "video-sentence": lambda: sentence @ self.global_mat_weight @ video.pooled.T,
            **(self._as_formula(features) if backend == "formula" else self._in_tiles(features, backend)),
        }
        scores = [self.scores[name](contrasts[name]()) for name in self.config.contrasts]
        return HeadOutput(torch.stack(scores).mean(0))

    def backend_on(self, device: torch.device) -> Backend:
        """Who computes the fine contrasts of features on `device`: `formula` as they read, `blocked` by
        tiles, `triton` on GPUs, `triton-fp16` likewise but with the features rounded to float16 where no
        gradient is wanted. `auto` is the kernels in float32 where they run, else the tiles; where the kernels
        turn out to fail it gives way to tiles and says so.

        Whatever was asked, it is the formula while something hooks one of the taps that only it has.

        Raises:
            ConfigError: a backend that cannot be used there.
        """
        sizes = self.max_words, self.max_frames
        only_tiles = self.config.fusion != "aosm" or self._kernels_fail
        asked = "blocked" if self.config.backend == "auto" and only_tiles else self.config.backend
        chosen = choose(asked, device, self.local_mat_weight.dtype, *sizes)
        return "formula" if self.config.fusion == "transformer" or self._watched() else chosen

    def block_on(self, device: torch.device) -> tuple[int, int]:
        """Where tiles bound the memory, what is computed of a text once a block pays with many videos; a GPU
        is busy with many pairs only."""
        if self.backend_on(device) == "formula":
            return 64, 64
        return (512, 4096) if device.type == "cuda" else (64, 512)

    def _watched(self) -> bool:
        """Whether somebody looks at what only the formula forms."""
        whole = set(self.scores.values())
        return any(tap._forward_hooks for tap in self.modules() if isinstance(tap, Tap) and tap not in whole)

    def _as_formula(self, of: _Features) -> dict[str, Callable[[], Tensor]]:
        """The fine contrasts as the paper writes them."""
        word_mask = None if of.word_mask is None else of.word_mask[:, None]  # [T, 1, W]
        frame_mask = None if of.frame_mask is None else of.frame_mask[None]  # [1, V, F]
        return {
            "video-word": lambda: self._video_word(of.words, of.video, word_mask),
            "sentence-frame": lambda: self._sentence_frame(of.sentence, of.frames, frame_mask),
            "frame-word": lambda: self._frame_word(of.words, of.frames, word_mask, frame_mask),
        }

    def _in_tiles(self, of: _Features, backend: Backend) -> dict[str, Callable[[], Tensor]]:
        """The same, never whole in memory."""
        return {
            "video-word": lambda: self._vector(
                backend, of.words, of.video, "word_logit_weight", of.word_mask
            ),
            "sentence-frame": lambda: (
                self._vector(backend, of.frames, of.sentence, "frame_logit_weight", of.frame_mask).T
            ),
            "frame-word": lambda: self._matrix(backend, of),
        }

    def _vector(
        self, backend: Backend, tokens: Tensor, pooled: Tensor, mixing: str, mask: Tensor | None
    ) -> Tensor:
        if self.config.fusion != "aosm":
            return blocked.vector_pool(tokens, pooled, self.config.fusion.split("-")[1], mask)
        weight = getattr(self, mixing)
        return self._aosm(backend, "vector_aosm", tokens, pooled, weight, self.config.temperature, mask)

    def _matrix(self, backend: Backend, of: _Features) -> Tensor:
        words, masks = of.words @ self.local_mat_weight, (of.word_mask, of.frame_mask)
        if self.config.fusion != "aosm":
            return blocked.matrix_pool(words, of.frames, self.config.fusion, *masks)
        matrices = Matrices(
            self.word_mat_weight, self.frame_mat_weight, self.word_mat_weight2, self.frame_mat_weight2
        )
        return self._aosm(backend, "matrix_aosm", words, of.frames, matrices, self.config.temperature, *masks)

    def _aosm(self, backend: Backend, name: str, rows: Tensor, columns: Tensor, *rest: Any) -> Tensor:
        auto = self.config.backend == "auto"
        if backend != "blocked" and not (auto and self._kernels_fail):
            given = rows, columns
            if backend == "triton-fp16" and not torch.is_grad_enabled():
                given = _rounded(rows), _rounded(columns)
            try:
                return getattr(kernels, name)(*given, *rest)
            except ConfigError as error:
                if not auto:
                    raise
                made = getattr(blocked, name)(rows, columns, *rest)  # or what it was given is wrong
                self._kernels_fail |= isinstance(error, kernels.KernelError)
                lasts = " from here on" if self._kernels_fail else ""
                warnings.warn(f"AOSM is computed in tiles{lasts}: {error}", stacklevel=2)
                return made
        return getattr(blocked, name)(rows, columns, *rest)

    def _video_word(self, words: Tensor, video: Tensor, mask: Tensor | None) -> Tensor:
        scores = self.word_similarity(torch.einsum("twd,vd->tvw", words, video))
        if self.config.fusion == "transformer":
            return self.word_fusion(scores.unsqueeze(-1), mask)
        return self._fuse(scores, "word_logit_weight", self.video_word_softmax, mask)

    def _sentence_frame(self, sentence: Tensor, frames: Tensor, mask: Tensor | None) -> Tensor:
        scores = self.frame_similarity(torch.einsum("td,vfd->tvf", sentence, frames))
        if self.config.fusion == "transformer":
            return self.frame_fusion(scores.unsqueeze(-1), mask)
        return self._fuse(scores, "frame_logit_weight", self.sentence_frame_softmax, mask)

    def _frame_word(
        self, words: Tensor, frames: Tensor, word_mask: Tensor | None, frame_mask: Tensor | None
    ) -> Tensor:
        """Both stages of AOSM on the word x frame matrix (X-CLIP eq. 9 to 16)."""
        scores = torch.einsum("twd,vfd->tvwf", words @ self.local_mat_weight, frames)
        scores = self.word_frame_similarity(scores)
        over_words = None if word_mask is None else word_mask.unsqueeze(2)  # [T, 1, 1, W]
        over_frames = None if frame_mask is None else frame_mask.unsqueeze(2)  # [1, V, 1, F]
        if self.config.fusion == "transformer":
            real = scores if over_frames is None else scores * over_frames
            return self.matrix_fusion(real, word_mask)
        word_level = self._fuse(
            scores.transpose(2, 3), "word_mat_weight", self.word_softmax, over_words, first_step=True
        )
        frame_level = self._fuse(scores, "frame_mat_weight", self.frame_softmax, over_frames, first_step=True)
        sentence_to_frame = self._fuse(
            self.word_level(word_level), "frame_mat_weight2", self.sentence_to_frame_softmax, frame_mask
        )
        video_to_word = self._fuse(
            self.frame_level(frame_level), "word_mat_weight2", self.video_to_word_softmax, word_mask
        )
        return (self.sentence_to_frame(sentence_to_frame) + self.video_to_word(video_to_word)) / 2

    def _fuse(
        self, scores: Tensor, mixing: str, softmax: Tap, mask: Tensor | None, first_step: bool = False
    ) -> Tensor:
        """`scores [..., N]` to `[...]`: attention mixed by the matrix of that name, or a mean or maximum."""
        if self.config.fusion == "aosm":
            return attend(scores, getattr(self, mixing), self.config.temperature, mask, softmax)
        first, second = self.config.fusion.split("-")
        return pool(scores, first if first_step else second, mask)

    def _check_lengths(self, text: TokenSet, video: TokenSet) -> None:
        if text.tokens.shape[1] != self.max_words or video.tokens.shape[1] != self.max_frames:
            raise InputError(
                f"X-CLIP's matrices are made for max_words={self.max_words} and "
                f"max_frames={self.max_frames}, got {text.tokens.shape[1]} words and "
                f"{video.tokens.shape[1]} frames; "
                "give inputs of that length, or load the checkpoint with other max_words and max_frames"
            )


def _rounded(features: Tensor) -> Tensor:
    """float32 as float16."""
    return features.half() if features.dtype == torch.float32 else features


class TransformerFusion(nn.Module):
    """Scores to one number by a one-layer encoder: each position is a token, its scores are the features.

    Args:
        features: scores a position. length: positions.
    """

    def __init__(self, features: int, length: int) -> None:
        super().__init__()
        width = 32
        self.lift = nn.Linear(features, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.encoder = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.to_score = nn.Linear(width, 1)

    def no_weight_decay(self) -> set[str]:
        """The positions, as everywhere."""
        return {"positions"}

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """`scores [T, V, N, features]`, `mask` broadcastable to `[T, V, N]` or None -> `[T, V]`."""
        texts, videos, length, _ = scores.shape
        tokens = (self.lift(scores) + self.positions).flatten(0, 1)
        padding = None if mask is None else ~mask.bool().expand(texts, videos, length).flatten(0, 1)
        encoded = self.encoder(tokens, src_key_padding_mask=padding).unflatten(0, (texts, videos))
        return pool(self.to_score(encoded).squeeze(-1), "mean", mask)
