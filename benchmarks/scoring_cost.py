"""What scoring a gallery costs with each method at the papers' sizes: products counted, time measured.

    xclip-lab bench scoring_cost [--size 1000]

From random features of CLIP on (width 512, 32 words, 12 frames): `agg_module` and what a head computes of one
text or video ("items"), and all pairs. "As released" adds to GLSCL what its code computes for every pair and
throws away; it and the cross transformer are timed on a block and scaled, as the row says.
"""

from __future__ import annotations

import os
import time

import torch

from benchmarks.measure import Options
from xclip_lab.config import model_config_from_dict
from xclip_lab.cost import random_features, scoring_cost
from xclip_lab.evaluation import score
from xclip_lab.model import RetrievalModel, create_model, evaluating

TOWERS = {"embed_dim": 512, "text_width": 512, "text_heads": 8, "text_layers": 1, "vocab_size": 64}
TOWERS |= {"vision_width": 64, "vision_heads": 1, "vision_layers": 1, "image_size": 32}
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
    print(f"{size} texts x {size} videos, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'GMAC of':<24}{'items':>9}{'pairs':>10}{'all':>10}{'seconds':>10}")
    for name, (agg_module, head) in METHODS.items():
        model = _model(agg_module, head)
        timed = min(size, PER_PAIR_BLOCK) if head == "tightTransf" else size
        cost, seconds = scoring_cost(model), _seconds(model, timed) * (size / timed) ** 2
        gmac, pairs = cost.gmac(size, size), cost.pair * size * size / 1e9
        note = f"  timed on {timed} x {timed}" if timed < size else ""
        print(f"{name:<24}{gmac - pairs:>9.2f}{pairs:>10.2f}{gmac:>10.2f}{seconds:>10.2f}{note}", flush=True)
        if head == "glscl":
            _thrown_away(model, gmac, pairs, seconds, size)


def _model(agg_module: str, head: str) -> RetrievalModel:
    torch.manual_seed(0)
    towers = {"name": None, "pretrained": None, "architecture": TOWERS}
    config = {"towers": towers, "temporal": {"agg_module": agg_module}, "head": {"name": head}}
    return create_model(model_config_from_dict(config)).eval()


def _seconds(model: RetrievalModel, size: int) -> float:
    """The faster of two passes over all pairs, from frame vectors and words on."""
    text, frames, mask = random_features(model, size, size)
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        with evaluating(model):
            texts = model.head.encode_text(text)
            videos = model.head.encode_video(frames, mask, model.temporal)
        score(model, texts, videos)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _thrown_away(model: RetrievalModel, gmac: float, pairs: float, seconds: float, size: int) -> None:
    """GLSCL with `weight_fc` of every pair's joined vectors, as released."""
    block = min(size, 100)
    joined = torch.randn(block * block, 1024)
    weight_fc = model.head.weight_fc
    began = time.perf_counter()
    with torch.no_grad():
        weight_fc(joined)
    wasted = (time.perf_counter() - began) * (size / block) ** 2
    thrown = size * size * sum(layer.weight.numel() for layer in (weight_fc[0], weight_fc[2])) / 1e9
    row = f"{gmac - pairs:>9.2f}{pairs + thrown:>10.2f}{gmac + thrown:>10.2f}{seconds + wasted:>10.2f}"
    print(f"{'GLSCL as released':<24}{row}  weight_fc timed on {block * block} pairs, computed nowhere else")


if __name__ == "__main__":
    main()
