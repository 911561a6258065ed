"""Own videos found by words: a folder is embedded once, then answers any sentence.

    library = open_library("holiday", "runs/my-run")
    found = library.search("a dog runs")
    found.show()

What the model makes of the videos is kept, so that only new and changed ones are decoded the next time:

    <index>/<key>/library.json                 which folder, which model, which frames
    <index>/<key>/videos/ab/<sha>.safetensors  of one video, found by its content
    <index>/<key>/sources/cd/<path>.json       see `store.content_of`

Of a long video as of a short one the model sees at most `max_frames` frames, as the config's sampler takes
them from the whole of it: what lies between two of them is not seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from xclip_lab.atomic import write_bytes
from xclip_lab.attention import recorded
from xclip_lab.batching import make_loader
from xclip_lab.checkpoint import load_model
from xclip_lab.clips import ClipDataset
from xclip_lab.config import RunConfig, config_from_dict, load_config, to_dict
from xclip_lab.datasets import Sample, VideoTextDataset
from xclip_lab.datasets.files import find_all
from xclip_lab.distributed import resolve_device
from xclip_lab.encoding import encode_texts
from xclip_lab.errors import CheckpointError, ConfigError, DatasetError, printable, writing
from xclip_lab.evaluation import FRAME_SETTINGS, score
from xclip_lab.features import weights_hash
from xclip_lab.found import Found as Found
from xclip_lab.found import Hit as Hit
from xclip_lab.model import RetrievalModel, create_model, evaluating
from xclip_lab.store import content_of
from xclip_lab.text import check_vocabulary, tokenizer
from xclip_lab.tokens import TokenSet

INDEX = Path("data/libraries")
ZERO_SHOT = "clip4clip-folder-b32"
"""The preset without a model of one's own: with `ZERO_SHOT_SETTINGS` it is OpenAI's CLIP and the mean of the
frames, which has nothing to train."""
ZERO_SHOT_SETTINGS = {
    "temporal.agg_module": "meanP",
    "towers.precision": "fp32",
    "data.sampler": "uniform",
}
EXACT_UP_TO = 5000
"""So many videos the head scores one by one."""
SHORTLIST = 500
"""So many of a larger library, the nearest by the pooled vector."""
_FRAME_TAPS = {"xclip": "head.sentence_to_frame_softmax", "glscl": "head.frame_softmax"}
"""`[T, V, F]`, of the heads whose attention says how much each frame counts for a sentence."""


@dataclass(frozen=True)
class Library:
    """A folder of videos as a model sees them, on the CPU. `open_library` makes it.

    Attributes:
        videos: V paths within the folder, in order. timestamps: `[V, F]` seconds, 0 for padding.
        broken: what cannot be read, with the reason. embedded: how many had to be decoded this time.
    """

    model: RetrievalModel
    config: RunConfig
    videos: list[str]
    paths: list[Path] = field(repr=False)
    video: TokenSet = field(repr=False)
    timestamps: Tensor = field(repr=False)
    broken: dict[str, str]
    embedded: int

    def __len__(self) -> int:
        return len(self.videos)

    def search(
        self, query: str, top: int = 5, exact_up_to: int = EXACT_UP_TO, shortlist: int = SHORTLIST
    ) -> Found:
        """The `top` videos for a sentence, and their frames that answered.

        A library of more than `exact_up_to` videos is ranked by the cosines of the pooled vectors first, and
        the head scores the `shortlist` nearest.

        Raises:
            ConfigError: an empty query, one of more tokens than the model reads, `top` below 1.
            CheckpointError: scores that are not finite.
        """
        check_query(query, top, self.model.config.max_words)
        text = self.encode(query)
        rows, video, is_exact = torch.arange(len(self)), self.video, len(self) <= exact_up_to
        if not is_exact:
            cosines = self._directions @ normalize(text.pooled[0], dim=0)
            rows = cosines.topk(min(max(shortlist, top), len(self))).indices.sort().values
            video = video[rows]
        scores = score(self.model, text, video)[0]
        if not scores.isfinite().all():
            raise CheckpointError(
                f"{self.model.origin.checkpoint} gives scores that are not finite; take another checkpoint"
            )
        order = scores.argsort(descending=True, stable=True)[:top]
        weights, weighed_by = self._frame_weights(text, video[order])
        hits = [
            self._hit(rank, int(rows[place]), float(scores[place]), weights[rank - 1])
            for rank, place in enumerate(order.tolist(), 1)
        ]
        return Found(query, hits, len(self), None if is_exact else len(rows), weighed_by)

    def encode(self, query: str) -> TokenSet:
        """The features of a sentence, `pooled [1, D]`, `tokens [1, W, D]`.

        Raises:
            ConfigError: as `search`.
        """
        check_query(query, 1, self.model.config.max_words)
        with evaluating(self.model):
            return encode_texts(self.model, [query])

    @cached_property
    def _directions(self) -> Tensor:
        return normalize(self.video.pooled, dim=-1)

    def _frame_weights(self, text: TokenSet, video: TokenSet) -> tuple[Tensor, str]:
        """`[n, F]`: the head's attention over the frames where it has one, else cosines; and its name."""
        tap, device = _FRAME_TAPS.get(self.model.config.head.name), self.model.logit_scale.device
        with evaluating(self.model), recorded(self.model, [tap] if tap else []) as cache:
            self.model.similarity(text.to(device), video.to(device))
        if tap in cache:  # X-CLIP without AOSM has none
            return cache[tap][0].float().cpu(), "attention of the sentence (in brackets)"
        frames = normalize(video.tokens, dim=-1)
        return frames @ normalize(text.pooled[0], dim=0), "like the sentence (cosine in brackets)"

    def _hit(self, rank: int, row: int, value: float, weights: Tensor) -> Hit:
        real = self.video.mask[row].bool()
        seconds = self.timestamps[row][real].double().numpy()
        return Hit(rank, self.videos[row], self.paths[row], value, seconds, weights[real].numpy())


