"""The paper's batch in the memory of a few pairs: cached gradients against the whole batch at once.

    xclip-lab bench cached_gradients [--batch 300] [--chunk 10]

All four families on small towers (32 x 32 pixels, 12 frames, width 128, four layers). For each the gradients
of all parameters, their distance (of the norm, over the norm), the time and the peak memory of either way: of
the process, and of the tensors in it, which does not depend on how the allocator takes memory back.
"""

from __future__ import annotations

import torch

from benchmarks.measure import MIB, Machine, Options, Row, in_turn, peak_of, report
from benchmarks.models import batch_of, model_of
from xclip_lab.cached import cached_loss
from xclip_lab.live_bytes import LiveBytes

SIDE, VOCABULARY = 32, 1000
TOWERS = {"embed_dim": 128, "text_width": 128, "text_heads": 2, "text_layers": 4, "vocab_size": VOCABULARY}
TOWERS |= {"vision_width": 128, "vision_heads": 2, "vision_layers": 4, "image_size": SIDE, "patch_size": 8}
FAMILIES = {
    "CLIP4Clip": ("clip4clip", "seqTransf"),
    "X-CLIP": ("xclip", "seqTransf"),
    "CLIP2Video": ("clip2video", "tdb"),
    "GLSCL": ("glscl", "seqTransf"),
}


def main() -> None:
    parser = Options(__doc__, batch=300, chunk=10)
    arguments = parser.parse_args()
    if arguments.batch < 2:
        parser.error("--batch: the loss of fewer than 2 pairs is 0 whatever the model")
    batch, rows = batch_of(arguments.batch, VOCABULARY, SIDE), []
    for name, (head, agg_module) in FAMILIES.items():
        model = model_of(head, agg_module, **TOWERS)
        ways = {
            "cached": lambda model=model: cached_loss(model, batch, arguments.chunk)["loss"].backward(),
            "whole": lambda model=model: model.loss(batch)["loss"].backward(),
        }
        # What the first pass of all sets up counts for neither.
        model.loss(batch_of(2, VOCABULARY, SIDE))["loss"].backward()
        model.zero_grad(set_to_none=True)
        found, peaks, tensors = {}, {}, {}
        for way, make in ways.items():
            with LiveBytes() as live:
                make()
            tensors[way] = max(live.after)
            found[way] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            model.zero_grad(set_to_none=True)
            peaks[way] = peak_of(make)
            model.zero_grad(set_to_none=True)
        seconds = in_turn(ways, 1)
        apart = ((found["cached"] - found["whole"]).norm() / found["whole"].norm()).item()
        note = (
            f"whole {peaks['whole'] / MIB:.0f} MiB; tensors {tensors['cached'] / MIB:.0f} against "
            f"{tensors['whole'] / MIB:.0f} MiB; gradients {apart:.1e} apart"
        )
        rows.append(Row(name, seconds["cached"], seconds["whole"], peak=peaks["cached"], note=note))
    title = f"Cached gradients, batch {arguments.batch}, {arguments.chunk} pairs at a time"
    report("cached_gradients", title, Machine.measured(), rows)


if __name__ == "__main__":
    main()
