"""What any model attends to in a pair: its maps over words and frames, all in one shape.

Every softmax that a head has on a tap is a map by its axes alone, so a new head's maps are found too. Added
are what a method's parts come to together, what runs over the frames before the head, and three baselines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from xclip_lab.attention import recorded, tap_names
from xclip_lab.batching import Batch, collate, make_loader
from xclip_lab.clips import Clip, ClipDataset, FrameStore
from xclip_lab.config import RunConfig
from xclip_lab.datasets import Sample, VideoTextDataset
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.text import token_words
from xclip_lab.tokens import TokenSet

PAIRS = 8  # looked at together: the head computes all texts with all videos, only the diagonal is used
SIMILARITY = "word_frame_similarity"
BASELINES = ("uniform", "similarity", "gradient")
WEIGHTS = "attn.weights_softmax"

Axes = Literal["words x frames", "frames", "words"]
Over = Literal["frames", "words", "both", ""]


@dataclass(frozen=True)
class AttentionMap:
    """One map of each of B pairs.

    Attributes:
        values: float32 `[B, W, F]`, on the CPU, padding included. W is 1 where every word sees alike, F is 1
            where there are weights of words only.
        axes: which of the two it has.
        over: what its weights sum to 1 over: each word's `frames`, each frame's `words`, `both` together;
            empty for scores, which may be negative.
    """

    values: Tensor = field(repr=False)
    axes: Axes
    over: Over


@dataclass(frozen=True)
class PairMaps:
    """The maps of a batch of pairs, by name, and what they were made of.

    Attributes:
        batch: captions and clips. text: of each caption. features: `[B, F, D]`, the frame vectors before
            `agg_module`.
    """

    maps: dict[str, AttentionMap]
    batch: Batch
    text: TokenSet
    features: Tensor = field(repr=False)


@dataclass(frozen=True)
class Pair:
    """One pair of a batch.

    Attributes:
        seen: its batch. row: its row there. place: its row in the dataset.
        words: each token's word in the caption, -1 for marks and padding.
        tokens, frames: how many are real. timestamps: of the real frames, in seconds.
    """

    seen: PairMaps
    row: int
    place: int
    caption: str
    video_id: str
    words: np.ndarray
    tokens: int
    frames: int
    timestamps: np.ndarray

    def values(self, name: str) -> np.ndarray:
        """A map of this pair, `[W, F]`, padding included."""
        shape = self.seen.batch.text_mask.shape[1], self.seen.batch.video_mask.shape[1]
        return np.broadcast_to(self.seen.maps[name].values[self.row].double().numpy(), shape)

    def word_rows(self, name: str) -> np.ndarray:
        """`[n_words, F]`, a row for each word that has tokens left: the mean of theirs. Padded frames count
        as nothing where a map's weights are shared out over the words of each frame."""
        values = self.values(name)
        if self.seen.maps[name].over == "words":
            values = np.where(np.arange(values.shape[1]) < self.frames, values, 0)
        return np.stack([values[self.words == word].mean(0) for word in range(self.words.max() + 1)])


def each_pair(batches: Iterable[PairMaps], dataset: VideoTextDataset) -> Iterator[Pair]:
    """The pairs of `pair_maps` one by one."""
    for seen in batches:
        batch = seen.batch
        assert batch.index is not None  # a loader fills it
        for row, place in enumerate(batch.index.tolist()):
            yield _pair(seen, row, place, dataset.samples[place])


def clip_pair(model: RetrievalModel, clip: Clip) -> Pair:
    """The maps of one caption with its frames."""
    config, device = model.config, next(model.parameters()).device
    seen = maps_of(model, collate([clip], config.max_words, config.max_frames).to(device))
    return _pair(seen, 0, clip.index, clip)


def _pair(seen: PairMaps, row: int, place: int, of: Sample | Clip) -> Pair:
    batch = seen.batch
    assert batch.timestamps is not None  # a loader fills it
    words = np.array(token_words(of.caption, batch.text_mask.shape[1]))
    tokens, frames = int(batch.text_mask[row].sum()), int(batch.video_mask[row].sum())
    times = batch.timestamps[row, :frames].numpy()
    return Pair(seen, row, place, of.caption, of.video_id, words, tokens, frames, times)


def pair_maps(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig,
    store: FrameStore | None = None,
    baselines: bool = True,
) -> Iterator[PairMaps]:
    """The maps of every caption with its own video, in the order of the dataset, some pairs at a time.

    Args:
        store: frames decoded before. baselines: also `BASELINES`, for which the head runs once more.

    Raises:
        VideoError: a clip cannot be read and `config.data.on_error` is `raise`.
    """
    clips = ClipDataset(dataset, config.with_model(model.config), store=store, image_size=model.image_size)
    device = next(model.parameters()).device
    for batch in make_loader(clips, None, PAIRS):
        yield maps_of(model, batch.to(device), baselines)


