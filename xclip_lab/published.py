"""What papers state of their models, with its source: shown beside our numbers, never as ours."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xclip_lab.errors import ConfigError
from xclip_lab.registry import did_you_mean

METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")


@dataclass(frozen=True)
class Published:
    """A model's numbers under a protocol.

    Attributes:
        metrics: `{"t2v": {"R@1": ...}, "v2t": {...}}`, with those of `METRICS` that are given.
        source: of each side, the paper or README that states it. post_processing: None for raw similarities.
    """

    metrics: dict[str, dict[str, float]]
    source: dict[str, str]
    post_processing: str | None = None


@dataclass(frozen=True)
class Ablation:
    """A table of a paper: `rows` by setting, with the metrics `t2v/R@1` and `v2t/R@1`."""

    rows: dict[str, dict[str, float]]
    source: str
    note: str | None = None


def published(protocol: str, model: str) -> Published | None:
    """What is stated of a model such as `xclip-b32` under a protocol such as `msrvtt-1k-A`, None if nothing.

    >>> published("msrvtt-1k-A", "xclip-b32").metrics["t2v"]["R@1"]
    46.1
    """
    sides = _tables()[protocol] if protocol in _protocols() else {}
    stated = {side: models[model] for side, models in sides.items() if model in models}
    if not stated:
        return None
    values = {side: zip(METRICS, row["values"], strict=True) for side, row in stated.items()}
    return Published(
        {side: {name: value for name, value in pairs if value is not None} for side, pairs in values.items()},
        {side: row["source"] for side, row in stated.items()},
        next(row.get("post_processing") for row in stated.values()),
    )


def ablation(name: str) -> Ablation:
    """One of X-CLIP's ablations on MSR-VTT 1k-A: `contrasts`, `fusion`, `temperature`, `temporal_encoder`.

    Raises:
        ConfigError: there is no such table.
    """
    tables = _tables()["ablations"]
    if name not in tables:
        raise ConfigError(
            f"no published ablation {name!r}{did_you_mean(name, tables)} (known: {', '.join(tables)})"
        )
    table = tables[name]
    rows = {key: dict(zip(("t2v/R@1", "v2t/R@1"), row, strict=True)) for key, row in table["rows"].items()}
    return Ablation(rows, table["source"], table.get("note"))


def _protocols() -> set[str]:
    return _tables().keys() - {"ablations"}


@functools.cache
def _tables() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