def open_library(
    folder: str | Path,
    model: RetrievalModel | str | Path | None = None,
    config: RunConfig | None = None,
    index: str | Path = INDEX,
    progress: bool = True,
) -> Library:
    """Embed the videos of a folder and of all folders in it, or find what was embedded before.

    Only new and changed videos are decoded, those that are gone are dropped. Stopped at any moment, the same
    call goes on. What cannot be read is left out (`Library.broken`) and tried again by the next call.

    Args:
        model: a model; a run folder or a checkpoint; or None for OpenAI's CLIP and the mean of the frames.
        config: its `data` says how frames are chosen; None for that of the run that trained the model.
        index: where the features are kept.

    Raises:
        DatasetError: no folder, no video in it, or none that can be read; the index cannot be written.
        CheckpointError: no such model, weights that cannot be downloaded, features that are not finite.
    """
    folder, index = Path(folder), Path(index)
    model, config = _open_model(model, config)
    within = index.absolute()
    found = [path for path in find_all(folder) if not path.absolute().is_relative_to(within)]
    if not found:
        raise DatasetError(f"{folder}: no video in it; name the folder that your videos lie in, or below")
    with writing(index, " for the library (--index); what is embedded already stays good"):
        shelf = _Shelf(folder, model, config, index)
        return _library(folder, found, model, config, shelf, progress)


def _open_model(
    model: RetrievalModel | str | Path | None, config: RunConfig | None
) -> tuple[RetrievalModel, RunConfig]:
    """The model, and the config with its sizes and with what a library asks for."""
    if model is None:
        config = config or load_config(ZERO_SHOT, ZERO_SHOT_SETTINGS)
        model = create_model(config)
    elif not isinstance(model, RetrievalModel):
        model = load_model(model)
        model.to(resolve_device((config or model.origin.run or config_from_dict({})).train.device))
    check_vocabulary(model.clip.token_embedding.num_embeddings)
    config = (config or model.origin.run or config_from_dict({})).with_model(model.config)
    data = replace(config.data, on_error="skip", frame_order=0, features=None, store=None)
    return model, replace(config, data=data)


def _library(
    folder: Path,
    found: list[Path],
    model: RetrievalModel,
    config: RunConfig,
    shelf: _Shelf,
    progress: bool,
) -> Library:
    contents, unread = {}, {}
    for path in tqdm(found, "look at the videos", unit="video", disable=not progress, leave=False):
        try:
            contents[path] = content_of(path, shelf.sources)
        except OSError as error:
            unread[path] = f"{path}: {error.strerror or error}"
    shelf.keep_only(contents.values())
    kept = {content: entry for content in set(contents.values()) if (entry := shelf.read(content))}
    missing = {content: path for path, content in contents.items() if content not in kept}
    broken = _embed(missing, model, config, shelf, progress)
    kept |= {content: entry for content in missing if (entry := shelf.read(content))}
    for path, content in contents.items():
        if content in broken:  # the reason names the first of equal files
            unread[path] = broken[content].replace(printable(str(missing[content])), str(path))
    readable = [path for path in found if contents.get(path) in kept]
    if not readable:
        raise DatasetError(
            f"{folder}: none of its {len(found)} files can be read as a video, such as "
            f"{next(iter(unread.values()))}"
        )
    entries = [kept[contents[path]] for path in readable]
    return Library(
        model=model,
        config=config,
        videos=[_name(path, folder) for path in readable],
        paths=readable,
        video=TokenSet.cat([video for video, _ in entries]),
        timestamps=torch.cat([timestamps for _, timestamps in entries]),
        broken={_name(path, folder): reason for path, reason in unread.items()},
        embedded=len(missing) - len(broken),
    )


