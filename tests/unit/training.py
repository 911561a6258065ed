"""A training run small enough to kill many times: a one-layer X-CLIP with dropout on frames made of noise."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
from torch import nn

from xclip_lab import resume
from xclip_lab.clips import FrameStore
from xclip_lab.config import RunConfig, load_config
from xclip_lab.datasets import Sample, VideoTextDataset
from xclip_lab.model import RetrievalModel
from xclip_lab.tokens import TokenSet
from xclip_lab.train import FitResult, Trainer, fit

WORDS = ("red", "blue", "green", "circle", "square", "star", "left", "right")
PAIRS, BATCH, STEPS = 22, 4, 10


class NoisyModel(RetrievalModel):
    """X-CLIP with dropout on the words, so that a run depends on the global generators."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.2)

    def text_set(self, sentence, words, mask) -> TokenSet:
        text = super().text_set(sentence, words, mask)
        return TokenSet(text.pooled, self.dropout(text.tokens), text.mask)


def tiny_config(overrides: dict | None = None) -> RunConfig:
    """5 steps an epoch, 2 epochs; a checkpoint at steps 3, 5, 6, 9 and 10."""
    sizes = {"embed_dim": 8, "image_size": 32, "vision_width": 16, "text_width": 8}
    sizes |= {"vision_layers": 1, "text_layers": 1, "vision_heads": 1, "text_heads": 1}
    settings = {f"towers.architecture.{name}": size for name, size in sizes.items()}
    settings |= {"temporal.layers": 1, "max_words": 8, "max_frames": 2, "data.preload": False}
    settings |= {"train.batch_size": BATCH, "train.epochs": 2, "train.checkpoint_every": 3}
    settings |= {"optim.lr": 1e-3, "train.log_every": 1, "train.device": "cpu", "data.workers": 0}
    return load_config("quickstart", settings | (overrides or {}))


def tiny_dataset(pairs: int = PAIRS, split: str = "train") -> VideoTextDataset:
    captions = [" ".join(WORDS[(row + shift * row) % 8] for shift in range(3)) for row in range(pairs)]
    samples = [Sample(f"v{row}", caption) for row, caption in enumerate(captions)]
    return VideoTextDataset("tiny", split, Path("."), samples)


def frames_of(dataset: VideoTextDataset, frames: int = 2, side: int = 32) -> FrameStore:
    noise = np.random.default_rng(0)
    shape = (frames, 3, side, side)
    clips = {
        name: (torch.tensor(noise.integers(0, 255, shape, dtype=np.uint8)), torch.arange(float(frames)))
        for name in dataset.videos
    }
    return FrameStore(clips, {})


def film(dataset: VideoTextDataset, folder: Path, frames: int = 4, side: int = 32) -> VideoTextDataset:
    """The dataset with a file of noise for each video."""
    noise = np.random.default_rng(0)
    for name in dataset.videos:
        with av.open(str(folder / f"{name}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=4)
            stream.width = stream.height = side
            for _ in range(frames):
                picture = noise.integers(0, 255, (side, side, 3), dtype=np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    samples = [dataclasses.replace(s, path=folder / f"{s.video_id}.mp4") for s in dataset.samples]
    return VideoTextDataset(dataset.name, dataset.split, folder, samples)


def real_processes() -> multiprocessing.context.ForkServerContext:
    """Processes to kill, forked from a server that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.training", "torch.utils.tensorboard"])
    return context


def train_tiny(run_dir: Path, overrides: dict | None = None, **settings) -> FitResult:
    """Train, or go on, in this process."""
    torch.set_num_threads(1)
    config, dataset = tiny_config(overrides), tiny_dataset()
    torch.manual_seed(config.seed)
    model = NoisyModel(config.model)
    return fit(model, config, dataset, run_dir, store=frames_of(dataset), progress=False, **settings)


def outcome(run_dir: Path) -> dict:
    """All of a run that must not depend on whether it was interrupted."""
    state = torch.load(run_dir / "checkpoints/last/training.pt", weights_only=True)
    clocks = ("seconds", "pairs_per_second", "wait")
    rows = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    return {
        "weights": resume.load_file(run_dir / "checkpoints/last/model.safetensors"),
        "optimizer": state["optimizer"],
        "best": state["best"],
        "history": [{name: value for name, value in row.items() if name not in clocks} for row in rows],
    }


def assert_same(found, expected, where: str = "") -> None:
    """Equality to the last bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@contextmanager
def at_saving_stage(stage: int, save: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """`act` before the `stage`-th call of the `save`-th save that touches the disk. Yields their names."""
    seen: list[str] = []
    saves = 0

    def watched(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if saves == save and inside:
                seen.append(name)
                if len(seen) == stage:
                    act()
            return real(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    inside = False
    real_save = resume.Checkpoints.save

    def counted_save(*args, **kwargs):
        nonlocal saves, inside
        saves, inside = saves + 1, True
        try:
            real_save(*args, **kwargs)
        finally:
            inside = False

    targets = [(os, "mkdir"), (resume, "save_model"), (torch, "save"), (Path, "write_text")]
    targets += [(os, "fsync"), (os, "replace"), (os, "symlink"), (shutil, "rmtree")]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(resume.Checkpoints, "save", counted_save))
        for owner, name in targets:
            stack.enter_context(watched(owner, name))
        yield seen


@contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` when the loop has made optimiser step `step`, before anything of it is saved."""
    real = Trainer._train_step

    def watched(trainer, parts):
        row = real(trainer, parts)
        if trainer.step == step:
            act()
        return row

    with mock.patch.object(Trainer, "_train_step", watched):
        yield


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die_after(run_dir: Path, step: int) -> None:
    with after_step(step, die):
        train_tiny(run_dir)


def train_and_die_while_saving(run_dir: Path, stage: int, save: int) -> None:
    with at_saving_stage(stage, save, die):
        train_tiny(run_dir)
