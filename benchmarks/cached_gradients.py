"""The paper's batch in the memory of a few pairs: cached gradients against the whole batch at once.

    xclip-lab bench cached_gradients [--batch 300] [--chunk 10]

All four families on small towers (32 x 32 pixels, 12 frames, width 128, four layers). For each the gradients
of all parameters, their distance (of the norm, over the norm), the time and the peak memory of either way: of
the process, and of the tensors in it, which does not depend on how the allocator takes memory back.
"""

from __future__ import annotations

import torch

from benchmarks.measure import MIB, Machine, Options, Row, in_turn, peak_of, report
from xclip_lab import Batch, create_model
from xclip_lab.cached import cached_loss
from xclip_lab.config import config_from_dict
from xclip_lab.live_bytes import LiveBytes

TOWERS = {"embed_dim": 128, "text_width": 128, "text_heads": 2, "text_layers": 4, "vocab_size": 1000}
TOWERS |= {"vision_width": 128, "vision_heads": 2, "vision_layers": 4, "image_size": 32, "patch_size": 8}
FAMILIES = {
    "CLIP4Clip": ("seqTransf", {"name": "clip4clip"}),
    "X-CLIP": ("seqTransf", {"name": "xclip"}),
    "CLIP2Video": ("tdb", {"name": "clip2video"}),
    "GLSCL": ("seqTransf", {"name": "glscl"}),
}


def main() -> None:
    arguments = Options(__doc__, batch=300, chunk=10).parse_args()
    batch, rows = batch_of(arguments.batch), []
    for name, (agg_module, head) in FAMILIES.items():
        torch.manual_seed(0)
        towers = {"name": None, "pretrained": None, "architecture": TOWERS}
        temporal = {"agg_module": agg_module}
        model = create_model(config_from_dict({"towers": towers, "temporal": temporal, "head": head})).eval()
        ways = {
            "cached": lambda model=model: cached_loss(model, batch, arguments.chunk)["loss"].backward(),
            "whole": lambda model=model: model.loss(batch)["loss"].backward(),
        }
        model.loss(batch_of(2))["loss"].backward()  # what the first pass of all sets up counts for neither
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


def batch_of(pairs: int) -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(1, 998, (pairs, 32))
    ids[:, -1] = 999
    video = torch.randint(0, 256, (pairs, 12, 3, 32, 32), dtype=torch.uint8)
    return Batch(ids, torch.ones_like(ids), video, torch.ones(pairs, 12, dtype=torch.int64))


if __name__ == "__main__":
    main()