def maps_of(model: RetrievalModel, batch: Batch, baselines: bool = True) -> PairMaps:
    """The maps of the pairs of a batch.

    By name: each softmax of the head as its tap is called, and where there is such a thing

    - `aosm`: how much a cell of X-CLIP's similarity matrix counts by both stages together (before the learned
      mixing): word weight times its frame weight, frame weight times its word weight, the mean of the two.
    - `interaction`: the same for `maxsim`, `ti` and `wti`, exactly: the score is the sum of this map times
      the similarities.
    - `centers`: that a word and a frame go to the same centre of CLIP2Video's TAB.
    - `queries`: that one of GLSCL's queries gathers from a word and from a frame (last layer, mean over its
      attention heads); `query_words` and `query_frames` its two parts.
    - `agg_module`: how much the frames look at a frame in the last block before the head; `cross`: how much
      the sentence does in CLIP4Clip's tight type; `text_tower`: how much the end mark looks at a word in the
      last block.
    - `uniform`; `similarity`, the cosines of words and frames as the head sees them; `gradient`, the logit's
      gradient times each frame's vector (Sundararajan et al. 2017 call it gradient times input).
    """
    wanted = _wanted(model)
    with recorded(model, wanted) as cache:
        text = model.encode_text(batch.token_ids, batch.text_mask)
        of_text = _taken(cache)
        features = model.frame_features(batch.video, batch.video_mask)
        video = model.encode_video(features, batch.video_mask)
        of_video = _taken(cache)
        model.similarity(text, video)
        of_pair = _taken(cache)
    taps = tap_names(model)
    maps = {}
    for name, value in {**of_text, **of_video, **of_pair}.items():
        if name.startswith("head.") and name.endswith("_softmax"):
            found = _of_tap(value, taps[name])
            if found is not None:
                maps[name.removeprefix("head.")] = found
    maps |= _of_methods(model.config.head.name, of_text, of_video, of_pair, batch)
    if baselines:
        maps |= _baselines(model, of_pair, text, video, features, batch)
    return PairMaps(maps, batch.to("cpu"), text.to("cpu"), features.cpu())


def patch_attention(model: RetrievalModel, clip: Clip) -> np.ndarray:
    """Where the image tower's class token looks in its last block: `[F, P, P]` over P x P patches of each
    frame, mean over attention heads; each frame's sum to 1 less what the token keeps for itself."""
    name = _last_block(model, "clip.visual.transformer.")
    batch = collate([clip], model.config.max_words, len(clip.pixels)).to(next(model.parameters()).device)
    with recorded(model, [name]) as cache:
        model.frame_features(batch.video, batch.video_mask)
    of_patches = cache[name].float().mean(1)[:, 0, 1:]
    side = round(of_patches.shape[-1] ** 0.5)
    return of_patches.unflatten(-1, (side, side)).cpu().numpy()


def _wanted(model: RetrievalModel) -> list[str]:
    """The taps that maps are made of: the head's, and the last blocks of what runs before it."""
    taps = tap_names(model)
    blocks = [_last_block(model, part) for part in ("clip.transformer.", "temporal.transformerClip.")]
    return [name for name in taps if name.startswith("head.")] + [name for name in blocks if name in taps]


def _last_block(model: RetrievalModel, prefix: str) -> str:
    return next((name for name in reversed(tap_names(model)) if name.startswith(prefix)), "")


def _taken(cache: dict[str, Tensor]) -> dict[str, Tensor]:
    taken = dict(cache)
    cache.clear()
    return taken


def _of_tap(value: Tensor, shape: str) -> AttentionMap | None:
    """A softmax as a map, if its axes are those of words or frames."""
    axes = shape.partition("]")[0].strip("[").split(", ")
    if axes[:2] == ["T", "V"]:
        value = value.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    over: Over = "frames" if "over frames" in shape else "words"
    match [axis for axis in axes if axis not in ("T", "V")]:
        case ["W", "F"]:
            return _map(value, "words x frames", over)
        case ["F", "W"]:
            return _map(value.transpose(1, 2), "words x frames", over)
        case ["F"]:
            return _map(value[:, None], "frames", over)
        case ["W"]:
            return _map(value[:, :, None], "words", over)
    return None


def _map(values: Tensor, axes: Axes, over: Over) -> AttentionMap:
    return AttentionMap(values.detach().float().cpu(), axes, over)