def _embed(
    videos: dict[str, Path], model: RetrievalModel, config: RunConfig, shelf: _Shelf, progress: bool
) -> dict[str, str]:
    """Put videos, given by their content, on the shelf. Those that cannot be read, with the reason."""
    if not videos:
        return {}
    samples = [Sample(content, "", path=path) for content, path in videos.items()]
    dataset = VideoTextDataset("library", "all", shelf.place, samples)
    clips = ClipDataset(dataset, config, unique_videos=True, image_size=model.image_size)
    loader = make_loader(clips, None, config.evaluation.batch_size)
    with evaluating(model):
        for batch in tqdm(loader, "embed videos", unit="batch", disable=not progress, leave=False):
            given = batch.to(model.logit_scale.device)
            encoded = model.encode_video(given.video, given.video_mask).to("cpu")
            if not encoded.pooled.isfinite().all():
                raise CheckpointError(
                    f"{model.origin.checkpoint} gives features that are not finite; take another checkpoint"
                )
            for row, content in enumerate(batch.video_ids or ()):
                one = slice(row, row + 1)
                shelf.write(content, encoded[one], batch.timestamps[one])
    return loader.broken


class _Shelf:
    """Where the features of a library lie: those of one folder, one model and one way to choose frames."""

    def __init__(self, folder: Path, model: RetrievalModel, config: RunConfig, index: Path) -> None:
        origin = {
            "folder": str(folder.resolve()),
            "weights": weights_hash(model.state_dict()),
            "model": to_dict(model.config),
            **{name: getattr(config.data, name) for name in FRAME_SETTINGS},
            "extra": _extra_names(model),
        }
        told = json.dumps(origin, indent=2, sort_keys=True)
        self.place = index / hashlib.sha256(told.encode()).hexdigest()[:16]
        self.videos, self.sources = self.place / "videos", self.place / "sources"
        if not (self.place / "library.json").is_file():
            write_bytes(self.place / "library.json", told.encode())

    def path(self, content: str) -> Path:
        return self.videos / content[:2] / f"{content}.safetensors"

    def write(self, content: str, video: TokenSet, timestamps: Tensor) -> None:
        tensors = {"pooled": video.pooled, "tokens": video.tokens, "mask": video.mask}
        tensors |= {"timestamps": timestamps} | {f"extra.{name}": of for name, of in video.extra.items()}
        write_bytes(self.path(content), save({name: of.contiguous() for name, of in tensors.items()}))

    def read(self, content: str) -> tuple[TokenSet, Tensor] | None:
        """One video with its timestamps; None where it is not here, or damaged, as after a power cut."""
        try:
            kept = load_file(self.path(content))
            extra = {name.removeprefix("extra."): of for name, of in kept.items() if name[:6] == "extra."}
            return TokenSet(kept["pooled"], kept["tokens"], kept["mask"], extra), kept["timestamps"]
        except (OSError, SafetensorError, KeyError):
            return None

    def keep_only(self, contents: Iterable[str]) -> None:
        wanted = {self.path(content) for content in contents}
        for path in self.videos.glob("*/*"):
            if path not in wanted:
                path.unlink(missing_ok=True)


def _extra_names(model: RetrievalModel) -> list[str]:
    """What the head keeps of a video beside its tokens: features without that are of no use to it."""
    device = model.logit_scale.device
    mask = torch.ones(1, model.config.max_frames, dtype=torch.int64, device=device)
    with evaluating(model):
        blank = torch.zeros(*mask.shape, model.clip.sizes.embed_dim, device=device)
        return sorted(model.head.encode_video(blank, mask, model.temporal).extra)


def check_query(query: str, top: int, max_words: int) -> None:
    """Refuse what `Library.search` could not answer, with its errors, before a library is opened for it."""
    if top < 1:
        raise ConfigError(f"top: {top} is not allowed (1 or more videos)")
    if not isinstance(query, str) or not query.strip():
        raise ConfigError(f"the query {query!r} is empty; say in words what is to be seen")
    if query != query.encode(errors="ignore").decode():
        raise ConfigError(f"the query {query!a} holds signs that are no text; type it anew")
    tokens = len(tokenizer().encode(query))
    if tokens > max_words - 2:
        raise ConfigError(
            f"the query has {tokens} tokens, of which the model reads {max_words - 2} (max_words={max_words} "
            "with the two marks); say it in fewer words"
        )


def _name(path: Path, folder: Path) -> str:
    """A path within the folder as text that any terminal takes."""
    return printable(path.relative_to(folder).as_posix() if path != folder else path.name)
