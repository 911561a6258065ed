"""What scoring a gallery costs with each method at the papers' sizes: products counted, time measured.

    xclip-lab bench scoring_cost [--size 1000]

From random features of CLIP on (width 512, 32 words, 12 frames): `agg_module` and what a head computes of one
text or video ("items"), and all pairs. The floor is these products at this machine's rate. The naive
GLSCL is ours and, for every pair, what the released code computes and throws away, timed on 100 x 100 pairs
and scaled; so is the cross transformer, as its row says.
"""

from __future__ import annotations

import torch

from benchmarks.measure import Machine, Options, Row, in_turn, report
from benchmarks.models import WIDTH, model_of
from xclip_lab.cost import random_features, scoring_cost
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.scoring import score

METHODS = {
    "CLIP4Clip meanP": ("meanP", "clip4clip"),
    "CLIP4Clip seqTransf": ("seqTransf", "clip4clip"),
    "CLIP2Video": ("tdb", "clip2video"),
    "GLSCL": ("seqTransf", "glscl"),
    "WTI": ("seqTransf", "wti"),
    "X-CLIP": ("seqTransf", "xclip"),
    "CLIP4Clip tightTransf": ("meanP", "tightTransf"),
}
PER_PAIR_BLOCK = 20
"""Texts and videos of the block on which a cost a pair is timed, where 1,000 x 1,000 would take an hour."""


def main() -> None:
    size = Options(__doc__, size=1000).parse_args().size
    machine, rows = Machine.measured(), []
    for name, (agg_module, head) in METHODS.items():
        model = model_of(head, agg_module)
        timed = min(size, PER_PAIR_BLOCK) if head == "tightTransf" else size
        cost, seconds = scoring_cost(model), _seconds(model, timed) * (size / timed) ** 2
        gmac, pairs = cost.gmac(size, size), cost.pair * size * size / 1e9
        note = f"GMAC: items {gmac - pairs:.2f}, pairs {pairs:.2f}"
        note += f"; timed on {timed} x {timed}" if timed < size else ""
        released = None
        if head == "glscl":
            wasted, thrown = _thrown_away(model, size)
            released = seconds + wasted
            note += f"; naive: as released, pairs {pairs + thrown:.2f}"
        rows.append(Row(name, seconds, released, 2e9 * gmac / machine.product, note=note))
    report("scoring_cost", f"Scores of {size:,} texts and {size:,} videos", machine, rows)


def _seconds(model: RetrievalModel, size: int) -> float:
    """All pairs, from frame vectors and words on."""
    text, frames, mask = random_features(model, size, size)

    def scores() -> None:
        with evaluating(model):
            texts = model.head.encode_text(text)
            videos = model.head.encode_video(frames, mask, model.temporal)
        score(model, texts, videos)

    return in_turn({"": scores}, 3)[""]


@torch.no_grad()
def _thrown_away(model: RetrievalModel, size: int) -> tuple[float, float]:
    """Seconds and GMAC of GLSCL's `weight_fc` of every pair's joined vectors, timed on 10,000 pairs."""
    block, weight_fc = min(size, 100), model.head.weight_fc
    joined = torch.randn(block * block, 2 * WIDTH)
    seconds = in_turn({"": lambda: weight_fc(joined)}, 3)[""] * (size / block) ** 2
    return seconds, size * size * sum(layer.weight.numel() for layer in (weight_fc[0], weight_fc[2])) / 1e9


if __name__ == "__main__":
    main()
