"""`fit()`: the whole training loop, the same for every model, in one process or in several. It stops anywhere
and goes on bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from xclip_lab.atomic import write_text
from xclip_lab.batching import Batch, make_loader, training_order
from xclip_lab.clips import ClipDataset, Clips, FrameStore, preload
from xclip_lab.config import RunConfig, save_config, to_dict
from xclip_lab.consistency import check_training_frames
from xclip_lab.datasets.base import VideoTextDataset
from xclip_lab.distributed import PeerLost, Ranks, joined
from xclip_lab.errors import TrainingError
from xclip_lab.evaluation import evaluate
from xclip_lab.features import open_clips
from xclip_lab.guards import check_training
from xclip_lab.history import History, Row, read_history
from xclip_lab.interrupt import DelayedInterrupt
from xclip_lab.model import Origin, RetrievalModel, official_name
from xclip_lab.official import check_start, seen_before
from xclip_lab.optim import create_optimizer, freeze_parameters, freeze_towers, undecayed_parameters
from xclip_lab.provenance import dataset_fingerprint, versions
from xclip_lab.resume import Checkpoints, disk_errors, read_stamp, run_lock
from xclip_lab.same_run import check_same_run, check_same_start, share_of_a_part, steps_per_epoch
from xclip_lab.seen import read_seen, split_of, write_seen
from xclip_lab.step import Stepper
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

    In a run of several processes every one has the result of the first.
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
    """Train `model` in place, or go on where a run of the same config in `run_dir` stopped. Only
    `train.tower_chunk` may be another one: it changes the memory and, but for rounding, nothing else.

    Writes `config.yaml`, `versions.json`, `history.jsonl`, `tensorboard/` and `checkpoints/{last,best}`. A
    run that is finished returns at once with its last weights in `model`. What a run comes to that was killed
    or interrupted and went on is equal, bit for bit, to one that was not (same machine and threads). Under
    torchrun every process calls `fit` with the same arguments; `run_dir` is that of the first.

    Where `data.on_error` is `skip`, a pair whose video cannot be read is missing from its step, and every
    other pair keeps its step: the number of steps and the place of each are those of the whole dataset, with
    frames in memory or not. Each row of the history counts the `pairs` that its step had. A step without any
    makes no update.

    Args:
        model: one with `loss(batch, gather) -> {"loss": ..., named parts}`, as `RetrievalModel.loss`. Seed
            before you create it.
        train: the pairs. The last incomplete batch of an epoch is left out.
        val: evaluated after each epoch; `train.select` chooses the best checkpoint on it.
        store: frames of `train` decoded before; else `data.preload` says whether to decode all of them first,
            as it does for `val`.
        progress: show a bar.

    Raises:
        TrainingError: a folder in use or of another config, too few pairs or none that can be read, a loss or
            gradient that is not finite, a full disk, another process of the run that died. The last
            checkpoint stays good.
        ConfigError: a batch that the processes cannot share equally; stored features that do not fit.
        DatasetError: more than `data.allow_overlap` videos of `val` in `train`.
        VideoError: an unreadable video, unless `data.on_error` is `skip`.
        KeyboardInterrupt: after the first Ctrl-C once the step is finished and saved; at the second at once.
    """
    run_dir = Path(run_dir)
    if val is not None and split_of(val) != split_of(train):
        check_training(train, val, int(config.data.allow_overlap))
    with joined(config.train.device) as ranks, disk_errors(run_dir):
        trainer = Trainer(model, config, train, run_dir, val, ranks)  # refuses before anything is written
        with run_lock(run_dir) if ranks.first else nullcontext():
            try:
                trainer.start_or_resume()
                if trainer.step < trainer.total_steps:
                    trainer.run(store, progress and ranks.first)
                return trainer.result()
            except PeerLost as lost:
                raise TrainingError(trainer.without_peer(lost)) from lost


class Trainer:
    """The state of a run: model, optimiser, where in which epoch it stands, and what was best so far."""

    def __init__(
        self,
        model: RetrievalModel,
        config: RunConfig,
        train: VideoTextDataset,
        run_dir: Path,
        val: VideoTextDataset | None,
        ranks: Ranks | None = None,
    ) -> None:
        check_vocabulary(model.clip.token_embedding.weight.shape[0])
        self.config, self.train, self.val, self.run_dir = config, train, val, run_dir
        self.ranks = ranks or Ranks()
        check_training_frames(config.data)
        self.share = share_of_a_part(config, self.ranks.world)
        pairs = len(train) if config.data.captions == "all" else len(train.videos)
        self.steps_per_epoch = steps_per_epoch(config, pairs)
        self.total_steps = self.steps_per_epoch * int(config.train.epochs)
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, int(config.train.max_steps))
        self.fingerprints = {
            "train": dataset_fingerprint(train),
            "val": dataset_fingerprint(val) if val is not None else None,
        }
        self.device = self.ranks.device(config.train.device)
        self.model = model.to(self.device)
        self.checkpoints = Checkpoints(run_dir)
        self.clips: Clips | None = None
        if config.data.features is not None and not self.checkpoints.last.exists():
            # Refused here, if they do not fit; a run that goes on gets its weights first.
            self.clips = open_clips(self.model, train, config, training=True)
        named = [(official_name(name), parameter) for name, parameter in model.named_parameters()]
        freeze_parameters(named, config.towers.freeze_layer_num, config.towers.freeze_with_3d_patch)
        if config.data.features is not None:
            freeze_towers(named)
        undecayed = {official_name(name) for name in undecayed_parameters(model)}
        planned = config.optim.schedule_epochs
        schedule_steps = self.steps_per_epoch * planned if planned else self.total_steps
        self.optimizer = create_optimizer(named, config.optim, schedule_steps, undecayed)
        self.stepper = Stepper(
            self.model, self.optimizer, config, self.ranks, self.device, self.checkpoints.last
        )
        self.history: History | None = None  # the first process's alone
        self.step = 0
        self.saved: int | None = None  # the step of the last checkpoint
        self.seconds = 0.0
        self._waited = self._stepped = 0.0  # seconds of this epoch
        self.best: dict[str, Any] | None = None
        self.history_rows = 0
        self.broken: dict[str, str] = {}
        self.val_store: FrameStore | None = None

    def start_or_resume(self) -> None:
        """Begin a run, or restore everything that the last checkpoint holds."""
        check_same_start(self.config, self.fingerprints, self.ranks)
        saved = self.ranks.share(self.checkpoints.load() if self.ranks.first else None)
        if saved is None:
            check_start(self.model, self.config)
            if self.ranks.first:
                save_config(self.config, self.run_dir / "config.yaml")
                record = {**versions(), "data": self.fingerprints}
                write_text(self.run_dir / "versions.json", json.dumps(record, indent=2) + "\n")
                before = seen_before(self.model, self.config)
                write_seen(self.run_dir, before.with_run(self.train, self.val))
        else:
            check_same_run(self.config, self.fingerprints, saved, self.run_dir)
            if self.ranks.first:
                self.checkpoints.load_weights(self.model)
            self.checkpoints.restore(saved, self.optimizer)
            if self.config.train.tower_chunk is None:
                self.stepper.chunk = saved["tower_chunk"]
            self.step, self.seconds, self.best = saved["step"], saved["seconds"], saved["best"]
            self.history_rows, self.saved = saved["history_rows"], saved["step"]
            if self.ranks.first:
                read_history(self.run_dir, self.history_rows)  # is it damaged? before videos are decoded
        self.ranks.share_weights(self.model)

    def run(self, store: FrameStore | None, progress: bool) -> None:
        """All steps that are left."""
        clips = self.clips or open_clips(self.model, self.train, self.config, store, training=True)
        if self.config.data.preload and isinstance(clips, ClipDataset):
            clips.store = store or preload(clips, progress)
            self.val_store = self._preload_val(progress)
        self.stepper.choose_chunk()
        counted = {"total": self.total_steps, "initial": self.step, "unit": "step"}
        with (
            # The loop looks for SIGTERM and Ctrl-C after each step.
            self.ranks.patiently(),
            DelayedInterrupt(tell=self.ranks.first) as interrupt,
            tqdm(**counted, desc="train", disable=not progress) as bar,
            History(self.run_dir, self.history_rows) if self.ranks.first else nullcontext() as self.history,
        ):
            if progress and self._chunked:
                bar.write(
                    f"{self.share} pairs, {self.stepper.chunk} at a time in the towers: memory holds so many "
                    "with what is kept of them; the gradients are the same",
                    file=sys.stderr,
                )
            self._began = time.perf_counter()
            self._paced_pairs, self._paced_seconds = 0, self.seconds
            stopping = False
            while self.step < self.total_steps and not stopping:
                self.model.train()
                for parts in self._epoch_batches(clips):
                    row = self._train_step(parts)
                    bar.update()
                    loss = f"{row.get('loss', math.nan):.3f}"
                    bar.set_postfix(epoch=row["epoch"], loss=loss, refresh=False)
                    ends = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
                    if ends:
                        self._finish_epoch(row)
                    elif self.step == 1 or self.step % self.config.train.log_every == 0:
                        self._log(row)
                    stopping = self.ranks.any_of(interrupt.requested)
                    if not ends and (stopping or self.step % self.config.train.checkpoint_every == 0):
                        self._save()
                    if ends or stopping:
                        break
        if stopping:
            raise KeyboardInterrupt(f"stopped after step {self.step}; the same command goes on from there")

    def result(self) -> FitResult:
        """What the finished run came to.

        Raises:
            TrainingError: its stamp or record is damaged.
        """
        last, seen = str(self.checkpoints.last), read_seen(self.run_dir)
        self.model.origin = Origin(last, run=self.config, seen=seen)
        broken = self.ranks.union(self.broken)
        result = None
        if self.ranks.first:
            best = self.checkpoints.best
            stamp = read_stamp(best, self.run_dir)
            history = read_history(self.run_dir)
            seconds = history[-1]["seconds"]
            result = FitResult(self.run_dir, best, stamp, self.step, seconds, history, broken)
        return self.ranks.share(result)

    def without_peer(self, lost: PeerLost) -> str:
        """What to say when another process of the run is gone."""
        when = f"step {self.step}" if self.step else "before the first step"
        kept = "there is no checkpoint yet: the same command begins anew"
        if self.saved:
            last = self.checkpoints.last
            kept = (
                f"the checkpoint of step {self.saved} in {last} is good: the same command goes on from there"
            )
        return f"{when}: {lost}; {kept}"

    def _epoch_batches(self, clips: Clips) -> Iterator[list[Batch | None]]:
        """The steps that are left of this epoch, each as its parts: `train.accumulate` of them, and of each
        part this process's share, None where nothing of it can be read."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order = training_order(self.train, self.config, epoch)
        batch_size, parts = self.config.train.batch_size, self.config.train.accumulate
        rest = np.array(order[done * batch_size : self.steps_per_epoch * batch_size])
        own = rest.reshape(-1, self.ranks.world, self.share)[:, self.ranks.rank].ravel().tolist()
        loader = make_loader(clips, order=own, batch_size=self.share, epoch=epoch)
        batches = loader.in_place()
        self._waited = self._stepped = 0.0
        began = time.perf_counter()
        while step := list(itertools.islice(batches, parts)):
            self._waited += time.perf_counter() - began
            self.broken |= loader.broken
            yield step
            began = time.perf_counter()

    @property
    def _chunked(self) -> Row:
        """How many pairs pass the towers at a time, where it was chosen and is fewer than all."""
        chunk = self.stepper.chunk
        return {"tower_chunk": chunk} if chunk is not None and chunk < self.share else {}

    def _train_step(self, parts: list[Batch | None]) -> Row:
        """One step; returns its numbers."""
        epoch = self.step // self.steps_per_epoch + 1
        self.step += 1
        began = time.perf_counter()
        numbers = self.stepper.make(self.step, parts)
        self._stepped += time.perf_counter() - began
        self._paced_pairs += int(numbers["pairs"])
        return {"step": self.step, "epoch": epoch, **numbers, **self._chunked}

    def _finish_epoch(self, row: Row) -> None:
        """Validate, record, save."""
        if not self.optimizer.state:
            raise TrainingError(
                f"none of the training pairs up to step {self.step} can be read; "
                f"the first: {next(iter(self.broken.values()))}"
            )
        selecting = None
        if self.val is not None:
            settings = dataclasses.replace(self.config.evaluation, bootstrap=0, rerank="none")
            config = dataclasses.replace(self.config, evaluation=settings)
            result = evaluate(
                self.model, self.val, config, store=self.val_store, progress=False, ranks=self.ranks
            )
            for side, metrics in result.metrics.items():
                row |= {f"val/{side}/{name}": float(value) for name, value in metrics.items()}
            selecting = row[f"val/{self.config.train.select}"]
        self._log(row)
        self._save(selecting)

    def _preload_val(self, progress: bool) -> FrameStore | None:
        """The frames of `val`; what cannot be read is left to `evaluate`, which counts it."""
        if self.val is None:
            return None
        skipping = dataclasses.replace(self.config.data, on_error="skip")
        config = dataclasses.replace(self.config, data=skipping)
        return preload(ClipDataset(self.val, config, image_size=self.model.image_size), progress)

    def _save(self, value: float | None = None) -> None:
        """Save a checkpoint; `value` is the selecting metric where the model was just validated."""
        if self.history is not None:
            self._write_checkpoint(self.history, value)
            self.saved = self.step  # true even where the wait below finds that another process is gone
        self.ranks.wait()
        self.saved = self.step

    def _write_checkpoint(self, history: History, value: float | None) -> None:
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
        history.sync()
        state = {
            "config": to_dict(self.config),
            "data": self.fingerprints,
            "step": self.step,
            "seconds": self._elapsed(),
            "best": self.best,
            "history_rows": len(history.rows),
            "tower_chunk": self.stepper.chunk,
            "optimizer": self.optimizer.state_dict(),
        }
        self.checkpoints.save(self.model, state, stamp, best)

    def _beats_best(self, value: float) -> bool:
        if self.best is None:
            return True
        before = self.best["selection_value"]
        return value < before if self.config.train.select.endswith(LESS_IS_BETTER) else value > before

    def _log(self, row: Row) -> None:
        """Record a step, with the pace since the last record and the share of this epoch's time in which the
        steps waited for their data."""
        if self.history is None:
            return
        elapsed = self._elapsed()
        pace = self._paced_pairs / max(elapsed - self._paced_seconds, 1e-9)
        wait = self._waited / max(self._waited + self._stepped, 1e-9)
        self.history.append({**row, "seconds": elapsed, "pairs_per_second": pace, "wait": wait})
        self._paced_pairs, self._paced_seconds = 0, elapsed

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._began
