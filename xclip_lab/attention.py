"""Looking inside: read and replace what passes the taps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xclip_lab.batching import Batch
from xclip_lab.errors import ConfigError
from xclip_lab.heads import Tap
from xclip_lab.model import RetrievalModel
from xclip_lab.registry import did_you_mean


def tap_names(model: nn.Module) -> dict[str, str]:
    """Every tap of a model: name -> the axes of what passes it."""
    return {name: module.shape for name, module in model.named_modules() if isinstance(module, Tap)}


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the block, what passes a tap is replaced: by a tensor, or by a function of the value.

    Raises:
        ConfigError: a tap that the model does not have.
    """
    hooks = []
    try:
        for name, value in values.items():
            hooks.append(_tap(model, name).register_forward_hook(_replacement(value)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run_with_cache(
    model: RetrievalModel, batch: Batch, names: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Similarity `[T, V]` of a batch's texts with its videos, and what passed the taps on the way.

    The batch may hold other numbers of texts than of videos. Nothing else of the model changes.

    Args:
        names: the taps to keep, None for all.

    Raises:
        ConfigError: a tap that the model does not have.
    """
    names = tap_names(model) if names is None else names
    cache: dict[str, Tensor] = {}
    recorders = {name: _recorder(cache, name) for name in names}
    training = model.training
    model.eval()
    try:
        with replaced(model, recorders):
            text = model.encode_text(batch.token_ids, batch.text_mask)
            video = model.encode_video(batch.video, batch.video_mask)
            similarity = model.similarity(text, video)
    finally:
        model.train(training)
    return similarity, cache


def _tap(model: nn.Module, name: str) -> nn.Module:
    known = tap_names(model)
    if name not in known:
        raise ConfigError(f"no tap {name!r}{did_you_mean(name, known)} (taps: {', '.join(known)})")
    return model.get_submodule(name)


def _replacement(value: Tensor | Callable[[Tensor], Tensor]):
    return lambda module, inputs, output: value(output) if callable(value) else value


def _recorder(cache: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    def record(value: Tensor) -> Tensor:
        cache[name] = value.detach()
        return value

    return record
