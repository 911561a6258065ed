"""Cached gradients: the loss of a large batch with the towers' activations of only a few pairs in memory.

The towers pass over the batch chunk by chunk and keep nothing but their outputs. What follows them
(`agg_module`, head, loss) takes the whole batch and gives the gradient of every output. Then each chunk
passes the towers again, in the same state of the random generators, now with its activations kept, and takes
its part of that gradient down to the weights (GradCache, Gao et al. 2021). That is the gradient of the whole
batch, auxiliary losses included, but for rounding. torch's checkpoints do it: one for each chunk of a tower.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xclip_lab.backbone import sentence_places
from xclip_lab.batching import Batch
from xclip_lab.errors import TrainingError
from xclip_lab.live_bytes import LiveBytes
from xclip_lab.memory import free_memory, is_out_of_memory, room_for
from xclip_lab.model import Gather, RetrievalModel, as_they_are

_SHARE = 0.8  # of the free memory; the features, the head and what nobody counts need the rest
# Bytes for each trained parameter: of Adam, of the gradients of earlier chunks and of those of earlier parts.
_KEPT = 16


def cached_loss(
    model: RetrievalModel, batch: Batch, chunk: int, gather: Gather = as_they_are
) -> dict[str, Tensor]:
    """As `model.loss`, with `chunk` pairs at a time in the towers, which its backward passes once more.

    Args:
        batch: of pixels and token ids. gather: as of `model.loss`.

    Raises:
        ValueError: as of `model.loss`, before the towers begin.
    """
    model.check_pairs(batch)
    ids, mask = batch.token_ids, batch.text_mask
    words = _in_chunks(_words(model), chunk, ids, mask)
    frames = _in_chunks(model.frame_features, chunk, batch.video, batch.video_mask)
    sentence = words[torch.arange(len(words), device=words.device), sentence_places(ids)]
    text = model.text_set(sentence, words, mask)
    return model.pair_loss(*gather(text, model.encode_video(frames, batch.video_mask)))


def fitting_chunk(
    model: RetrievalModel,
    pair: Batch,
    most: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> int:
    """How many pairs can pass the towers at once, with what their backward needs, in the memory that is free:
    from 1 to `most`; such that `most` pairs make chunks of about the same size.

    Args:
        pair: one of the largest size, on the model's device.

    Raises:
        TrainingError: memory that is full of a single pair.
    """
    free = free_memory(pair.video.device)
    if free is None or most == 1:
        return most
    room = free * _SHARE - _KEPT * sum(p.numel() for p in model.parameters() if p.requires_grad)
    with room_for(_not_one):
        one = _live_bytes(model, pair, 1, autocast)
    fits = room / max(one)
    # From one pair only where two are all: with a single row some operations need no copy.
    few = min(2, most - 1)
    if max(one) * (few + 1) <= free:  # or so many are not tried
        try:
            fewer = one if few == 1 else _live_bytes(model, pair, few, autocast)
            more = _live_bytes(model, pair, few + 1, autocast)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return 1
        if len(fewer) != len(more):  # other operations for other numbers: only the largest can be compared
            fewer, more = [max(fewer)], [max(more)]
        # Each tensor grows evenly with the pairs, and so does what is alive at any moment.
        growth = [(less, much - less) for less, much in zip(fewer, more, strict=True) if much > less]
        fits = min((few + (room - less) / by for less, by in growth), default=most)
    chunks = -(-most // max(1, int(min(fits, most))))
    return -(-most // chunks)


def _not_one() -> TrainingError:
    return TrainingError(
        "memory does not hold what the towers need for one pair; try towers.gradient_checkpointing=true, "
        "train.precision=bf16 or a lower max_frames"
    )


def _words(model: RetrievalModel) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, mask: model.clip.words(ids, mask)[1]


def _in_chunks(tower: Callable[[Tensor, Tensor], Tensor], chunk: int, inputs: Tensor, mask: Tensor) -> Tensor:
    made = []
    for start in range(0, len(inputs), chunk):
        # Each chunk makes its own bfloat16 copies of the weights, or their gradients were added in bfloat16.
        torch.clear_autocast_cache()
        part = slice(start, start + chunk)
        made.append(checkpoint(tower, inputs[part], mask[part], use_reentrant=False))
    return torch.cat(made)


def _live_bytes(
    model: RetrievalModel, pair: Batch, count: int, autocast: Callable[[], AbstractContextManager]
) -> list[int]:
    """What is alive after each operation of the towers' forward and backward over `count` times the pair."""
    ids, text_mask, video, video_mask = (
        value.expand(count, *value.shape[1:])
        for value in (pair.token_ids, pair.text_mask, pair.video, pair.video_mask)
    )
    with LiveBytes() as live:
        with autocast():
            words = _words(model)(ids, text_mask)
            frames = model.frame_features(video, video_mask)
        outputs = [output for output in (words, frames) if output.requires_grad]
        trained = [value for value in model.clip.parameters() if value.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, trained, outputs, allow_unused=True)
    return live.after
