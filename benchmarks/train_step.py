"""A training step of ViT-B/32 on the CPU: bfloat16 against float32.

    xclip-lab bench train_step [--pairs 4] [--repeats 3]

X-CLIP (random weights, 12 frames and 32 words a pair), forward, backward and update. The naive way is the
official step: float32 and the papers' optimiser. Ours is bfloat16 where autocast allows it and a fused AdamW
(`train.precision=bf16`, `optim.recipe=modern`); heads stay float32. The floor is the products of the step at
the rate of a bfloat16 product. The losses of the first step, from the same weights, are compared.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Machine, Options, Row, bfloat16_rate, in_turn, report
from benchmarks.models import SIDE, batch_of
from xclip_lab import create_model
from xclip_lab.config import RunConfig, load_config
from xclip_lab.distributed import Ranks
from xclip_lab.optim import create_optimizer
from xclip_lab.step import Stepper

TOLERANCE, VOCABULARY = 0.02, 49_408
WAYS = {
    "official": {"train.precision": "fp32", "optim.recipe": "official"},
    "bf16": {"train.precision": "bf16", "optim.recipe": "modern"},
}


def main() -> None:
    parser = Options(__doc__, pairs=4, repeats=3)
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        parser.error("--pairs: the loss of fewer than 2 pairs is 0 whatever the model")
    machine, batch = Machine.measured(), batch_of(arguments.pairs, VOCABULARY, SIDE)
    steppers = {name: stepper(keys) for name, keys in WAYS.items()}
    first = {name: way.make(1, [batch])["loss"] for name, way in steppers.items()}
    ways = {name: partial(way.make, 2, [batch]) for name, way in steppers.items()}
    seconds = in_turn(ways, arguments.repeats)
    with FlopCounterMode(display=False) as counter:
        steppers["official"].model.loss(batch)["loss"].backward()
    floor = counter.get_total_flops() / bfloat16_rate()
    row = Row(f"ViT-B/32, {arguments.pairs} pairs", seconds["bf16"], seconds["official"], floor, aim=2.5)
    report("train_step", "A training step in bfloat16", machine, [row])
    apart = abs(first["bf16"] - first["official"]) / first["official"]
    verdict = "within" if apart <= TOLERANCE else "NOT within"
    print(f"loss {first['official']:.4f} in float32, {first['bf16']:.4f} in bfloat16: {apart:.1e} apart")
    print(f"{verdict} the tolerance of {TOLERANCE}")


def stepper(keys: dict[str, str]) -> Stepper:
    """What makes steps of one kind, from the same weights."""
    sizes = {"towers.name": "ViT-B-32-quickgelu", "towers.pretrained": None}
    config: RunConfig = load_config("xclip-folder-b32", {**sizes, "towers.precision": "fp32", **keys})
    torch.manual_seed(0)
    model = create_model(config)
    optimizer = create_optimizer(list(model.named_parameters()), config.optim, 100)
    return Stepper(model.train(), optimizer, config, Ranks(), torch.device("cpu"), Path("none"))


if __name__ == "__main__":
    main()
