"""Encode every text and video once, score in blocks, rank: a `Result`, stamped with how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from xclip_lab.clips import FrameStore
from xclip_lab.config import RunConfig, config_from_dict
from xclip_lab.datasets import DATASETS, VideoTextDataset, load_dataset
from xclip_lab.distributed import Ranks
from xclip_lab.encoding import Encoded, StoredTexts, encode, encode_texts, encode_videos
from xclip_lab.errors import ConfigError, DatasetError
from xclip_lab.guards import check_evaluation, known_videos
from xclip_lab.memory import is_out_of_memory, similarity_matrix
from xclip_lab.metrics import BlockedRanks, Ties
from xclip_lab.model import RetrievalModel, computed_by, evaluating
from xclip_lab.parallel import in_threads, workers_on
from xclip_lab.provenance import dataset_fingerprint, versions
from xclip_lab.rerank import dual_softmax, qb_norm
from xclip_lab.result import Result, count_and_first
from xclip_lab.text import check_vocabulary
from xclip_lab.tokens import TokenSet

FRAME_SETTINGS = ("sampler", "feature_framerate", "slice_framepos", "frame_order")
_BANK_BLOCK = 1024  # captions of a query bank encoded at once: it may have a hundred thousand
_TEXTS = 512  # whose scores are in memory while `rank_in_blocks` counts


def video_clusters(dataset: VideoTextDataset) -> np.ndarray:
    """`[V]`, numbers: what the bootstrap draws as one.

    The two videos of a pair (`dataset.groups`) are told apart or taken for each other together, so they share
    a number. Where no groups are known, each video has its own.
    """
    if dataset.groups is None:
        return np.arange(len(dataset.videos))
    _, first_captions = np.unique(dataset.text_to_video, return_index=True)
    return dataset.groups[first_captions]


def evaluate(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    config: RunConfig | None = None,
    *,
    store: FrameStore | None = None,
    bank: VideoTextDataset | None = None,
    backend: str | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Result:
    """Retrieval in both directions over one split.

    The model stays where it is (device, training mode); `max_words` and `max_frames` are the model's own.
    With `evaluation.rerank` the result carries a second one, `reranked`, whose stamp says how.

    Args:
        config: its `data` (sampler, frame order, workers), `evaluation` and `seed` are used; None for those
            of the run that trained the model, or the defaults where it is not known. store: frames decoded
            before (`clips.preload`). bank: for `qb_norm`; None for the split `evaluation.query_bank` of
            the same dataset. backend: who computes AOSM (`XClipHead.backend_on`); None for the model's
            own choice. progress: show bars. ranks: the processes that share the work, which all call this
            with the same arguments and all get the result (`distributed.joined`); None for one alone.

    Raises:
        DatasetError: videos that the model was trained on (`guards.check_evaluation`).
        DatasetError: no captions, or more videos missing or unreadable than `evaluation.allow_missing`; says
            how many, names the first and gives a reason. A query bank with evaluated videos in it.
        ConfigError: a backend that cannot be used. PeerLost: another process has ended.
        MetricError: a similarity that is NaN; a temperature out of the range of the similarities.
    """
    ranks = ranks or Ranks()
    progress = progress and ranks.first
    config = (config or model.origin.run or config_from_dict({})).with_model(model.config)
    settings = config.evaluation
    seen = check_evaluation(model.origin.seen, dataset, int(config.data.allow_overlap))
    bank = _query_bank(dataset, config, bank) if settings.rerank == "qb_norm" else None
    check_vocabulary(model.clip.token_embedding.num_embeddings)
    with computed_by(model, backend):
        used = model.head.backend_on(model.logit_scale.device)  # refused before anything is decoded
        encoded = encode(model, dataset, config, store, progress, ranks)
        kept = encoded.dataset
        matrix = similarity_matrix(len(kept), len(kept.videos), settings.similarity)
        _score_shares(model, encoded, encoded.video, config, progress, ranks, matrix)
        stamp = {**_stamp(model, dataset, config, encoded), **seen, "backend": used}
        result = Result.rank(
            matrix,
            kept.text_to_video,
            video_clusters(kept),
            stamp,
            captions=[sample.caption for sample in kept.samples],
            videos=kept.videos,
            rows=encoded.rows,
        )
        if bank is not None:
            return replace(
                result, reranked=_by_qb_norm(result, model, config, encoded, bank, progress, ranks)
            )
    if settings.rerank == "dual_softmax":
        return replace(result, reranked=_by_dual_softmax(result, model, config))
    return result


def _stamp(
    model: RetrievalModel, dataset: VideoTextDataset, config: RunConfig, encoded: Encoded
) -> dict[str, Any]:
    """How a result came about."""
    kept, settings = encoded.dataset, config.evaluation
    draws = int(settings.bootstrap) if len(np.unique(video_clusters(kept))) > 1 else 0
    clusters = "pair" if kept.groups is not None else "video"
    return {
        "checkpoint": model.origin.checkpoint,
        "dataset": dataset.name,
        "split": dataset.split,
        "dataset_fingerprint": dataset_fingerprint(dataset),
        "protocol": dataset.protocol,
        "selection_split": model.origin.selection_split,
        "known_videos": known_videos(dataset),
        "post_processing": "none",
        "ties": settings.ties,
        "intervals": {"draws": draws, "clusters": clusters} if draws else None,
        "missing_videos": encoded.missing,
        "decoders": encoded.decoders,
        **{name: getattr(config.data, name) for name in FRAME_SETTINGS},
        "max_frames": config.max_frames,
        "max_words": config.max_words,
        "seed": config.seed,
        "dtype": str(encoded.video.pooled.dtype).removeprefix("torch."),
        "towers_precision": config.towers.precision,
        "device": str(model.logit_scale.device),
        "versions": versions(),
    }


def _score_shares(
    model: RetrievalModel,
    encoded: Encoded,
    video: TokenSet,
    config: RunConfig,
    progress: bool,
    ranks: Ranks,
    out: np.ndarray,
) -> None:
    """Fill `out [T, V]`, float32: each process scores its share of the captions and gets the others'."""
    scores = torch.from_numpy(out)
    own = scores[encoded.shares[ranks.rank]]
    score(model, encoded.text, video, config.evaluation.block_size, progress, own)
    ranks.complete(scores, encoded.shares)


