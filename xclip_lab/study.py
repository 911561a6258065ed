"""What the notebooks share: small sizes for a trial, the tables and controls of a study of one model."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xclip_lab.checkpoint import load_model
from xclip_lab.clips import BrokenClip, Clip, ClipDataset, FrameStore, preload
from xclip_lab.config import RunConfig, load_config
from xclip_lab.datasets import VideoTextDataset, load_dataset
from xclip_lab.distributed import resolve_device
from xclip_lab.errors import AbsentError, ConfigError, DatasetError, UserError, VideoError
from xclip_lab.evaluation import evaluate
from xclip_lab.guards import check_training
from xclip_lab.model import RetrievalModel, create_model
from xclip_lab.official import open_official, start_from
from xclip_lab.pointing import Pointing, point_at_truth
from xclip_lab.result import Result
from xclip_lab.runs import NOTEBOOKS
from xclip_lab.seed import seed_everything
from xclip_lab.synthetic import ClipTruth, load_truth

LEVELS = {1: "1 objects", 2: "2 motion", 3: "3 order", 4: "4 distractors"}

SMOKE: dict[str, Any] = {
    "max_frames": 4,
    "towers.name": None,
    "towers.pretrained": None,
    "towers.architecture": {
        "embed_dim": 16,
        "image_size": 32,
        "patch_size": 16,
        "vision_width": 16,
        "vision_layers": 1,
        "vision_heads": 1,
        "text_width": 16,
        "text_layers": 1,
        "text_heads": 1,
    },
    "temporal.layers": 1,
    "data.dataset": "synthetic",
    "data.protocol": None,
    "data.val_split": None,
    "data.sampler": "uniform",
    "data.root": "data/generated/smoke",
    "data.generate": {"train_clips": 24, "test_clips": 12, "size": 32, "frames": 8},
    "data.workers": 0,
    "train.batch_size": 4,
    "train.epochs": 1,
    "train.max_steps": 3,
    "train.log_every": 1,
    "evaluation.bootstrap": 50,
}
"""A model and data so small that a notebook runs through in seconds. Its numbers mean nothing."""


def enter_project() -> None:
    """From the folder of the notebooks, where JupyterLab starts them, go up to the project's.

    There relative paths (`data/`, `runs/`) mean the same as on the command line.
    """
    if Path.cwd() == NOTEBOOKS.resolve():
        os.chdir(NOTEBOOKS.resolve().parent)


def configure(
    preset: str | Path, overrides: Mapping[str, Any], seed: int | None = None, smoke: bool = False
) -> RunConfig:
    """`load_config` as the notebooks call it: preset, then `SMOKE` where wanted, then `overrides`.

    Args:
        seed: None for that of the preset.

    Raises:
        ConfigError: as `load_config`.
    """
    values = {**(SMOKE if smoke else {}), **({} if seed is None else {"seed": seed}), **overrides}
    return load_config(preset, values)


def open_split(config: RunConfig, split: str) -> VideoTextDataset:
    """The annotations of one split of `config.data`."""
    data = config.data
    return load_dataset(data.dataset, split, data.root, data.protocol, videos=data.videos, family=data.family)


def open_splits(config: RunConfig, splits: Sequence[str] | None = None) -> list[VideoTextDataset]:
    """Some splits of `config.data`; None for those that training and evaluation use and that are there.

    Raises:
        DatasetError: a split that was named, or every one, is not there.
    """
    if splits:
        return [open_split(config, split) for split in splits]
    data = config.data
    wanted = dict.fromkeys(split for split in (data.train_split, data.val_split, data.test_split) if split)
    found, missing = [], None
    for split in wanted:
        try:
            found.append(open_split(config, split))
        except DatasetError as error:
            missing = error
    if missing is not None and not found:
        raise missing
    return found


def open_training_splits(config: RunConfig) -> tuple[VideoTextDataset, VideoTextDataset | None]:
    """The splits for training and validation (None where `data.val_split` is null).

    Raises:
        DatasetError: test videos in training (`guards.check_training`; `fit` looks at validation).
    """
    data = config.data
    train = open_split(config, data.train_split)
    if train.split != data.train_split:
        raise ConfigError(
            f"data.train_split: {data.train_split!r} of {data.dataset} is its {train.split!r}; name another"
        )
    val = open_split(config, data.val_split) if data.val_split else None
    try:
        check_training(train, open_split(config, data.test_split), data.allow_overlap)
    except AbsentError as error:
        print(f"attention: whether test videos are in {train.split!r} is not known: {error}")
    return train, val


def open_clips(dataset: VideoTextDataset, config: RunConfig) -> ClipDataset:
    """The dataset's pairs with their frames; all decoded here and now where `config.data.preload` says so.

    What cannot be read is left to `evaluate`, which counts it.
    """
    data = dataclasses.replace(config.data, on_error="skip")
    clips = ClipDataset(dataset, dataclasses.replace(config, data=data))
    if config.data.preload:
        clips.store = preload(clips)
    return clips


def read_clip(clips: ClipDataset, index: int) -> Clip:
    """One caption with its frames.

    Raises:
        DatasetError: no such index. VideoError: the file cannot be read.
    """
    if not 0 <= index < len(clips):
        raise DatasetError(f"no caption {index}; {clips.dataset.split} has captions 0 to {len(clips) - 1}")
    clip = clips[index]
    if isinstance(clip, BrokenClip):
        raise VideoError(clip.reason)
    if isinstance(clip, UserError):
        raise clip
    return clip


def new_model(config: RunConfig) -> RetrievalModel:
    """What a training begins with: a model fresh from its config, or with the weights of `train.init`.

    Raises:
        ConfigError, CheckpointError: as `create_model` and `official.start_from`.
    """
    return untrained_model(config) if config.train.init is None else start_from(config)


def untrained_model(config: RunConfig) -> RetrievalModel:
    """A model fresh from its config, whatever `train.init` says, the same for the same `config.seed`."""
    seed_everything(config.seed)
    return create_model(config)


def open_model(
    checkpoint: str | Path | None, config: RunConfig, family: str = "", migrate: bool = False
) -> tuple[RetrievalModel, RunConfig]:
    """The model of a checkpoint on `train.device`, and the config with that model's own sizes.

    Args:
        checkpoint: a run folder, a checkpoint folder or a file; empty for a model fresh from its config.
        family: empty, or whose official code wrote the file (`official.open_official`, as is `migrate`).

    Raises:
        CheckpointError: nothing there, damaged, or of another model. TrainingError: no such device.
    """
    device = resolve_device(config.train.device)
    if not checkpoint:
        model = new_model(config).eval()
    elif family:
        model = open_official(checkpoint, family, config, migrate)
    else:
        model = load_model(checkpoint)
    print(f"checkpoint {model.origin.checkpoint}")
    return model.to(device), config.with_model(model.config)


def find_truth(config: RunConfig, split: str) -> dict[str, ClipTruth]:
    """The truth about generated clips by video id; for other videos empty, and a line that says so."""
    if config.data.dataset == "synthetic":
        return load_truth(config.data.root, split)
    print(
        f"The dataset {config.data.dataset!r} carries no word-frame truth: levels and pointing are left out."
    )
    return {}


def shuffled_frames(
    model: RetrievalModel, dataset: VideoTextDataset, config: RunConfig, store: FrameStore | None = None
) -> Result:
    """A control: the same evaluation, not re-ranked, each clip's frames in a random order."""
    raw = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, rerank="none"))
    return evaluate(model, dataset, with_shuffled_frames(raw), store=store, progress=False)


