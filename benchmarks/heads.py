"""Training X-CLIP's head on stored features at the paper's batch, against a module like the released one.

    xclip-lab bench heads [--videos 9000] [--batch 300] [--steps 20] [--bfloat16]

From random tower outputs (width 512, 32 words, 12 frames) on: the temporal transformer, the head, the loss,
the optimiser. The naive way is float32 and computes the score as the released module does (`official.py`).
Ours is `train.precision=bf16`, the temporal transformer in bfloat16, where this CPU is faster at such
products, else float32. Both make the same steps in turn, and every loss is compared. The floor is the naive
way's products at this machine's rates.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Machine, Options, Row, bfloat16_rate, in_turn, report
from benchmarks.models import FRAMES, WIDTH, WORDS, config_of, model_of, words_of
from benchmarks.official import official_scores
from xclip_lab import Batch
from xclip_lab.losses import symmetric_cross_entropy
from xclip_lab.optim import create_optimizer

TOLERANCE = 1e-4


def main() -> None:
    parser = Options(__doc__, videos=9000, batch=300, steps=20)
    parser.add_argument("--bfloat16", action="store_true", help="even where this CPU is slow at it")
    arguments = parser.parse_args()
    if not 2 <= arguments.batch <= arguments.videos:
        parser.error("--batch: from 2 on (the loss of one pair is 0) to as many as --videos")
    machine, halved = Machine.measured(), bfloat16_rate()
    fast = arguments.bfloat16 or halved > machine.product
    torch.manual_seed(0)
    features = torch.randn(arguments.videos, FRAMES, WIDTH)
    ones = torch.ones(arguments.batch, WORDS, dtype=torch.int64)
    ways, taken = {"official": Official(), "ours": Way(bfloat16=fast)}, []
    for step in range(arguments.steps):
        order = torch.randperm(arguments.videos, generator=torch.Generator().manual_seed(step))
        frames = features[order[: arguments.batch]]
        words = words_of(frames, 0.5, torch.Generator().manual_seed(step))
        batch = Batch(words, ones, frames, ones[:, :FRAMES])
        taken.append(in_turn({name: partial(way.step, batch) for name, way in ways.items()}, 1))
    naive, ours = ways["official"], ways["ours"]
    with FlopCounterMode(display=False) as counter:
        naive.loss(batch).backward()
    with FlopCounterMode(display=False) as of_transformer:
        naive.model.temporal(frames, batch.video_mask).sum().backward()
    whole, part = counter.get_total_flops(), of_transformer.get_total_flops()
    floor = (whole - part) / machine.product + part / max(machine.product, halved)
    seconds = {name: statistics.median(step[name] for step in taken) for name in ways}
    precision = "bfloat16" if fast else "float32: this CPU is slow at bfloat16"
    name = f"a step at batch {arguments.batch}"
    row = Row(name, seconds["ours"], seconds["official"], floor, aim=2.5, note=f"transformer in {precision}")
    report("heads", "X-CLIP's head on stored features", machine, [row])
    apart = max(abs(a - b) / abs(a) for a, b in zip(naive.losses, ours.losses, strict=True))
    first, last = ours.losses[0], ours.losses[-1]
    verdict = "within" if apart <= TOLERANCE else "NOT within"
    print(f"{arguments.steps} losses, from {first:.4f} to {last:.4f}: at most {apart:.1e} apart (relative),")
    print(f"{verdict} the tolerance of {TOLERANCE}")


class Way:
    """A model that trains, and the loss of each step; in `bfloat16` what autocast may."""

    def __init__(self, bfloat16: bool = False) -> None:
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16)
        self.model = model_of("xclip").train()
        self.model.clip.requires_grad_(False)
        self.model.logit_scale.requires_grad_(True)
        self.optimizer = create_optimizer(list(self.model.named_parameters()), config_of("xclip").optim, 1000)
        self.losses: list[float] = []

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def loss(self, batch: Batch) -> torch.Tensor:
        with self.autocast():
            return self.model.loss(batch)["loss"]


class Official(Way):
    """The same model in the shape of the released module."""

    def loss(self, batch: Batch) -> torch.Tensor:
        text = self.model.encode_text(batch.token_ids, batch.text_mask)
        video = self.model.encode_video(batch.video, batch.video_mask)
        logits = official_scores(self.model.head, text, video)
        return symmetric_cross_entropy(self.model.logit_scale.exp() * logits)


if __name__ == "__main__":
    main()
