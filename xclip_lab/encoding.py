"""The first stage of an evaluation: every caption and every video passes the model once.

Several processes share the work by whole batches, so that each meets the batches that one process would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from xclip_lab.batching import make_loader
from xclip_lab.clips import FrameStore
from xclip_lab.config import RunConfig
from xclip_lab.datasets import VideoTextDataset
from xclip_lab.distributed import Ranks
from xclip_lab.errors import DatasetError
from xclip_lab.features import StoredClips, open_clips
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.provenance import dataset_fingerprint
from xclip_lab.result import count_and_first
from xclip_lab.text import tokenize
from xclip_lab.tokens import TokenSet


@dataclass(frozen=True)
class EncodedVideos:
    """The videos of a split, on the CPU.

    Attributes:
        video: of the V videos that could be read. dataset: their annotations. rows: `[T]`, the captions'
            rows in the whole dataset.
        missing: ids of the videos that could not. decoders: how many videos each decoder gave.
    """

    video: TokenSet
    dataset: VideoTextDataset
    rows: np.ndarray
    missing: list[str]
    decoders: dict[str, int]


@dataclass(frozen=True)
class Encoded(EncodedVideos):
    """With captions.

    Attributes:
        text: features of this process's share of the captions. shares: of each process, the rows of its own.
    """

    text: TokenSet | StoredTexts
    shares: list[slice]


def encode(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig,
    store: FrameStore | None = None,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> Encoded:
    """Every caption and every video of a split, each once; `score` compares them.

    Args:
        ranks: who share the work; None for this process alone.

    Raises:
        DatasetError: as `evaluate`.
    """
    ranks = ranks or Ranks()
    videos = encode_videos(model, dataset, config, store, progress, ranks)
    batch_size = config.evaluation.batch_size
    shares = ranks.shares(len(videos.rows), batch_size)
    text: TokenSet | StoredTexts
    if config.data.features is None:
        captions = [sample.caption for sample in videos.dataset.samples[shares[ranks.rank]]]
        with evaluating(model):  # a share may be empty, a batch may not
            text = encode_texts(model, captions or [""], batch_size, progress)[: len(captions)]
    else:
        text = StoredTexts(model, StoredClips(model, dataset, config), videos.rows[shares[ranks.rank]])
    return Encoded(**vars(videos), text=text, shares=shares)


def encode_videos(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig,
    store: FrameStore | None = None,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> EncodedVideos:
    """Every video of a split, once; all of them in every process.

    Raises:
        DatasetError: as `evaluate`.
    """
    ranks = ranks or Ranks()
    _check_same_data(dataset, ranks)
    # What cannot be read is counted here, and held against `evaluation.allow_missing`.
    config = replace(config.with_model(model.config), data=replace(config.data, on_error="skip"))
    clips = open_clips(model, dataset, config, store, unique_videos=True)
    batch_size, allowed = config.evaluation.batch_size, config.evaluation.allow_missing
    if not len(dataset):
        raise DatasetError(f"{dataset.name} / {dataset.split}: no captions to evaluate")
    own = ranks.shares(len(clips), batch_size)[ranks.rank]
    if not clips.instant:
        place = config.data.videos or dataset.root
        absent = {
            s.video_id: f"{s.path or f'{s.video_id} below {place}'}: no such file"
            for s in clips.samples[own]
            if s.path is None or not s.path.exists()
        }
        gone = ranks.union(absent)
        if len(gone) > allowed:
            raise _too_many_missing(dataset, gone, allowed)
    loader = make_loader(clips, order=range(own.start, own.stop), batch_size=batch_size)
    device, made = model.logit_scale.device, []
    with evaluating(model):
        for batch in tqdm(loader, "encode videos", unit="batch", disable=not progress, leave=False):
            if len(loader.broken) <= allowed:  # beyond that, only to name every file that is to be mended
                batch = batch.to(device)
                made.append(model.encode_video(batch.video, batch.video_mask).to("cpu"))
    broken = ranks.union(loader.broken)
    if len(broken) > allowed or len(broken) == len(clips):
        raise _too_many_missing(dataset, broken, allowed)
    parts = [part for of in ranks.collect(made) for part in of]
    of_each = [loader.decoders] if clips.store is not None else ranks.collect(loader.decoders)
    decoders = dict(sum(map(Counter, of_each), Counter[str]()))
    missing = [video for video in dataset.videos if video in broken]
    rows = np.flatnonzero(~np.isin([sample.video_id for sample in dataset.samples], missing))
    return EncodedVideos(TokenSet.cat(parts), _only(dataset, rows), rows, missing, decoders)


@torch.no_grad()
def encode_texts(
    model: RetrievalModel, captions: Sequence[str], batch_size: int = 32, progress: bool = False
) -> TokenSet:
    """Features of captions, on the CPU: `pooled [T, D]`, `tokens [T, W, D]`."""
    parts = []
    starts = range(0, len(captions), batch_size)
    for start in tqdm(starts, "encode texts", unit="batch", disable=not progress, leave=False):
        ids, mask = tokenize(captions[start : start + batch_size], model.config.max_words)
        parts.append(
            model.encode_text(ids.to(model.logit_scale.device), mask.to(model.logit_scale.device)).to("cpu")
        )
    return TokenSet.cat(parts)


@dataclass(frozen=True)
class StoredTexts:
    """Captions whose word features are stored: a block of them is read and encoded when it is asked for.

    Attributes:
        rows: `[T]`, the captions' places in the store.
    """

    model: RetrievalModel
    clips: StoredClips
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, block: slice) -> TokenSet:
        words, mask = self.clips.texts(self.rows[block])
        with torch.no_grad():
            return self.model.encode_text(
                words.to(self.model.logit_scale.device), mask.to(self.model.logit_scale.device)
            )


def _too_many_missing(dataset: VideoTextDataset, broken: Mapping[str, str], allowed: int) -> DatasetError:
    left_out = "" if len(broken) < len(dataset.videos) else " (all there are)"
    return DatasetError(
        f"{dataset.name} / {dataset.split}: cannot read {count_and_first(list(broken))}{left_out}; "
        f"evaluation.allow_missing is {allowed}. Bring the files back, or raise it to leave them out. "
        f"The first: {next(iter(broken.values()))}"
    )


def _check_same_data(dataset: VideoTextDataset, ranks: Ranks) -> None:
    found = dataset_fingerprint(dataset)
    if ranks.share(found) != found:
        raise DatasetError(
            f"{dataset.name} / {dataset.split}: process {ranks.rank} has other captions or videos than the "
            "first one; give every process the same data"
        )


def _only(dataset: VideoTextDataset, rows: np.ndarray) -> VideoTextDataset:
    groups = None if dataset.groups is None else dataset.groups[rows]
    return replace(dataset, samples=[dataset.samples[row] for row in rows], groups=groups)
