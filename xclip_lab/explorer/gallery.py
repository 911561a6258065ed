"""A run and the videos of a split, encoded once: what a query finds there, and why. No widgets in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate

from xclip_lab import text
from xclip_lab.attention import Explanation, check_explainable, explain_features, recorded
from xclip_lab.batching import Batch, make_loader
from xclip_lab.clips import BrokenClip, Clip, ClipDataset
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.encoding import TextBlocks, Texts, encode, encode_texts
from xclip_lab.errors import ConfigError, DatasetError, UserError, count_and_first
from xclip_lab.evaluation import score
from xclip_lab.explorer.settings import Settings, rescored
from xclip_lab.features import left_out
from xclip_lab.metrics import ranks
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.tokens import TokenSet

SIDE = 112
"""Of a small frame, in pixels, at the most."""
SHORT = 6
"""Frames of a video in a ranking, at the most; a look inside shows all."""
_QUALITY = 85
_MATRIX = "head.word_frame_similarity"


class QueryError(UserError):
    """A query that cannot be answered."""


@dataclass(frozen=True)
class Film:
    """The frames of a video that a model sees, small and side by side.

    Attributes:
        file: all F frames as one JPEG file, empty where they cannot be read. short: at most `SHORT` of them,
            evenly spaced, with a gap between them. timestamps: `[F]` seconds, NaN without a file.
        reason: why there is no file.
    """

    file: bytes = field(repr=False)
    short: bytes = field(repr=False)
    timestamps: np.ndarray
    reason: str = ""

    def pixels(self) -> torch.Tensor:
        """uint8 `[F, 3, S, S]`; grey where there is no file."""
        count = len(self.timestamps)
        if not self.file:
            return torch.full((count, 3, SIDE, SIDE), 128, dtype=torch.uint8)
        return (
            torch.from_numpy(simplejpeg.decode_jpeg(self.file))
            .permute(2, 0, 1)
            .unflatten(2, (count, -1))
            .movedim(2, 0)
        )


@dataclass(frozen=True)
class Detail:
    """What a logit is made of, as far as the head lets one look.

    Attributes:
        tokens: what each of the W tokens reads. logit: the similarity.
        matrix: `[W, F]`, word x frame, None where the head has no such matrix.
        explanation: both stages of AOSM and the contributions, None for heads without it.
        parts: numbers that passed the head's taps on the way to the logit, or what each contrast adds.
        note: what is shown, and what this head does not have.
    """

    tokens: list[str]
    logit: float
    matrix: np.ndarray | None
    explanation: Explanation | None
    parts: dict[str, float]
    note: str


@dataclass(frozen=True)
class Gallery:
    """A model and the V videos of a split that can be read.

    Attributes:
        name: what the run is called. dataset: the captions and videos. texts, video: their features.
        clips: of the whole split, for frames that were not decoded yet. config: whose these are.
        broken: video id to why it was left out. films: by video id, those that are there.
    """

    name: str
    model: RetrievalModel
    dataset: VideoTextDataset
    texts: TextBlocks = field(repr=False)
    video: TokenSet = field(repr=False)
    clips: ClipDataset = field(repr=False)
    config: RunConfig = field(repr=False)
    broken: dict[str, str]
    films: dict[str, Film] = field(repr=False)
    _encoded: dict[str, TokenSet] = field(default_factory=dict, repr=False)

    @cached_property
    def column(self) -> dict[str, int]:
        """Video id to its place in the gallery."""
        return {video: place for place, video in enumerate(self.dataset.videos)}

    @cached_property
    def own_video(self) -> dict[str, str]:
        """Caption to the id of its video; of captions that are worded alike the first counts."""
        return {sample.caption: sample.video_id for sample in reversed(self.dataset.samples)}

    @cached_property
    def captions(self) -> dict[str, str]:
        """Video id to its first caption."""
        return {sample.video_id: sample.caption for sample in self.dataset.video_samples()}

    @cached_property
    def missed(self) -> set[str]:
        """The captions of the split that the run, with its own settings, does not rank first."""
        captions = [sample.caption for sample in self.dataset.samples]
        similarity = score(self.model, self.texts, self.video, self.config.evaluation.block_size)
        found = ranks(similarity, self.dataset.text_to_video)["t2v"]
        return {caption for caption, rank in zip(captions, found, strict=True) if rank > 1}

    def film(self, video: str) -> Film:
        """The frames of a video, decoded when they are first asked."""
        if video not in self.films:
            clip = self.clips[self._place[video]]
            count = int(self.video.mask[self.column[video]].sum())
            if isinstance(clip, Clip) and len(clip.pixels) == count:
                self.films[video] = _film(clip.pixels, clip.timestamps)
            else:
                reason = f"{video} has other frames than when its features were stored"
                if not isinstance(clip, Clip):
                    reason = clip.reason if isinstance(clip, BrokenClip) else str(clip)
                self.films[video] = Film(b"", b"", np.full(count, np.nan, np.float32), reason)
        return self.films[video]

    @cached_property
    def _place(self) -> dict[str, int]:
        return {sample.video_id: place for place, sample in enumerate(self.clips.samples)}

    def scores(self, query: str, settings: Settings) -> np.ndarray:
        """`[V]`: `model.similarity` of the query with every video, under the settings.

        Raises:
            QueryError: a similarity that is no number. ConfigError: as `rescored`.
        """
        with rescored(self.model, settings):
            similarity = score(self.model, self._text(query), self.video)[0].numpy()
        bad = ~np.isfinite(similarity)
        if bad.any():
            videos = count_and_first([self.dataset.videos[place] for place in np.flatnonzero(bad)])
            raise QueryError(
                f"the similarity is not a number for {videos}; the weights of {self.name} or the features of "
                "these videos are not finite: choose another run, or embed them anew"
            )
        return similarity

    def _text(self, query: str) -> TokenSet:
        """The features of a query, encoded when it is first asked."""
        if query not in self._encoded:
            self._encoded[query] = encode_texts(self.model, [query])
        return self._encoded[query]

    def rank(self, scores: np.ndarray, video: str) -> int:
        """The rank of a video, from 1; others of equal score stand before it, as in the metrics."""
        return int(ranks(scores[None], [self.column[video]])["t2v"][0])

    def clip(self, query: str, video: str) -> Clip:
        """The query with the small frames of a video."""
        film = self.film(video)
        return Clip(self.column[video], video, query, film.pixels(), torch.from_numpy(film.timestamps))

    def explain(self, query: str, video: str, settings: Settings) -> Explanation:
        """`attention.explain` of the query with a video, under the settings.

        Raises:
            ConfigError: a head without AOSM, or with `frame-word` left out.
        """
        with rescored(self.model, settings):
            return explain_features(self.model, self.clip(query, video), *self._pair(query, video))

    def _pair(self, query: str, video: str) -> tuple[TokenSet, TokenSet]:
        """The features of a query and of a video, where the model is."""
        device, place = self.model.logit_scale.device, self.column[video]
        return self._text(query).to(device), self.video[place : place + 1].to(device)

    def detail(self, query: str, video: str, settings: Settings) -> Detail:
        """What the logit of the query with a video is made of, for any head."""
        tokens = _tokens(query, self.model.config.max_words)
        if not self.explainable(settings):
            return self._other_detail(query, video, settings, tokens)
        found = self.explain(query, video, settings)
        note = "the contrasts add up to the logit"
        return Detail(tokens, found.logit, found.similarity, found, found.contributions, note)

    def explainable(self, settings: Settings) -> bool:
        """Whether the head, as set, has AOSM on its word x frame matrix."""
        try:
            with rescored(self.model, settings):
                check_explainable(self.model, "a look inside")
        except ConfigError:
            return False
        return True

    def _other_detail(self, query: str, video: str, settings: Settings, tokens: list[str]) -> Detail:
        """Of a head without AOSM: its word x frame matrix, where it has one, and the scores inside."""
        encoded, own = self._pair(query, video)
        with rescored(self.model, settings), recorded(self.model) as cache:
            logit = self.model.similarity(encoded, own).item()
        matrix = (
            cache[_MATRIX][0, 0, : len(tokens), : int(own.mask.sum())].cpu().numpy()
            if _MATRIX in cache
            else None
        )
        parts = {
            name.removeprefix("head."): value.item() for name, value in cache.items() if value.numel() == 1
        }
        head = self.model.config.head.name
        has = "its word x frame matrix" if matrix is not None else "no word x frame matrix"
        taps = ", ".join(name.removeprefix("head.") for name in cache) or "none"
        note = f"the head {head} as set here has no AOSM and {has}; taps that were passed: {taps}"
        return Detail(tokens, logit, matrix, None, parts, note)


def check_query(query: str) -> None:
    """Refuse a query that says nothing.

    Raises:
        QueryError: no letter and no digit in it.
    """
    if not any(character.isalnum() for character in query):
        raise QueryError("the query has no words; type what the video shows, such as: a dog runs")


def unread(query: str, max_words: int) -> str:
    """What a model of this length does not read of a query, as a sentence; empty where it reads all.

    >>> unread("a red circle moves", 5)
    'the query has 6 tokens, this model reads 5: what follows “a red circle” is not read'
    """
    count = len(text.tokenizer().encode(query)) + 2
    if count <= max_words:
        return ""
    read = text.tokenizer().decode(text.tokenizer().encode(query)[: max_words - 2]).strip()
    return f"the query has {count} tokens, this model reads {max_words}: what follows “{read}” is not read"


def open_gallery(
    name: str,
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig,
    progress: Callable[[float], None] = lambda share: None,
) -> Gallery:
    """Encode the videos of a split, once; what cannot be read is left out.

    With `data.features` the features come from there and no video is decoded before it is shown; one whose
    file is gone stays, without its frames. Else small frames are kept of what is decoded.

    Args:
        progress: told the share that is done, 0 to 1.

    Raises:
        DatasetError: no video can be read. ConfigError: features of other towers, frames or captions.
    """
    config = config.with_model(model.config)
    pixels = replace(config, data=replace(config.data, on_error="skip", features=None))
    clips = ClipDataset(dataset, pixels, unique_videos=True, image_size=model.image_size)
    if config.data.features is not None:
        evaluation = replace(config.evaluation, allow_missing=len(dataset.videos))
        config = replace(config, evaluation=evaluation)
        stored = encode(model, dataset, config)
        reasons = left_out(Path(str(config.data.features)) / dataset.split) if stored.missing else {}
        return Gallery(name, model, stored.dataset, stored.text, stored.video, clips, config, reasons, {})
    loader = make_loader(clips, None, int(config.evaluation.batch_size))
    films: dict[str, Film] = {}
    parts = []
    with evaluating(model):
        for number, batch in enumerate(loader.in_place(), 1):
            if batch is not None:
                films |= _films(batch)
                given = batch.to(model.logit_scale.device)
                parts.append(model.encode_video(given.video, given.video_mask).to("cpu"))
            progress(number / len(loader))
    if not parts:
        reason = next(iter(loader.broken.values()), "it has no captions")
        raise DatasetError(f"{dataset.name} / {dataset.split}: no video can be read: {reason}")
    rows = [row for row, sample in enumerate(dataset.samples) if sample.video_id in films]
    groups = None if dataset.groups is None else dataset.groups[rows]
    kept = replace(dataset, samples=[dataset.samples[row] for row in rows], groups=groups)
    texts = Texts.of(model, [sample.caption for sample in kept.samples], config.evaluation.batch_size)
    return Gallery(name, model, kept, texts, TokenSet.cat(parts), clips, config, loader.broken, films)


def _films(batch: Batch) -> dict[str, Film]:
    """The films of a batch's videos, without padding."""
    assert batch.video_ids is not None  # a loader fills it, and the timestamps
    assert batch.timestamps is not None
    counts = batch.video_mask.sum(1).tolist()
    return {
        video: _film(pixels[:count], times[:count])
        for video, pixels, times, count in zip(
            batch.video_ids, batch.video, batch.timestamps, counts, strict=True
        )
    }


def _film(pixels: torch.Tensor, timestamps: torch.Tensor) -> Film:
    """Of frames uint8 `[F, 3, S, S]`."""
    if pixels.shape[-1] > SIDE:
        pixels = interpolate(pixels.float(), size=(SIDE, SIDE), mode="area").round().byte()
    frames = pixels.permute(0, 2, 3, 1).numpy()
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(SHORT, len(frames))).round().astype(int))
    gap = max(1, frames.shape[1] // 28)
    apart = np.pad(frames[chosen], ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return Film(_jpeg(frames), _jpeg(apart), timestamps.numpy())


def _jpeg(frames: np.ndarray) -> bytes:
    """Frames `[F, H, W, 3]` side by side."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(np.concatenate(frames, 1)), _QUALITY, colorspace="RGB")


def _tokens(query: str, max_words: int) -> list[str]:
    ids, mask = text.tokenize(query, max_words)
    return text.token_texts(ids[0].tolist())[: int(mask.sum())]
