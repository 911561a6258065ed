"""A run and the videos of a split, encoded once: what a query finds there, and why. No widgets in here."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate

from xclip_lab import text
from xclip_lab.attention import Explanation, check_explainable, explain_features, recorded
from xclip_lab.batching import Batch, make_loader
from xclip_lab.clips import Clip, ClipDataset
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.errors import ConfigError, DatasetError, UserError
from xclip_lab.evaluation import encode_texts, encode_videos, score
from xclip_lab.explorer.settings import Settings, rescored
from xclip_lab.metrics import ranks
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.result import count_and_first
from xclip_lab.tokens import TokenSet

SIDE = 112
"""Of a thumbnail, in pixels, at the most."""
_QUALITY = 85
_VIDEOS = 1024  # scored at once with one text
_MATRIX = "head.word_frame_similarity"


class QueryError(UserError):
    """A query that cannot be answered."""


@dataclass(frozen=True)
class Thumbnails:
    """The frames of a video that a model sees, small: JPEG files and their times in seconds `[F]`.

    `reason` says why there are none: the files are empty then and the times NaN.
    """

    files: tuple[bytes, ...]
    timestamps: np.ndarray
    reason: str = ""

    @cached_property
    def addresses(self) -> list[str]:
        """The frames as `data:` addresses; of a video that cannot be read one empty address a frame."""
        return [f"data:image/jpeg;base64,{b64encode(file).decode()}" if file else "" for file in self.files]

    def pixels(self) -> torch.Tensor:
        """uint8 `[F, 3, S, S]`; grey where there is no file."""
        grey = np.full((SIDE, SIDE, 3), 128, np.uint8)
        frames = [simplejpeg.decode_jpeg(file) if file else grey for file in self.files]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


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
        name: what the run is called. dataset: the captions and videos. video: their features, on the CPU.
        thumbnails: by video, in the order of `dataset.videos`. broken: video id to why it was left out.
    """

    name: str
    model: RetrievalModel
    dataset: VideoTextDataset
    video: TokenSet = field(repr=False)
    thumbnails: list[Thumbnails] = field(repr=False)
    broken: dict[str, str]
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
        similarity = score(self.model, encode_texts(self.model, captions), self.video)
        found = ranks(similarity, self.dataset.text_to_video)["t2v"]
        return {caption for caption, rank in zip(captions, found, strict=True) if rank > 1}

    def scores(self, query: str, settings: Settings) -> np.ndarray:
        """`[V]`: `model.similarity` of the query with every video, under the settings.

        Raises:
            QueryError: a similarity that is no number. ConfigError: as `rescored`.
        """
        with rescored(self.model, settings):
            similarity = score(self.model, self._text(query), self.video, _VIDEOS)[0].numpy()
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
        place = self.column[video]
        small = self.thumbnails[place]
        return Clip(place, video, query, small.pixels(), torch.from_numpy(small.timestamps))

    def explain(self, query: str, video: str, settings: Settings) -> Explanation:
        """`attention.explain` of the query with a video, under the settings.

        Raises:
            ConfigError: a head without AOSM, or with `frame-word` left out.
        """
        device = self.model.logit_scale.device
        place = self.column[video]
        encoded = self._text(query).to(device)
        with rescored(self.model, settings):
            return explain_features(
                self.model, self.clip(query, video), encoded, self.video[place : place + 1].to(device)
            )

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
        device, place = self.model.logit_scale.device, self.column[video]
        encoded = self._text(query).to(device)
        own = self.video[place : place + 1].to(device)
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
    """Encode the videos of a split, once, and keep small frames of them.

    What cannot be read is left out. With `data.features` the features come from there, and a video whose file
    is gone stays, without its frames. `data.store` spares decoding the next time.

    Args:
        progress: told the share that is done, 0 to 1.

    Raises:
        DatasetError: no video can be read. ConfigError: features of other towers, frames or captions.
    """
    config = config.with_model(model.config)
    stored = config.data.features is not None
    pixels = replace(config, data=replace(config.data, on_error="skip", features=None))
    clips = ClipDataset(dataset, pixels, unique_videos=True, image_size=model.image_size)
    loader = make_loader(clips, None, int(config.evaluation.batch_size))
    small: dict[str, Thumbnails] = {}
    parts = []
    with evaluating(model):
        for number, batch in enumerate(loader.in_place(), 1):
            if batch is not None:
                small |= _thumbnails(batch)
                given = batch.to(model.logit_scale.device)
                if not stored:
                    parts.append(model.encode_video(given.video, given.video_mask).to("cpu"))
            progress(number / len(loader))
    if not stored and not parts:
        reason = next(iter(loader.broken.values()), "it has no captions")
        raise DatasetError(f"{dataset.name} / {dataset.split}: no video can be read: {reason}")
    if stored:
        encoded = encode_videos(model, dataset, config)
        video, kept = encoded.video, encoded.dataset
    else:
        rows = [row for row, sample in enumerate(dataset.samples) if sample.video_id in small]
        groups = None if dataset.groups is None else dataset.groups[rows]
        kept = replace(dataset, samples=[dataset.samples[row] for row in rows], groups=groups)
        video = TokenSet.cat(parts)
    thumbnails = [
        small.get(video_id) or _nothing(int(mask.sum()), loader.broken[video_id])
        for video_id, mask in zip(kept.videos, video.mask, strict=True)
    ]
    return Gallery(name, model, kept, video, thumbnails, loader.broken)


def _thumbnails(batch: Batch) -> dict[str, Thumbnails]:
    """Small frames of a batch's videos, without padding."""
    assert batch.video_ids is not None  # a loader fills it, and the timestamps
    assert batch.timestamps is not None
    found = {}
    for pixels, mask, times, video in zip(
        batch.video, batch.video_mask, batch.timestamps, batch.video_ids, strict=True
    ):
        frames = pixels[: int(mask.sum())]
        if frames.shape[-1] > SIDE:
            frames = interpolate(frames.float(), size=(SIDE, SIDE), mode="area").round().byte()
        files = [
            simplejpeg.encode_jpeg(np.ascontiguousarray(frame), _QUALITY, colorspace="RGB")
            for frame in frames.permute(0, 2, 3, 1).numpy()
        ]
        found[video] = Thumbnails(tuple(files), times[: len(files)].numpy())
    return found


def _nothing(frames: int, reason: str) -> Thumbnails:
    return Thumbnails((b"",) * frames, np.full(frames, np.nan, np.float32), reason)


def _tokens(query: str, max_words: int) -> list[str]:
    ids, mask = text.tokenize(query, max_words)
    return text.token_texts(ids[0].tolist())[: int(mask.sum())]
