"""X-CLIP's scores of a whole gallery, against the way of the official evaluation.

    xclip-lab bench scores [--size 1000] [--large 4000] [--repeats 3]

Random features at the papers' sizes (width 512, 32 words, 12 frames), random mixing matrices near the
identity. The naive way is the official loop: blocks of 32 texts and 32 videos in the shape of the released
module, and in every block the temporal transformer once more. Ours encodes each video once. The floor is all
products, and one exponential for each word and frame of a pair, at this machine's own rates.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks.measure import Machine, Options, Row, in_turn, peak_of, report
from benchmarks.models import FRAMES, WORDS, encode, related_features, xclip_model
from benchmarks.official import official_evaluation
from xclip_lab.cost import scoring_cost
from xclip_lab.metrics import ranks
from xclip_lab.model import RetrievalModel
from xclip_lab.scoring import score


def main() -> None:
    arguments = Options(__doc__, size=1000, large=4000, repeats=3).parse_args()
    size = arguments.size
    machine = Machine.measured()
    model = xclip_model()
    text, frames, mask = related_features(size)
    encoded = encode(model, frames, mask)
    official = partial(official_evaluation, model, text, frames, mask)
    ours = {
        "given": lambda: score(model, text, encoded),
        "all": lambda: score(model, text, encode(model, frames, mask)),
    }
    peaks = {name: peak_of(way) for name, way in ours.items()}
    seconds = in_turn({"official": official, **ours}, arguments.repeats)
    cost, exponentials = scoring_cost(model), size * size * WORDS * FRAMES / machine.exponential
    pairs = 2 * cost.pair * size**2 / machine.product + exponentials
    whole = 2e9 * cost.gmac(size, size) / machine.product + exponentials
    name, naive = f"{size:,} x {size:,}", seconds["official"]
    rows = [
        Row(f"{name}, videos encoded", seconds["given"], naive, pairs, peaks["given"], 18.0),
        Row(f"{name}, with the temporal transformer", seconds["all"], naive, whole, peaks["all"], 12.0),
        large(model, arguments.large, size, seconds["given"]),
    ]
    report("scores", "X-CLIP's scores of a gallery", machine, rows)
    compare(official(), ours["all"]())


def large(model: RetrievalModel, size: int, small: int, seconds_of_small: float) -> Row:
    """A larger gallery, once: the time should grow as the pairs do, the memory not at all."""
    text, frames, mask = related_features(size)
    encoded, out = encode(model, frames, mask), torch.zeros(size, size)
    began = time.perf_counter()
    peak = peak_of(lambda: score(model, text, encoded, out=out))
    seconds = time.perf_counter() - began
    growth = seconds / seconds_of_small / (size / small) ** 2
    note = f"{growth:.2f} of the time a pair took in the smaller one"
    return Row(f"{size:,} x {size:,}, videos encoded", seconds, peak=peak, note=note)


def compare(official: torch.Tensor, ours: torch.Tensor) -> None:
    """Say how far the two results lie apart."""
    truth = torch.arange(len(ours)).numpy()
    theirs, mine = ranks(official, truth), ranks(ours, truth)
    same = "the same" if all((theirs[way] == mine[way]).all() for way in mine) else "NOT the same"
    print(f"largest difference {(official - ours).abs().max():.1e} logit at scale 100; ranks {same}")


if __name__ == "__main__":
    main()
