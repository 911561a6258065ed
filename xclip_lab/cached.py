"""Cached gradients: the loss of a large batch with the towers' activations of only a few pairs in memory.

The towers pass over the batch without a graph, chunk by chunk. What follows them (`agg_module`, head, loss)
takes the whole batch and gives the gradient of every tower output. Then each chunk passes the towers again,
now with a graph, and takes its part of that gradient down to the weights (GradCache, Gao et al. 2021). That
is the gradient of the whole batch, auxiliary losses included, but for rounding. The towers draw nothing at
random, so that both passes give the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from xclip_lab.backbone import sentence_places
from xclip_lab.batching import Batch
from xclip_lab.errors import TrainingError
from xclip_lab.memory import free_memory
from xclip_lab.model import Gather, RetrievalModel

_SHARE = 0.6  # of the free memory for the towers; the features, the head and the optimiser need the rest


def cached_backward(
    model: RetrievalModel,
    batch: Batch,
    chunk: int,
    gather: Gather,
    weight: float = 1.0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """Add the gradient of `weight * loss` to every parameter's, with `chunk` pairs at a time in the towers.

    Args:
        batch: of pixels and token ids, on the model's device. gather: as of `model.loss`.
        autocast: entered for the forward passes only.

    Returns:
        The losses.
    """
    parts = [slice(start, start + chunk) for start in range(0, len(batch), chunk)]
    with autocast():
        with torch.no_grad():
            made = [_towers(model, batch, part) for part in parts]
        words, frames = (torch.cat(of).requires_grad_() for of in zip(*made, strict=True))
        sentence = words[torch.arange(len(words), device=words.device), sentence_places(batch.token_ids)]
        text = model.text_set(sentence, words, batch.text_mask)
        losses = model.pair_loss(*gather(text, model.encode_video(frames, batch.video_mask)))
    (losses["loss"] * weight).backward()
    for part in parts:
        with autocast():
            outputs = _towers(model, batch, part)
        used = [
            (output, leaf.grad[part])
            for output, leaf in zip(outputs, (words, frames), strict=True)
            if output.requires_grad and leaf.grad is not None
        ]
        if not used:  # the towers are frozen
            break
        torch.autograd.backward([output for output, _ in used], [gradient for _, gradient in used])
    return {name: value.item() for name, value in losses.items()}


def fitting_chunk(
    model: RetrievalModel,
    batch: Batch,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> int:
    """How many pairs can pass the towers at once, with what their backward needs, in the memory that is free;
    maybe more than the batch has.

    Raises:
        TrainingError: not even one; says what would make room.
    """
    free, each = free_memory(batch.video.device), bytes_of_a_pair(model, batch, autocast)
    if free is None or each == 0:
        return sys.maxsize
    fits = int(free * _SHARE / each)
    if fits < 1:
        raise TrainingError(
            f"train.tower_chunk: one pair needs {each / 2**30:.1f} GiB in the towers, {free / 2**30:.1f} are "
            "free; try towers.gradient_checkpointing=true, train.precision=bf16 or a lower max_frames"
        )
    return fits


def bytes_of_a_pair(
    model: RetrievalModel,
    batch: Batch,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> int:
    """What autograd keeps of the first pair of a batch in the towers."""
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with saved_tensors_hooks(note, lambda value: value), autocast():
        outputs = _towers(model, batch, slice(0, 1))  # held, so that no storage is used twice
    del outputs
    return sum(kept.values())


def _towers(model: RetrievalModel, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
    """Words and frames of a part of the batch, as the towers give them."""
    _, words = model.clip.words(batch.token_ids[part], batch.text_mask[part])
    return words, model.frame_features(batch.video[part], batch.video_mask[part])