def _by_dual_softmax(raw: Result, model: RetrievalModel, config: RunConfig) -> Result:
    temperature = float(config.evaluation.rerank_temperature)
    similarity = raw.similarity / _scale(model)
    how = {
        "method": "dual_softmax",
        "temperature": temperature,
        "similarity_divided_by": _scale(model),
        "statistics": f"uses all test queries at once (transductive): {len(raw.captions)} captions, "
        f"{len(raw.videos)} videos",
    }
    t2v, v2t = dual_softmax(similarity, temperature), dual_softmax(similarity.T, temperature).T
    return _beside(raw, t2v, v2t, {"post_processing": how})


def _by_qb_norm(
    raw: Result,
    model: RetrievalModel,
    config: RunConfig,
    encoded: Encoded,
    bank: VideoTextDataset,
    progress: bool,
    ranks: Ranks,
) -> Result:
    """The bank's captions look for the evaluated videos, its videos for the evaluated captions."""
    settings, scale = config.evaluation, _scale(model)
    bank_videos = encode_videos(model, bank, config, progress=progress, ranks=ranks)
    bank = bank_videos.dataset
    captions = [sample.caption for sample in bank.samples]
    of_bank_videos = np.empty((len(raw.captions), len(bank.videos)), np.float32)
    _score_shares(model, encoded, bank_videos.video, config, progress, ranks, of_bank_videos)
    of_bank_captions = np.empty((len(captions), len(raw.videos)), np.float32)
    scores, shares = torch.from_numpy(of_bank_captions), ranks.shares(len(captions), _BANK_BLOCK)
    starts = range(len(captions))[shares[ranks.rank]][::_BANK_BLOCK]
    for start in tqdm(starts, "query bank", disable=not progress, leave=False):
        block = slice(start, start + _BANK_BLOCK)
        with evaluating(model):
            text = encode_texts(model, captions[block], settings.batch_size)
        score(model, text, encoded.video, settings.block_size, out=scores[block])
    ranks.complete(scores, shares)
    numbers: dict[str, Any] = {
        "beta": float(settings.qb_beta),
        "k": int(settings.qb_k),
        "theta": int(settings.qb_theta),
    }
    t2v = qb_norm(raw.similarity / scale, of_bank_captions / scale, **numbers)
    v2t = qb_norm(raw.similarity.T / scale, of_bank_videos.T / scale, **numbers).T
    wordings = set(captions)
    how = {
        "method": "qb_norm",
        **numbers,
        "similarity_divided_by": scale,
        "statistics": f"{len(captions)} captions and {len(bank.videos)} videos of {bank.name} / {bank.split}",
        "captions_worded_as_in_bank": sum(caption in wordings for caption in raw.captions),
    }
    return _beside(raw, t2v, v2t, {"post_processing": how, "bank_fingerprint": dataset_fingerprint(bank)})


