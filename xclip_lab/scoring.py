"""The second stage of an evaluation: the scores of all texts with all videos, some hundred texts a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from tqdm.auto import tqdm

from xclip_lab.encoding import TextBlocks
from xclip_lab.errors import ConfigError
from xclip_lab.live_bytes import LiveBytes
from xclip_lab.memory import free_memory, room_for
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.parallel import in_threads, workers_on
from xclip_lab.tokens import TokenSet

_TEXTS = 512  # encoded, and their scores with all videos in memory, at a time
_VIDEOS = 4096  # that a few texts meet at a time, at the most


def score(
    model: RetrievalModel,
    text: TextBlocks,
    video: TokenSet,
    block_size: int | None = None,
    progress: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`model.similarity` of all texts with all videos, float32 `[T, V]` on the CPU, by all of its cores.

    Args:
        block_size: so many texts, 512 at the most, meet so many videos at a time; None for what suits the
            head. It decides on the memory that is needed, not on the scores.
        out: `[T, V]` to be filled, such as a file mapped into memory; None for a new one.

    Raises:
        ConfigError: a block that does not fit into memory, or a backend that cannot be used.
    """
    similarity = torch.empty(len(text), len(video)) if out is None else out
    for _ in scored(model, text, video, block_size, progress, similarity):
        pass
    return similarity


def scored(
    model: RetrievalModel,
    text: TextBlocks,
    video: TokenSet,
    block_size: int | None = None,
    progress: bool = False,
    out: Tensor | None = None,
    share: slice | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of `score` by the hundreds, each with its place; every text is asked for once.

    Args:
        out: `[T, V]`, of which the scores are parts; None for new ones. share: of the texts; None for all.
            The others as in `score`.

    Raises:
        ConfigError: as `score`.
    """
    device = model.logit_scale.device
    workers, video, share = workers_on(device), video.to(device), share or slice(0, len(text))
    usual = model.head.block_on(device)
    high, wide = min(block_size or usual[0], _TEXTS), block_size or usual[1]
    step = _TEXTS // high * high
    pairs = (share.stop - share.start) * len(video)
    bar = tqdm(total=pairs, desc="score", unit="pair", unit_scale=True, disable=not progress, leave=False)
    with bar:
        for start in range(share.start, share.stop, step):
            rows = slice(start, min(start + step, share.stop))
            with evaluating(model):
                some = text[rows].to(device)
                if not block_size:  # as many pairs of few texts as of many
                    wide = max(usual[1], min(math.prod(usual) // len(some), _VIDEOS))
                columns = _columns(-(-len(some) // high), len(video), wide, workers)
                with room_for(partial(_too_large, high, wide, (block_size or high) // 2)):
                    block = some[:high], video[:columns]
                    if block_size and start == share.start and math.prod(map(len, block)) > math.prod(usual):
                        blocks = -(-len(some) // high) * -(-len(video) // columns)
                        _check_block(model, *block, min(workers, blocks), workers)
                    scores = torch.empty(len(some), len(video)) if out is None else out[rows]
                    for count in _fill(scores, model, some, video, high, columns, workers):
                        bar.update(count)
            yield rows, scores


def _fill(
    scores: Tensor, model: RetrievalModel, text: TokenSet, video: TokenSet, high: int, wide: int, workers: int
) -> Iterator[int]:
    """Write `scores [n, V]`, `high` texts with `wide` videos at a time; says how many were written."""

    def work(corner: tuple[int, int]) -> int:
        rows, columns = (slice(at, at + size) for at, size in zip(corner, (high, wide), strict=True))
        scores[rows, columns] = model.similarity(text[rows], video[columns]).float().cpu()
        return scores[rows, columns].numel()

    return in_threads(work, product(range(0, len(text), high), range(0, len(video), wide)), workers)


def _columns(bands: int, videos: int, wide: int, workers: int) -> int:
    """How many of at most `wide` videos meet a band of texts: few texts keep all cores busy too."""
    return max(1, min(wide, -(-videos // -(-workers // bands))))


def _check_block(model: RetrievalModel, text: TokenSet, video: TokenSet, times: int, workers: int) -> None:
    """Refuse a block that memory does not hold `times` over, by what a part of its texts and videos takes.

    Twice as many of both take four times as much at the most: what is for a pair does, what is for a text or
    a video doubles. A part that may not fit is not tried.
    """

    def measured(part: int) -> int:
        with LiveBytes() as live:
            model.similarity(*(of[: -(-len(of) // part)] for of in (text, video)))
        return max(live.after)

    free = free_memory(video.pooled.device)
    if free is None:
        return
    for part in (4, 2, 1):
        [found] = in_threads(measured, [part], workers)  # as `_fill` does it: in one thread
        needed = part**2 * found * times
        if needed <= free:
            return
        if 4 * found > free:
            break
    share = free / needed  # of the pairs
    raise _too_large(len(text), len(video), math.isqrt(int(share * len(text) * len(video))))


def _too_large(texts: int, videos: int, fits: int) -> ConfigError:
    remedy = f"try {fits}" if fits else "free some, or start fewer threads (OMP_NUM_THREADS)"
    return ConfigError(
        f"evaluation.block_size: {texts} texts x {videos} videos at a time do not fit into memory; {remedy}"
    )
