"""Encode every text and video once, score in blocks, rank: a `Result`, stamped with how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from xclip_lab.clips import FrameStore
from xclip_lab.config import RunConfig, config_from_dict
from xclip_lab.datasets import DATASETS, VideoTextDataset, load_dataset
from xclip_lab.distributed import Ranks
from xclip_lab.encoding import Encoded, KeptTexts, TextBlocks, encode
from xclip_lab.errors import ConfigError, DatasetError, count_and_first
from xclip_lab.guards import check_evaluation, known_videos
from xclip_lab.memory import similarity_matrix
from xclip_lab.metrics import BlockedRanks
from xclip_lab.model import RetrievalModel, computed_by
from xclip_lab.provenance import dataset_fingerprint, versions
from xclip_lab.rerank import dual_softmax, qb_norm
from xclip_lab.result import Result
from xclip_lab.scoring import score as score
from xclip_lab.scoring import scored
from xclip_lab.text import check_vocabulary
from xclip_lab.tokens import TokenSet

FRAME_SETTINGS = ("sampler", "feature_framerate", "slice_framepos", "frame_order")
_COPIES = 12  # of float32 scores, which a re-ranking makes in float64
_ROWS = 1024  # handed to the other processes at a time
_TOP = 10  # videos of each caption that a result names which keeps no scores


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
    bank = _query_bank(dataset, config, bank)
    if settings.rerank != "none" and settings.similarity in ("disk", "none"):
        raise ConfigError(
            f"evaluation.similarity: {settings.similarity} does not go with evaluation.rerank="
            f"{settings.rerank}, which needs all scores in memory several times; leave one of them out"
        )
    check_vocabulary(model.clip.token_embedding.num_embeddings)
    with computed_by(model, backend):
        device = model.logit_scale.device
        model.head.backend_on(device)  # refused before anything is decoded
        encoded = encode(model, dataset, config, store, progress, ranks)
        if bank is not None:
            encoded = replace(encoded, text=KeptTexts(encoded.text))  # its videos look for them too
        kept = encoded.dataset
        texts, videos = len(kept), len(kept.videos)
        matrix, keep = None, _TOP if settings.similarity == "none" else 0
        found = BlockedRanks(kept.text_to_video, videos, settings.ties, keep)
        if settings.similarity != "none":
            copies = 0 if settings.rerank == "none" else _COPIES
            instead = ", or set evaluation.similarity=none"
            matrix = similarity_matrix(texts, videos, settings.similarity, copies, instead)
        _score_shares(model, encoded.text, encoded.video, config, progress, ranks, matrix, found)
        # Asked now: kernels that fail have given way to tiles, in one process or in all.
        used = sorted(set(ranks.collect(model.head.backend_on(device))))
        result = Result.rank(
            matrix,
            kept.text_to_video,
            video_clusters(kept),
            {**_stamp(model, dataset, config, encoded), **seen, "backend": "+".join(used)},
            entries=found.entries(),
            top=found.top if matrix is None else None,
            captions=[sample.caption for sample in kept.samples],
            videos=kept.videos,
            rows=encoded.rows,
        )
        if settings.rerank == "none":
            return result
        if bank is None:
            reranked = _by_dual_softmax(result, model, config)
        else:
            reranked = _by_qb_norm(result, model, config, encoded, bank, progress, ranks)
    return replace(result, reranked=reranked)


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
        "dataset_fingerprint": encoded.fingerprint,
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
    text: TextBlocks,
    video: TokenSet,
    config: RunConfig,
    progress: bool,
    ranks: Ranks,
    out: np.ndarray | None,
    found: BlockedRanks | None = None,
) -> None:
    """Fill `out [T, V]`, float32, and `found`: each process scores its share of the captions and has all."""
    shares = ranks.shares(len(text), config.evaluation.batch_size)
    scores = None if out is None else torch.from_numpy(out)
    blocks = scored(model, text, video, config.evaluation.block_size, progress, scores, shares[ranks.rank])
    for rows, block in blocks:
        if found is not None:
            found.add(block, rows.start)
    if scores is not None:
        ranks.complete(scores, shares)
    if found is not None:
        for of_rows in (found.above, found.equal, found.top):
            ranks.complete(torch.from_numpy(of_rows), shares)
        for some in torch.from_numpy(found.best).split(_ROWS):
            ranks.largest(some)


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
    of_bank = encode(model, bank, config, progress=progress, ranks=ranks)
    bank = of_bank.dataset
    captions = [sample.caption for sample in bank.samples]

    def score_all(text: TextBlocks, video: TokenSet) -> np.ndarray:
        matrix = similarity_matrix(len(text), len(video), settings.similarity)
        _score_shares(model, text, video, config, progress, ranks, matrix)
        matrix /= scale
        return matrix

    of_bank_videos = score_all(encoded.text, of_bank.video)
    of_bank_captions = score_all(of_bank.text, encoded.video)
    numbers: dict[str, Any] = {
        "beta": float(settings.qb_beta),
        "k": int(settings.qb_k),
        "theta": int(settings.qb_theta),
    }
    t2v = qb_norm(raw.similarity / scale, of_bank_captions, **numbers)
    v2t = qb_norm(raw.similarity.T / scale, of_bank_videos.T, **numbers).T
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
    gallery: dict[str, Any] = {"captions": raw.captions, "videos": raw.videos, "rows": raw.rows}
    return Result.rank(t2v, raw.text_to_video, raw.clusters, {**raw.stamp, **stamp}, v2t, **gallery)


def _query_bank(
    dataset: VideoTextDataset, config: RunConfig, bank: VideoTextDataset | None
) -> VideoTextDataset | None:
    """The split whose statistics QB-Norm uses; never one that holds what is evaluated. None without it."""
    if config.evaluation.rerank != "qb_norm":
        if bank is not None:
            raise ConfigError("evaluate(bank=) serves QB-Norm alone; set evaluation.rerank=qb_norm")
        return None
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
