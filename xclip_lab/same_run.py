"""What makes a training the same run: config and data, in every process and after a stop, and its steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xclip_lab.config import RunConfig, config_from_dict, to_dict
from xclip_lab.distributed import Ranks
from xclip_lab.errors import ConfigError, TrainingError
from xclip_lab.resume import differing_keys
from xclip_lab.validation import merge


def check_same_start(config: RunConfig, samples: Mapping[str, str | None], ranks: Ranks) -> None:
    """Whether every process has the first one's config and data.

    Args:
        samples: fingerprints of the `train` and `val` data.

    Raises:
        TrainingError: names the keys that differ.
    """
    started = {**to_dict(config), "samples": dict(samples)}
    differing = sorted(differing_keys(ranks.share(started), started))
    if differing:
        raise TrainingError(
            f"process {ranks.rank} was not started as the first one: {', '.join(differing)}; "
            "give every process the same command and data"
        )


def check_same_run(
    config: RunConfig, samples: Mapping[str, str | None], saved: Mapping[str, Any], run_dir: Path
) -> None:
    """Whether a checkpoint's state `saved` is of this config, but for `train.tower_chunk`, and these data.

    Raises:
        TrainingError: names the keys or the data that differ.
    """
    given = to_dict(config_from_dict(to_dict(config)))
    may_differ = {"train": {"tower_chunk": given["train"]["tower_chunk"]}}
    # With settings that are newer than the run.
    before = to_dict(config_from_dict(merge(saved["config"], may_differ)))
    differing = sorted(differing_keys(before, given))
    if differing:
        raise TrainingError(
            f"{run_dir} holds a run of another config: {', '.join(differing)}; "
            "give that config to go on with it, or choose another run folder"
        )
    for role, fingerprint in samples.items():
        if saved["data"].get(role) != fingerprint:
            raise TrainingError(
                f"{run_dir} holds a run with other {role} samples; "
                "bring the annotations back to go on with it, or choose another run folder"
            )


def share_of_a_part(config: RunConfig, world: int) -> int:
    """Pairs of each part of a step that one of `world` processes reads.

    Raises:
        ConfigError: a batch that they cannot share equally.
    """
    batch_size, parts = config.train.batch_size, config.train.accumulate
    if batch_size % (parts * world):
        below = batch_size // (parts * world) * parts * world
        fits = " or ".join(str(size) for size in (below, below + parts * world) if size)
        raise ConfigError(
            f"train.batch_size: {world} processes cannot share a batch of {batch_size} in {parts} part(s) "
            f"equally; a batch of {fits} they can"
        )
    return batch_size // (parts * world)


def steps_per_epoch(config: RunConfig, pairs: int) -> int:
    """Whole batches in `pairs`.

    Raises:
        TrainingError: not one.
    """
    batch_size, parts = config.train.batch_size, config.train.accumulate
    if pairs < batch_size:
        fits = pairs // parts * parts
        remedy = f"set train.batch_size to at most {fits}" if fits else "add pairs"
        raise TrainingError(f"{pairs} training pairs do not fill one batch of {batch_size}; {remedy}")
    return pairs // batch_size
