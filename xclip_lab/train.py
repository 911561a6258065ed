"""`fit()`: the whole training loop, the same for every model. It stops anywhere and goes on bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from xclip_lab.atomic import write_text
from xclip_lab.batching import Batch, ClipDataset, FrameStore, epoch_order, make_loader, preload
from xclip_lab.config import RunConfig, to_dict
from xclip_lab.datasets.base import VideoTextDataset
from xclip_lab.errors import TrainingError
from xclip_lab.evaluation import evaluate
from xclip_lab.history import History, Row, read_history
from xclip_lab.interrupt import DelayedInterrupt
from xclip_lab.model import Origin, RetrievalModel, official_name
from xclip_lab.optim import clamp_logit_scale, create_optimizer, freeze_parameters, undecayed_parameters
from xclip_lab.provenance import dataset_fingerprint, versions
from xclip_lab.resume import (
    DISK_ERRORS,
    Checkpoints,
    disk_remedy,
    random_state,
    read_stamp,
    run_lock,
    seed_everything,
)
from xclip_lab.text import check_vocabulary

LESS_IS_BETTER = ("MdR", "MnR")


@dataclass(frozen=True)
class FitResult:
    """A finished run.

    Attributes:
        run_dir: its folder. checkpoint: what to load, the best one; without validation the last.
        stamp: of that checkpoint: step, epoch, and the split, metric and value that selected it.
        steps: optimiser steps. seconds: spent in training and validation, over all sittings.
        history: the rows of `history.jsonl`.
        broken: videos that this sitting left out (`data.on_error` `skip`), with the reason.
    """

    run_dir: Path
    checkpoint: Path
    stamp: dict[str, Any]
    steps: int
    seconds: float
    history: list[Row]
    broken: dict[str, str]


def fit(
    model: RetrievalModel,
    config: RunConfig,
    train: VideoTextDataset,
    run_dir: str | Path,
    val: VideoTextDataset | None = None,
    store: FrameStore | None = None,
    progress: bool = True,
) -> FitResult:
    """Train `model` in place, or go on where a run of the same config in `run_dir` stopped.

    Writes `config.yaml`, `versions.json`, `history.jsonl`, `tensorboard/` and `checkpoints/{last,best}`. A
    run that is finished returns at once with its last weights in `model`. What a run comes to that was killed
    or interrupted and went on is equal, bit for bit, to one that was not (same machine and threads).

    Where `data.on_error` is `skip`, a pair whose video cannot be read is missing from its step, and every
    other pair keeps its step: the number of steps and the place of each are those of the whole dataset, with
    frames in memory or not. Each row of the history counts the `pairs` that its step had. A step without any
    makes no update.

    Args:
        model: any model with `loss(batch) -> {"loss": ..., named parts}`. Seed before you create it.
        train: the pairs. The last incomplete batch of an epoch is left out.
        val: evaluated after each epoch; `train.select` chooses the best checkpoint on it.
        store: frames of `train` decoded before; else `data.preload` says whether to decode all of them first,
            as it does for `val`.
        progress: show a bar.

    Raises:
        TrainingError: a folder in use or of another config, too few pairs or none that can be read, a loss or
            gradient that is not finite, a full disk. The last checkpoint stays good.
        VideoError: an unreadable video, unless `data.on_error` is `skip`.
        KeyboardInterrupt: after the first Ctrl-C once the step is finished and saved; at the second at once.
    """
    run_dir = Path(run_dir)
    with run_lock(run_dir), _disk_errors(run_dir):
        trainer = Trainer(model, config, train, run_dir, val)
        trainer.start_or_resume()
        if trainer.step < trainer.total_steps:
            trainer.run(store, progress)
        return trainer.result()


class Trainer:
    """The state of a run: model, optimiser, where in which epoch it stands, and what was best so far."""

    def __init__(
        self,
        model: RetrievalModel,
        config: RunConfig,
        train: VideoTextDataset,
        run_dir: Path,
        val: VideoTextDataset | None,
    ) -> None:
        check_vocabulary(model.clip.token_embedding.weight.shape[0])
        self.config, self.train, self.val, self.run_dir = config, train, val, run_dir
        self.steps_per_epoch = _steps_per_epoch(config, len(train))
        self.total_steps = self.steps_per_epoch * int(config.train.epochs)
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, int(config.train.max_steps))
        self.fingerprints = {
            "train": dataset_fingerprint(train),
            "val": dataset_fingerprint(val) if val is not None else None,
        }
        self.device = resolve_device(config.train.device)
        self.model = model.to(self.device)
        named = [(official_name(name), parameter) for name, parameter in model.named_parameters()]
        freeze_parameters(named, config.towers.freeze_layer_num)
        undecayed = {official_name(name) for name in undecayed_parameters(model)}
        self.optimizer = create_optimizer(named, config.optim, self.total_steps, undecayed)
        self.checkpoints = Checkpoints(run_dir)
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.history_rows = 0
        self.broken: dict[str, str] = {}
        self.val_store: FrameStore | None = None

    def start_or_resume(self) -> None:
        """Begin a run, or restore everything that the last checkpoint holds."""
        saved = self.checkpoints.load()
        if saved is None:
            seed_everything(self.config.seed)
            write_text(self.run_dir / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False))
            record = {**versions(), "data": self.fingerprints}
            write_text(self.run_dir / "versions.json", json.dumps(record, indent=2) + "\n")
            return
        self._check_same_run(saved)
        self.checkpoints.load_weights(self.model)
        self.checkpoints.restore(saved, self.optimizer)
        self.step, self.seconds, self.best = saved["step"], saved["seconds"], saved["best"]
        self.history_rows = saved["history_rows"]
        read_history(self.run_dir, self.history_rows)  # refuses a damaged record before videos are decoded

    def run(self, store: FrameStore | None, progress: bool) -> None:
        """All steps that are left."""
        clips = ClipDataset(self.train, self.config, store=store, image_size=self.model.image_size)
        if self.config.data.preload:
            clips.store = store or preload(clips, progress)
            self.val_store = self._preload_val(progress)
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step", disable=not progress)
        with History(self.run_dir, self.history_rows) as self.history, bar, DelayedInterrupt() as interrupt:
            self._began = time.perf_counter()
            self._paced_pairs, self._paced_seconds = 0, self.seconds
            while self.step < self.total_steps and not interrupt.requested:
                self.model.train()
                for parts in self._epoch_batches(clips):
                    row = self._train_step(parts)
                    bar.update()
                    loss = f"{row.get('loss', math.nan):.3f}"
                    bar.set_postfix(epoch=row["epoch"], loss=loss, refresh=False)
                    if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
                        self._finish_epoch(row)
                        break
                    if self.step == 1 or self.step % self.config.train.log_every == 0:
                        self._log(row)
                    if self.step % self.config.train.checkpoint_every == 0 or interrupt.requested:
                        self._save()
                    if interrupt.requested:
                        break
        if interrupt.requested:
            raise KeyboardInterrupt(f"stopped after step {self.step}; the same command goes on from there")

    def result(self) -> FitResult:
        """What the finished run came to.

        Raises:
            TrainingError: its stamp or record is damaged.
        """
        best = self.checkpoints.best
        stamp = read_stamp(best, self.run_dir)
        history = read_history(self.run_dir)
        seconds = history[-1]["seconds"]
        self.model.origin = Origin(str(self.checkpoints.last), run=self.config)
        return FitResult(self.run_dir, best, stamp, self.step, seconds, history, self.broken)

    def _epoch_batches(self, clips: ClipDataset) -> Iterator[list[Batch]]:
        """The steps that are left of this epoch, each as its parts: `train.accumulate` of them, less those of
        which nothing can be read."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        groups = self.train.groups if self.config.data.group_batches else None
        order = epoch_order(len(self.train), self.config.seed, epoch, groups)
        batch_size, parts = self.config.train.batch_size, self.config.train.accumulate
        rest = order[done * batch_size : self.steps_per_epoch * batch_size]
        loader = make_loader(clips, order=rest, batch_size=batch_size // parts, epoch=epoch)
        batches = loader.in_place()
        while True:
            # A loader draws a seed as it starts, and a resumed epoch starts one more of them.
            with torch.random.fork_rng(devices=[]):
                step = list(itertools.islice(batches, parts))
            self.broken |= loader.broken
            if not step:
                return
            yield [batch for batch in step if batch is not None]

    def _train_step(self, parts: list[Batch]) -> Row:
        """Forward, backward, one update. Each pair has the same weight, whatever part it is in. Returns the
        step's numbers."""
        self.optimizer.zero_grad(set_to_none=True)
        epoch = self.step // self.steps_per_epoch + 1
        self.step += 1
        pairs = sum(len(batch) for batch in parts)
        self._paced_pairs += pairs
        row: Row = {"step": self.step, "epoch": epoch, "pairs": pairs}
        if not parts:
            return row
        means: dict[str, float] = {}
        for batch in parts:
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"
            ):
                losses = self.model.loss(batch.to(self.device))
            values = {name: value.item() for name, value in losses.items()}
            self._check_finite(values)
            share = len(batch) / pairs
            (losses["loss"] * share).backward()
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + value * share
        norm = clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm).item()
        if not math.isfinite(norm):
            self._fail_on_gradient()
        lr = max(self.optimizer.get_lr())
        self.optimizer.step()
        clamp_logit_scale(self.model.logit_scale)
        scale = self.model.logit_scale.item()
        return {**row, **means, "lr": lr, "grad_norm": norm, "logit_scale": scale}

    def _finish_epoch(self, row: Row) -> None:
        """Validate, record, save."""
        if not self.optimizer.state:
            raise TrainingError(
                f"none of the training pairs up to step {self.step} can be read; "
                f"the first: {next(iter(self.broken.values()))}"
            )
        value = None
        if self.val is not None:
            settings = dataclasses.replace(self.config.evaluation, bootstrap=0)
            config = dataclasses.replace(self.config, evaluation=settings)
            metrics = evaluate(self.model, self.val, config, store=self.val_store, progress=False).metrics
            row |= {f"val/{side}/{name}": float(x) for side, of in metrics.items() for name, x in of.items()}
            value = row[f"val/{self.config.train.select}"]
        self._log(row)
        self._save(value)

    def _preload_val(self, progress: bool) -> FrameStore | None:
        """The frames of `val`; what cannot be read is left to `evaluate`, which counts it."""
        if self.val is None:
            return None
        skipping = dataclasses.replace(self.config.data, on_error="skip")
        config = dataclasses.replace(self.config, data=skipping)
        return preload(ClipDataset(self.val, config, image_size=self.model.image_size), progress)

    def _save(self, value: float | None = None) -> None:
        """Save a checkpoint; `value` is the selecting metric where the model was just validated."""
        chosen = value is not None and self._beats_best(value)
        stamp = {
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": -(-self.step // self.steps_per_epoch),
            "selection_split": self.val.split if self.val is not None and chosen else None,
            "selection_metric": self.config.train.select if chosen else "last",
            "selection_value": value if chosen else None,
        }
        best = chosen or self.val is None
        if best:
            self.best = stamp
        self.history.sync()
        state = {
            "config": to_dict(self.config),
            "data": self.fingerprints,
            "step": self.step,
            "seconds": self._elapsed(),
            "best": self.best,
            "history_rows": len(self.history.rows),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(),
        }
        self.checkpoints.save(self.model, state, stamp, best)

    def _beats_best(self, value: float) -> bool:
        if self.best is None:
            return True
        before = self.best["selection_value"]
        return value < before if self.config.train.select.endswith(LESS_IS_BETTER) else value > before

    def _log(self, row: Row) -> None:
        """Record a step, with the pace since the last record."""
        elapsed = self._elapsed()
        pace = self._paced_pairs / max(elapsed - self._paced_seconds, 1e-9)
        self.history.append({**row, "seconds": elapsed, "pairs_per_second": pace})
        self._paced_pairs, self._paced_seconds = 0, elapsed

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._began

    def _check_finite(self, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            part = next((name for name in bad if name != "loss"), "loss")
            raise TrainingError(f"{part} is {values[part]} at step {self.step}; {self._advice()}")

    def _fail_on_gradient(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                raise TrainingError(
                    f"the gradient of {name} is not finite at step {self.step}; {self._advice()}"
                )
        raise TrainingError(f"the gradients overflow together at step {self.step}; {self._advice()}")

    def _advice(self) -> str:
        advice = "try a lower optim.lr or train.precision fp32"
        last = self.checkpoints.last
        return f"{advice}; the checkpoint in {last} is good" if last.exists() else advice

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        differing = sorted(_differing_keys(saved["config"], to_dict(self.config)))
        if differing:
            raise TrainingError(
                f"{self.run_dir} holds a run of another config: {', '.join(differing)}; "
                "give that config to go on with it, or choose another run folder"
            )
        for role, fingerprint in self.fingerprints.items():
            if saved["data"].get(role) != fingerprint:
                raise TrainingError(
                    f"{self.run_dir} holds a run with other {role} samples; "
                    "bring the annotations back to go on with it, or choose another run folder"
                )


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU.

    Raises:
        TrainingError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f"train.device: {name!r} cannot be used here; try auto or cpu") from error
    return device


def _steps_per_epoch(config: RunConfig, pairs: int) -> int:
    batch_size, parts = config.train.batch_size, config.train.accumulate
    if pairs < batch_size:
        fits = pairs // parts * parts
        remedy = f"set train.batch_size to at most {fits}" if fits else "add pairs"
        raise TrainingError(f"{pairs} training pairs do not fill one batch of {batch_size}; {remedy}")
    return pairs // batch_size


def _differing_keys(saved: Any, given: Any, prefix: str = "") -> Iterator[str]:
    """`key (saved there, given here)` for each dotted key whose values differ."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in {**saved, **given}:
            yield from _differing_keys(saved.get(key), given.get(key), f"{prefix}.{key}" if prefix else key)
    elif saved != given:
        yield f"{prefix} ({saved} there, {given} here)"


@contextmanager
def _disk_errors(run_dir: Path) -> Iterator[None]:
    """A full disk as one clear line, wherever it strikes."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise TrainingError(
            f"cannot write to {run_dir}: {error.strerror}; {disk_remedy(error)} and start again to go on"
        ) from error
