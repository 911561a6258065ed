"""A trained head at another temperature and with other weights of its contrasts, without another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

from xclip_lab.attention import replaced
from xclip_lab.errors import ConfigError
from xclip_lab.heads.xclip import CONTRASTS
from xclip_lab.model import RetrievalModel

_TEMPERATURES = ("temperature", "temp")


@dataclass(frozen=True)
class Settings:
    """What of a head can be changed after training.

    Attributes:
        temperature: of the head's softmax, None where it has none.
        weights: of X-CLIP's contrasts, 0 for one that is left out; the logit is their weighted mean. Empty
            for other heads.
    """

    temperature: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)


def trained_settings(model: RetrievalModel) -> Settings:
    """The settings that a model was trained with."""
    head = model.config.head
    name = _temperature_name(head)
    on = getattr(head, "contrasts", ())
    weights: dict[str, float] = {contrast: float(contrast in on) for contrast in CONTRASTS} if on else {}
    return Settings(None if name is None else getattr(head, name), weights)


@contextmanager
def rescored(model: RetrievalModel, settings: Settings) -> Iterator[None]:
    """Within the block the model's head has other settings; all else, its weights too, is as it was.

    With equal weights it is the model that these settings would have built, to the last bit.

    Raises:
        ConfigError: no contrast has a weight above 0, or a temperature that is not above 0.
    """
    config = model.config
    before = config.head
    weights = {name: weight for name, weight in settings.weights.items() if weight > 0}
    if settings.weights and not weights:
        raise ConfigError("all contrasts have weight 0; raise at least one")
    changes: dict[str, object] = {"contrasts": tuple(weights)} if weights else {}
    name = _temperature_name(before)
    if name is not None and settings.temperature is not None:
        if not settings.temperature > 0:
            raise ConfigError(f"temperature: {settings.temperature} is not allowed (it must be above 0)")
        changes[name] = settings.temperature
    head = replace(before, **changes)
    model.config, model.head.config = replace(config, head=head), head
    mean = sum(weights.values()) / max(1, len(weights))
    shares = {f"head.scores.{contrast}": _times(weight / mean) for contrast, weight in weights.items()}
    try:
        with replaced(model, shares):
            yield
    finally:
        model.config, model.head.config = config, before


def _times(factor: float):
    return lambda value: value * factor


def _temperature_name(head: object) -> str | None:
    known = {part.name for part in fields(head)}  # type: ignore[arg-type]
    return next((name for name in _TEMPERATURES if name in known), None)