def _of_methods(
    head: str,
    of_text: Mapping[str, Tensor],
    of_video: Mapping[str, Tensor],
    of_pair: Mapping[str, Tensor],
    batch: Batch,
) -> dict[str, AttentionMap]:
    """What a method's parts come to together, and what runs before the head."""
    maps, pairs = {}, len(batch)
    stages = [f"head.{name}_softmax" for name in ("frame", "word", "sentence_to_frame", "video_to_word")]
    if all(name in of_pair for name in stages):
        over_frames, over_words, frames, words = (
            of_pair[name].diagonal(dim1=0, dim2=1).movedim(-1, 0) for name in stages
        )
        both = words[:, :, None] * over_frames + (frames[:, :, None] * over_words).transpose(1, 2)
        maps["aosm"] = _map(both / 2, "words x frames", "both")
    elif head in ("maxsim", "ti", "wti"):
        of_each = {**of_text, **of_video, **of_pair}
        maps["interaction"] = _interaction(of_each, batch, of_words_only=head == "maxsim")
    if "head.word_assignment_softmax" in of_text:
        words = of_text["head.word_assignment_softmax"] * batch.text_mask[..., None]
        words[:, 0] = 0  # the start mark is no word to TAB
        frames = of_video["head.frame_assignment_softmax"][:, : batch.video.shape[1]]
        frames = frames * batch.video_mask[..., None]
        maps["centers"] = _map(torch.einsum("bwk,bfk->bwf", words, frames), "words x frames", "both")
    if any(".multihead_attn." in name for name in of_text):
        words, frames = (_last(values, ".multihead_attn.").mean(1) for values in (of_text, of_video))
        maps["queries"] = _map(
            torch.einsum("bqw,bqf->bwf", words, frames) / words.shape[1], "words x frames", "both"
        )
        maps["query_words"] = _map(words.mean(1)[:, :, None], "words", "words")
        maps["query_frames"] = _map(frames.mean(1)[:, None], "frames", "frames")
    if any(name.startswith("temporal.") for name in of_video):
        seen = _last(of_video, "temporal.").mean(1)
        step = 1 if seen.shape[-1] == batch.video.shape[1] else 2  # TDB's differences stand between frames
        real = batch.video_mask[..., None]
        by_frames = (seen[:, ::step, ::step] * real).sum(1, keepdim=True)
        maps["agg_module"] = _map(by_frames / by_frames.sum(-1, keepdim=True), "frames", "frames")
    if any(name.startswith("head.cross.") for name in of_pair):
        seen = _last(of_pair, "head.cross.").mean(1)[:, 0, 1:].unflatten(0, (pairs, pairs))
        maps["cross"] = _map(seen.diagonal(dim1=0, dim2=1).T[:, None], "frames", "frames")
    last = batch.token_ids.argmax(-1)
    seen = _last(of_text, "clip.transformer.").mean(1)[torch.arange(pairs, device=last.device), last]
    maps["text_tower"] = _map(seen[:, :, None], "words", "words")
    return maps


def _last(values: Mapping[str, Tensor], part: str) -> Tensor:
    return next(value.float() for name, value in reversed(list(values.items())) if part in name)


def _interaction(taken: Mapping[str, Tensor], batch: Batch, of_words_only: bool) -> AttentionMap:
    """What each cell of the similarity matrix weighs in `maxsim`, `ti` or `wti`."""
    scores = taken[f"head.{SIMILARITY}"].diagonal(dim1=0, dim2=1).movedim(-1, 0).float()
    words, frames = batch.text_mask, batch.video_mask
    best_frame = scores.masked_fill(frames[:, None] == 0, -torch.inf).argmax(-1)
    best_word = scores.masked_fill(words[..., None] == 0, -torch.inf).argmax(-2)
    word_weights = taken.get("head.word_softmax", words / words.sum(-1, keepdim=True))
    frame_weights = taken.get("head.frame_softmax", frames / frames.sum(-1, keepdim=True))
    of_words = torch.zeros_like(scores).scatter(2, best_frame[..., None], word_weights[..., None])
    of_frames = torch.zeros_like(scores).scatter(1, best_word[:, None], frame_weights[:, None])
    return _map(of_words if of_words_only else (of_words + of_frames) / 2, "words x frames", "both")


def _baselines(
    model: RetrievalModel,
    of_pair: Mapping[str, Tensor],
    text: TokenSet,
    video: TokenSet,
    features: Tensor,
    batch: Batch,
) -> dict[str, AttentionMap]:
    similarity = of_pair.get(f"head.{SIMILARITY}")
    if similarity is None:
        cosines = torch.einsum(
            "bwd,bfd->bwf", normalize(text.tokens, dim=-1), normalize(video.tokens, dim=-1)
        )
    else:
        cosines = similarity.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    # cuDNN's recurrent layers have no gradient in evaluation mode.
    with evaluating(model), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        frames = features.detach().requires_grad_()
        logits = model.similarity(text, model.encode_video(frames, batch.video_mask))
        [gradient] = torch.autograd.grad(logits.diagonal().sum(), frames)
    return {
        "uniform": _map(batch.video_mask[:, None], "frames", "frames"),
        "similarity": _map(cosines, "words x frames", ""),
        "gradient": _map((gradient * frames).sum(-1)[:, None], "frames", ""),
    }