def with_shuffled_frames(config: RunConfig) -> RunConfig:
    """The config with each clip's frames in a random order."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, frame_order=2))


def chance(result: Result) -> dict[str, float]:
    """Text-to-video recalls of guessing, in percent."""
    return {f"R@{k}": min(100.0, 100.0 * k / len(result.videos)) for k in (1, 5, 10)}


def level_table(result: Result, control: Result, truth: Mapping[str, ClipTruth]) -> pd.DataFrame:
    """Text-to-video recall of all captions and, for generated clips, of each level, in the full gallery.

    Args:
        control: another evaluation of the same captions, such as `shuffled_frames`.

    Returns:
        A row for `all` and for each level: `captions`; `R@1` with its 95% interval `low`, `high` (NaN where
        the result has none); `control`, `control_low`, `control_high`: the control's R@1.
    """
    groups = level_groups(result, truth)
    rows = {name: _level_row(result, control, chosen) for name, chosen in groups.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def level_groups(result: Result, truth: Mapping[str, ClipTruth]) -> dict[str, np.ndarray]:
    """Which captions `[T]` are `all`, and which of each level that generated clips have."""
    groups = {"all": np.ones(len(result.captions), dtype=bool)}
    if truth:
        levels = np.array([truth[result.videos[column]].level for column in result.text_to_video])
        groups |= {name: levels == level for level, name in LEVELS.items() if (levels == level).any()}
    return groups


def _level_row(result: Result, control: Result, chosen: np.ndarray) -> dict[str, float]:
    row: dict[str, float] = {"captions": int(chosen.sum())}
    for names, found in (
        (("R@1", "low", "high"), result),
        (("control", "control_low", "control_high"), control),
    ):
        metrics, intervals = found.subset(chosen)
        row |= zip(names, (metrics["R@1"], *intervals.get("R@1", (np.nan, np.nan))), strict=True)
    return row


def level_lines(table: pd.DataFrame) -> str:
    """A level table as lines of text."""
    return "\n".join(
        f"R@1 {name:<14} {row['R@1']:5.1f}%  [{row['low']:.1f}, {row['high']:.1f}]   "
        f"with its frames shuffled {row['control']:5.1f}%  [{row['control_low']:.1f}, "
        f"{row['control_high']:.1f}]   n = {row['captions']:.0f}"
        for name, row in table.iterrows()
    )


def pointing_study(
    model: RetrievalModel,
    dataset: VideoTextDataset,
    truth: Mapping[str, ClipTruth],
    config: RunConfig,
    store: FrameStore | None = None,
    name: str = "this model",
) -> dict[str, Pointing]:
    """Where words attend, and three controls.

    With its frames shuffled, and the truth with them, a clip keeps its content and loses its order: attention
    that follows content still points, attention that knows by heart that what is told first is seen first
    does not. A model fresh from its config and a truth shuffled alone must not point.

    Args:
        name: what to call the model.

    Returns:
        By name; empty where there is no truth.
    """
    if not truth:
        return {}
    untrained = untrained_model(config).to(next(model.parameters()).device)
    shuffled = with_shuffled_frames(config)
    return {
        name: point_at_truth(model, dataset, truth, config, store),
        "frames shuffled": point_at_truth(model, dataset, truth, shuffled, store),
        "untrained": point_at_truth(untrained, dataset, truth, config, store),
        "shuffled truth": point_at_truth(model, dataset, truth, config, store, shuffle_truth=True),
    }


def best_and_worst(result: Result) -> tuple[int, int]:
    """The caption that finds its video with the widest lead, and the one that misses it most."""
    rows = np.arange(len(result.captions))
    others = result.similarity.copy()
    others[rows, result.text_to_video] = -np.inf
    lead = result.similarity[rows, result.text_to_video] - others.max(1)
    return int(lead.argmax()), int(lead.argmin())


def retrieved(clips: ClipDataset, result: Result, row: int, count: int = 3) -> dict[str, Any]:
    """What a caption finds, as `plots.retrieved_videos` takes it: its first `count` clips, and its own."""
    order = np.argsort(-result.similarity[row], kind="stable")
    own = int(result.text_to_video[row])
    columns = list(dict.fromkeys([*order[:count].tolist(), own]))
    first = {sample.video_id: index for index, sample in reversed(list(enumerate(clips.dataset.samples)))}
    return {
        "query": result.captions[row],
        "clips": [read_clip(clips, first[result.videos[column]]) for column in columns],
        "ranks": [int(np.flatnonzero(order == column)[0]) + 1 for column in columns],
        "scores": result.similarity[row, columns].tolist(),
        "truth": result.videos[own],
    }


def examples(clips: ClipDataset, truth: Mapping[str, ClipTruth]) -> list[Clip]:
    """Clips to show: the first of each level, with its partner where it has one; without truth the first four
    that can be read."""
    if not truth:
        first = np.unique(clips.dataset.text_to_video, return_index=True)[1].tolist()
        readable = (clip for clip in map(clips.__getitem__, first) if isinstance(clip, Clip))
        return list(itertools.islice(readable, 4))
    shown: dict[int, list[int]] = {}
    for index, sample in enumerate(clips.dataset.samples):
        clip = truth[sample.video_id]
        rows = shown.setdefault(clip.level, [])
        partners = rows and truth[clips.dataset.samples[rows[0]].video_id].group == clip.group
        if not rows or (partners and len(rows) < 2):
            rows.append(index)
    return [read_clip(clips, index) for level in sorted(shown) for index in shown[level]]


def heading(clip: Clip, truth: Mapping[str, ClipTruth]) -> str:
    """A clip's level, where it has one, and its caption."""
    level = f"level {LEVELS[truth[clip.video_id].level]}:  " if clip.video_id in truth else ""
    return f"{level}\u201c{clip.caption}\u201d"
