"""One step of training: the losses of its parts, their gradients over all processes, one update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from xclip_lab.batching import Batch
from xclip_lab.cached import cached_loss, fitting_chunk
from xclip_lab.config import RunConfig
from xclip_lab.distributed import Ranks, gather_pairs
from xclip_lab.errors import TrainingError
from xclip_lab.memory import room_for
from xclip_lab.model import Complete, Gather, RetrievalModel
from xclip_lab.optim import BertAdam, CosineAdamW, clamp_logit_scale
from xclip_lab.seed import seed_everything
from xclip_lab.tokens import TokenSet

_HEAD = 2**32 - 1
"""Where a process's number stands among the seeds, for what all processes draw alike; no process has it."""


@dataclass
class Stepper:
    """Makes steps.

    What a step draws at random depends on `config.seed`, its number, its part and, up to the gather, on the
    process; on nothing that was drawn before.

    Attributes:
        model: on `device`. checkpoint: what an error names as good where it exists. chunk: how many pairs
            pass the towers at a time in each process, where `choose_chunk` chose it.
    """

    model: RetrievalModel
    optimizer: BertAdam | CosineAdamW
    config: RunConfig
    ranks: Ranks
    device: torch.device
    checkpoint: Path
    chunk: int | None = None

    def choose_chunk(self) -> None:
        """Let as many pairs pass the towers at a time as the free memory of every process holds, unless that
        is settled: by the config, by the run so far, or because no towers are used."""
        train, data = self.config.train, self.config.data
        if self.chunk is None and train.tower_chunk is None and data.features is None:
            share = train.batch_size // (train.accumulate * self.ranks.world)
            fits = fitting_chunk(self.model, self._blank_pair().to(self.device), share, self._autocast)
            self.chunk = min(one for [one] in self.ranks.exchange([fits]))

    def make(self, step: int, parts: list[Batch | None]) -> dict[str, float]:
        """Forward, backward, one update. Each pair has the same weight, whatever part or process it is in.

        Args:
            parts: of each part of the batch what this process has of it, None for nothing.

        Returns:
            `pairs` and, where there are any in some process, the losses, `lr`, `grad_norm`, `logit_scale`.

        Raises:
            TrainingError: a loss or gradient that is not finite, a full memory. PeerLost: another process
                died.
        """
        self.optimizer.zero_grad(set_to_none=True)
        here = [0 if batch is None else len(batch) for batch in parts]
        sizes = [sum(of) for of in zip(*self.ranks.exchange(here), strict=True)]
        pairs = sum(sizes)
        if not pairs:
            return {"pairs": 0}
        means: dict[str, float] = {}
        for part, (batch, size) in enumerate(zip(parts, sizes, strict=True)):
            if not size:
                continue
            share = size / pairs
            given = self._blank_pair() if batch is None else batch
            with room_for(lambda given=given: self._full(step, self._for_less(given))):  # type: ignore[misc]
                values = self._backward(step, part, given, batch is None, share)
            self._check_finite(step, values)
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + value * share
        with room_for(lambda: self._full(step, "the optimiser keeps two numbers for each weight; free some")):
            self.ranks.average_gradients(self.model.parameters())
            norm = clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm).item()
            if not math.isfinite(norm):
                self._fail_on_gradient(step)
            lr = max(self.optimizer.get_lr())
            self.optimizer.step()
        clamp_logit_scale(self.model.logit_scale)
        scale = self.model.logit_scale.item()
        return {"pairs": pairs, **means, "lr": lr, "grad_norm": norm, "logit_scale": scale}

    def _backward(self, step: int, part: int, batch: Batch, blank: bool, share: float) -> dict[str, float]:
        """Add the gradients of one part, over the pairs of all processes; its losses. A `blank` batch counts
        for nothing."""
        seed, ranks = self.config.seed, self.ranks
        official = self.config.train.gather_gradients == "official"

        def gather(text: TokenSet, video: TokenSet) -> tuple[TokenSet, TokenSet, Complete]:
            if blank:
                text, video = text[:0], video[:0]
            # The head draws alike in every process, and in one alone.
            seed_everything(seed, step, part, _HEAD)
            return gather_pairs(ranks, text, video, official, self.model.head.pairs_alone)

        seed_everything(seed, step, part, ranks.rank)
        with self._autocast():
            losses = self._losses(batch.to(self.device), gather)
        (losses["loss"] * share).backward()
        return {name: value.item() for name, value in losses.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def _losses(self, batch: Batch, gather: Gather) -> dict[str, Tensor]:
        chunk = self._at_once(batch)
        if chunk < len(batch):
            return cached_loss(self.model, batch, chunk, gather)
        return self.model.loss(batch, gather)

    def _at_once(self, batch: Batch) -> int:
        """How many pairs of it pass the towers at a time."""
        chunk = self.chunk or self.config.train.tower_chunk
        if chunk is None or batch.video.ndim == 3:  # stored features have passed them
            return len(batch)
        return min(int(chunk), len(batch))

    def _full(self, step: int, remedy: str) -> TrainingError:
        return TrainingError(f"memory is full at step {step}; {remedy}{self._kept()}")

    def _for_less(self, batch: Batch) -> str:
        """What would need less memory than this batch."""
        chunk, lower = self._at_once(batch), "try a lower train.batch_size"
        if batch.video.ndim == 3:
            return lower
        if chunk == 1:
            return f"{lower}, towers.gradient_checkpointing=true, train.precision=bf16 or a lower max_frames"
        return (
            f"{chunk} pairs at a time in the towers are too many: set train.tower_chunk={chunk // 2}, which "
            f"gives the same gradients, or {lower}"
        )

    def _blank_pair(self) -> Batch:
        """A pair of no meaning, for a process without any that must compute along with the others."""
        frames, words, side = int(self.config.max_frames), int(self.config.max_words), self.model.image_size
        return Batch(
            token_ids=torch.zeros(1, words, dtype=torch.int64),
            text_mask=torch.ones(1, words, dtype=torch.int64),
            video=torch.zeros(1, frames, 3, side, side, dtype=torch.uint8),
            video_mask=torch.ones(1, frames, dtype=torch.int64),
        )

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            part = next((name for name in bad if name != "loss"), "loss")
            raise TrainingError(f"{part} is {values[part]} at step {step}; {self._advice()}")

    def _fail_on_gradient(self, step: int) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                raise TrainingError(f"the gradient of {name} is not finite at step {step}; {self._advice()}")
        raise TrainingError(f"the gradients overflow together at step {step}; {self._advice()}")

    def _advice(self) -> str:
        return f"try a lower optim.lr or train.precision fp32{self._kept()}"

    def _kept(self) -> str:
        return f"; the checkpoint in {self.checkpoint} is good" if self.checkpoint.exists() else ""
