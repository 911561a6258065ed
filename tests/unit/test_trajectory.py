"""Ten steps of the official recipe are those of a naive one, from the same weights and batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit import naive_clip2video, naive_clip4clip, naive_glscl, naive_recipe
from tests.unit.combinations import settings_of
from tests.unit.tiny import TINY
from xclip_lab import RetrievalModel, Sample, VideoTextDataset, fit, load_config
from xclip_lab.clips import FrameStore
from xclip_lab.model import official_name

LR, COEF_LR, STEPS, WARMUP, BATCH = 1e-3, 0.1, 10, 0.2, 4
OFFICIAL = {key: value for key, value in TINY.items() if "vocab" not in key} | {
    "towers.architecture.quick_gelu": True,
    "towers.architecture.vision_layers": 2,
    "towers.freeze_layer_num": 0,
    "temporal.layers": 2,
    "max_frames": 6,
    "optim": {"recipe": "official", "lr": LR, "coef_lr": COEF_LR, "weight_decay": 0.2},
    "optim.warmup_proportion": WARMUP,
    "train": {"batch_size": BATCH, "epochs": 2, "log_every": 1, "device": "cpu"},
    "data": {"preload": False, "workers": 0, "group_batches": False},
}
LOOSE = {"head.similarity_dense.bias": 1e-4}  # the same in every score: its gradient is rounding, scaled up
TWO_HEADS = {"towers.architecture.embed_dim": 128}
WORDS = ("red", "blue", "green", "circle", "square", "star", "left", "right")


class Recorded(RetrievalModel):
    """Keeps the batches that it was trained on."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.batches: list = []

    def loss(self, batch, *gather):
        self.batches.append(batch)
        return super().loss(batch, *gather)


def pairs() -> tuple[VideoTextDataset, FrameStore]:
    """Captions of one to seven words, videos of three to six frames: with fewer, CLIP2Video has differences
    that attend to padding alone, whose scores -1e6 rounds to 1/16."""
    torch.manual_seed(2)
    captions = [" ".join(WORDS[(row + 3 * place) % 8] for place in range(1 + row % 7)) for row in range(20)]
    clips = {}
    for row in range(20):
        count = 3 + row % 4
        pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        clips[f"v{row}"] = (pixels, torch.arange(float(count)))
    samples = [Sample(f"v{row}", caption) for row, caption in enumerate(captions)]
    return VideoTextDataset("noise", "train", Path("."), samples), FrameStore(clips, {})


def towers(batch, p, mask_words=False):
    mask = batch.text_mask if mask_words else None
    sentences, words = naive_recipe.text_tower(batch.token_ids, p, layers=1, heads=2, mask=mask)
    return sentences, words, naive_recipe.image_tower(batch.video, batch.video_mask, p, layers=2, heads=2)


def tight_loss(batch, p):
    sentences, _, frames = towers(batch, p)
    scores = naive_clip4clip.tight_scores(sentences, frames, batch.video_mask, p, layers=2)
    return naive_recipe.contrastive(scores)  # without CLIP's scale


def xclip_loss(batch, p):
    sentences, words, frames = towers(batch, p)
    videos = naive_recipe.pooled(naive_recipe.seq_transf(frames, batch.video_mask, p, 2), batch.video_mask)
    scores = naive_recipe.xclip_scores(sentences, words, videos, frames, p, tau=0.01)
    return naive_recipe.contrastive(p["clip.logit_scale"].exp() * scores)


def clip2video_loss(batch, p):
    sentences, words, frames = towers(batch, p)
    how = {"kind": "TAB_TDB", "layers": 2, "projection": "sigmoid_selfA", "mixed": True}
    main, tab = naive_clip2video.clip2video_scores(
        sentences, words, batch.text_mask, frames, batch.video_mask, p, **how
    )
    scale = p["clip.logit_scale"].exp()
    return 0.5 * naive_recipe.contrastive(scale * main) + 0.5 * naive_recipe.contrastive(scale * tab)


def glscl_loss(batch, p):
    sentences, words, frames = towers(batch, p, mask_words=True)
    frames = naive_recipe.seq_transf(frames, batch.video_mask, p, 2)
    texts, videos = naive_glscl.queries_of(words, frames, p, 2, query_share=True, cross_att_share=True)
    scores = naive_glscl.global_scores(sentences, frames, batch.video_mask, temp=3.0)
    scores = scores + 0.5 * naive_glscl.local_scores(texts, videos)
    loss = naive_recipe.contrastive(p["clip.logit_scale"].exp() * scores)
    loss = loss + naive_glscl.inter_consistency(texts, videos, beta=0.005)
    return loss + 1e-4 * naive_glscl.intra_diversity(videos)


CASES = {
    "tightTransf": (
        settings_of("tightTransf", "meanP") | TWO_HEADS | {"head.layers": 2, "head.positions": 7},
        tight_loss,
    ),
    "xclip": ({"head": {"name": "xclip", "temperature": 0.01}}, xclip_loss),
    "clip2video": (
        settings_of("clip2video", "tdb") | TWO_HEADS | {"temporal.mixed_head_masks": True},
        clip2video_loss,
    ),
    "glscl": (
        settings_of("glscl", "seqTransf") | {"towers.mask_padded_words": True, "towers.freeze_conv1": True},
        glscl_loss,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_official_steps(name, tmp_path):
    settings, naive_loss = CASES[name]
    config = load_config("quickstart", OFFICIAL | settings)
    dataset, store = pairs()
    torch.manual_seed(0)
    model = Recorded(config.model)
    with torch.no_grad():
        model.logit_scale.fill_(5.0)  # beyond the clamp, which the first step applies
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start = {official_name(key): value.detach().clone() for key, value in model.named_parameters()}
    result = fit(model, config, dataset, tmp_path, store=store, progress=False)

    p = {key: value.requires_grad_(not naive_recipe.frozen(key)) for key, value in start.items()}
    learn = {key: value for key, value in p.items() if value.requires_grad}
    optimizer = naive_recipe.BertAdam(learn, LR, COEF_LR, STEPS, WARMUP)
    losses = []
    for batch in model.batches:
        loss = naive_loss(batch, p)
        gradients = torch.autograd.grad(loss, list(learn.values()), allow_unused=True)
        optimizer.step({key: g for key, g in zip(learn, gradients, strict=True) if g is not None})
        losses.append(loss.item())

    assert [row["loss"] for row in result.history] == pytest.approx(losses, rel=1e-5)
    assert len(losses) == STEPS
    for key, value in model.named_parameters():
        torch.testing.assert_close(
            value, p[official_name(key)], atol=LOOSE.get(key, 2e-6), rtol=0, msg=lambda m, k=key: k + m
        )
