"""AOSM forward and backward at the paper's batch, in tiles, against autograd of the formula.

    xclip-lab bench aosm [--batch 300] [--repeats 5]

Width 512, 32 words, 12 frames, temperature 0.01, matrices a little off the identity. Peak memory is what the
process grows by; the error is that of all gradients together against float64, eager beside ours. The floor is
the four products of a forward and of a backward for which nothing was kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import MIB, Machine, Options, Row, in_turn, peak_of, report
from benchmarks.models import FRAMES, WIDTH, WORDS, words_of
from xclip_lab.aosm import blocked, formula
from xclip_lab.aosm.matrices import Matrices

TAU = 0.01


def main() -> None:
    arguments = Options(__doc__, batch=300, repeats=5).parse_args()
    batch, machine = arguments.batch, Machine.measured()
    features = related(batch)
    for way in WAYS.values():  # what the first call of all sets up counts for neither
        gradients(way, related(8))
    ways = {name: partial(gradients, way, features) for name, way in WAYS.items()}
    peaks = {name: peak_of(way) for name, way in ways.items()}
    seconds = in_turn(ways, arguments.repeats)
    floor = 4 * 2 * batch**2 * WORDS * FRAMES * WIDTH / machine.product
    row = Row(f"AOSM, batch {batch}", seconds["ours"], seconds["eager"], floor, peaks["ours"], 1.4)
    report("aosm", "AOSM forward and backward", machine, [row])
    times = peaks["eager"] / peaks["ours"]
    print(f"peak of eager autograd {peaks['eager'] / MIB:.0f} MiB, {times:.1f} times ours")
    right = gradients(WAYS["eager"], [value.double() for value in features])
    size = sum(true.square().sum() for true in right) ** 0.5
    for name, way in WAYS.items():
        pairs = zip(gradients(way, features), right, strict=True)
        error = sum((mine - true).square().sum() for mine, true in pairs) ** 0.5
        print(f"error of {name} against float64: {error / size:.1e}")


def related(batch: int) -> list[Tensor]:
    """Words that speak of their own video's frames, the frames, four matrices, weights of the scores."""
    torch.manual_seed(0)
    frames = torch.randn(batch, FRAMES, WIDTH)
    matrices = [torch.eye(n) + 0.02 * torch.randn(n, n) / n**0.5 for n in (WORDS, FRAMES, WORDS, FRAMES)]
    return [
        normalize(words_of(frames, 0.3), dim=-1),
        normalize(frames, dim=-1),
        *matrices,
        torch.randn(batch, batch),
    ]


WAYS: dict[str, Callable[..., Tensor]] = {"ours": blocked.matrix_aosm, "eager": formula.matrix_aosm}


def gradients(way: Callable[..., Tensor], features: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum of the scores in the features and matrices."""
    *inputs, weights = features
    leaves = [value.detach().requires_grad_() for value in inputs]
    scores = way(leaves[0], leaves[1], Matrices(*leaves[2:]), TAU)
    return torch.autograd.grad((scores * weights).sum(), leaves)


if __name__ == "__main__":
    main()
