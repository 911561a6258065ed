"""Training X-CLIP's head on stored features at the paper's batch, against a module like the released one.

    xclip-lab bench heads [--videos 9000] [--batch 300] [--steps 20]

From random tower outputs (width 512, 32 words, 12 frames) on: the temporal transformer, the head, the loss,
the optimiser. The naive way computes the score as the released module does (`official.py`). Both make the
same steps in turn, and every loss is compared. The floor is the naive way's products at this machine's rate.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Machine, Options, Row, report
from benchmarks.official import official_scores
from benchmarks.scores import TOWERS
from xclip_lab import Batch, create_model
from xclip_lab.config import config_from_dict
from xclip_lab.losses import symmetric_cross_entropy
from xclip_lab.optim import create_optimizer

WORDS, FRAMES, WIDTH = 32, 12, 512


def main() -> None:
    arguments = Options(__doc__, videos=9000, batch=300, steps=20).parse_args()
    machine = Machine.measured()
    torch.manual_seed(0)
    features = torch.randn(arguments.videos, FRAMES, WIDTH)
    ways = {"official": Official(), "ours": Way()}
    for step in range(arguments.steps):
        order = torch.randperm(arguments.videos, generator=torch.Generator().manual_seed(step))
        batch = batch_of(features[order[: arguments.batch]], step)
        for way in ways.values():
            way.step(batch)
    naive, ours = ways["official"], ways["ours"]
    with FlopCounterMode(display=False) as counter:
        naive.loss(batch).backward()
    floor = counter.get_total_flops() / machine.product
    row = Row(f"a step at batch {arguments.batch}", ours.seconds(), naive.seconds(), floor, aim=2.5)
    report("heads", "X-CLIP's head on stored features", machine, [row])
    apart = max(abs(a - b) / abs(a) for a, b in zip(naive.losses, ours.losses, strict=True))
    first, last = ours.losses[0], ours.losses[-1]
    print(f"{arguments.steps} losses, from {first:.4f} to {last:.4f}: at most {apart:.1e} apart (relative)")


class Way:
    """A model that trains, and what its steps took and gave."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        towers = {"name": None, "pretrained": None, "architecture": TOWERS}
        self.config = config_from_dict({"towers": towers, "head": {"name": "xclip"}})
        self.model = create_model(self.config)
        self.model.clip.requires_grad_(False)
        self.model.logit_scale.requires_grad_(True)
        self.optimizer = create_optimizer(list(self.model.named_parameters()), self.config.optim, 1000)
        self.losses: list[float] = []
        self._taken: list[float] = []

    def step(self, batch: Batch) -> None:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self._taken.append(time.perf_counter() - began)
        self.losses.append(loss.item())

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.model.loss(batch)["loss"]

    def seconds(self) -> float:
        return statistics.median(self._taken)


class Official(Way):
    """The same model in the shape of the released module."""

    def loss(self, batch: Batch) -> torch.Tensor:
        text = self.model.encode_text(batch.token_ids, batch.text_mask)
        video = self.model.encode_video(batch.video, batch.video_mask)
        logits = official_scores(self.model.head, text, video)
        return symmetric_cross_entropy(self.model.logit_scale.exp() * logits)


def batch_of(frames: torch.Tensor, seed: int) -> Batch:
    """Pairs whose words are noisy frames of their video, as tower outputs."""
    noise = torch.randn(len(frames), WORDS, WIDTH, generator=torch.Generator().manual_seed(seed))
    words = 0.5 * frames[:, torch.arange(WORDS) % FRAMES] + noise
    ones = torch.ones(len(frames), WORDS, dtype=torch.int64)
    return Batch(words, ones, frames, ones[:, :FRAMES])


if __name__ == "__main__":
    main()