def _beside(raw: Result, t2v: np.ndarray, v2t: np.ndarray, stamp: Mapping[str, Any]) -> Result:
    """The same evaluation with other similarities, one matrix `[T, V]` a direction."""
    gallery = {"captions": raw.captions, "videos": raw.videos, "rows": raw.rows}
    return Result.rank(t2v, raw.text_to_video, raw.clusters, {**raw.stamp, **stamp}, v2t, **gallery)


def _query_bank(
    dataset: VideoTextDataset, config: RunConfig, bank: VideoTextDataset | None
) -> VideoTextDataset:
    """The split whose statistics QB-Norm uses; never one that holds what is evaluated."""
    if bank is None:
        if dataset.name not in DATASETS.names():
            raise ConfigError(
                f"evaluation.rerank: qb_norm needs a query bank, and {dataset.name!r} is no dataset that is "
                "found by its name; give evaluate(..., bank=) another split of it"
            )
        split = config.evaluation.query_bank or config.data.train_split
        data = config.data
        bank = load_dataset(
            dataset.name, split, dataset.root, dataset.protocol, videos=data.videos, family=data.family
        )
    shared = sorted(set(bank.videos) & set(dataset.videos))
    if shared:
        raise DatasetError(
            f"evaluation.query_bank: {bank.split!r} holds {count_and_first(shared)} of {dataset.split!r}; a "
            "query bank must never contain what is evaluated, name another split"
        )
    return bank


def _scale(model: RetrievalModel) -> float:
    """By what the similarity is larger than a cosine."""
    return model.logit_scale.exp().item() if model.head.scaled_similarity else 1.0


def score(
    model: RetrievalModel,
    text: TokenSet | StoredTexts,
    video: TokenSet,
    block_size: int | None = None,
    progress: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`model.similarity` of all texts with all videos, float32 `[T, V]` on the CPU, by all of its cores.

    Args:
        block_size: so many texts meet so many videos at a time; None for what suits the head. It decides on
            the memory that is needed, not on the scores.
        out: `[T, V]` to be filled, such as a file mapped into memory; None for a new one.

    Raises:
        ConfigError: a block that does not fit into memory, or a backend that cannot be used.
    """
    device = model.logit_scale.device
    workers, video = workers_on(device), video.to(device)
    similarity = torch.empty(len(text), len(video)) if out is None else out
    rows, columns = (block_size, block_size) if block_size else model.head.block_on(device)
    if len(text) <= rows:  # few queries keep all cores busy too
        columns = min(columns, -(-len(video) // workers))
    jobs = [(top, left) for left in range(0, len(video), columns) for top in range(0, len(text), rows)]

    def work(job: tuple[int, int]) -> None:
        block, part = slice(job[0], job[0] + rows), slice(job[1], job[1] + columns)
        similarity[block, part] = model.similarity(text[block].to(device), video[part]).float().cpu()

    try:
        with evaluating(model):
            done = in_threads(work, jobs, workers)
            for _ in tqdm(done, "score", len(jobs), unit="block", disable=not progress, leave=False):
                pass
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"evaluation.block_size: {rows} texts x {columns} videos at a time do not fit into memory; "
            f"try {max(1, min(rows, columns) // 4)}"
        ) from error
    return similarity


def rank_in_blocks(
    model: RetrievalModel,
    text: TokenSet | StoredTexts,
    video: TokenSet,
    text_to_video: np.ndarray,
    ties: Ties = "pessimistic",
    keep: int = 10,
    block_size: int | None = None,
    progress: bool = False,
) -> BlockedRanks:
    """The ranks of a gallery whose similarities need never stand in memory or on the disk as a whole.

    Args:
        text_to_video: `[T]`. keep: how many of each text's best videos the result's `top [T, keep]` names.
            The others as in `score`.

    Raises:
        ConfigError: as `score`. MetricError: a score that is NaN.
    """
    found = BlockedRanks(text_to_video, len(video), ties, keep)
    for start in tqdm(range(0, len(text), _TEXTS), "rank", unit="block", disable=not progress, leave=False):
        found.add(score(model, text[start : start + _TEXTS], video, block_size))
    return found
