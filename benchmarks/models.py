"""The papers' sizes, and what is measured at them: models on towers of no meaning, random inputs."""

from __future__ import annotations

import torch

from xclip_lab import Batch, create_model
from xclip_lab.config import RunConfig, config_from_dict
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.tokens import TokenSet

WORDS, FRAMES, WIDTH, SIDE = 32, 12, 512, 224
TOWERS = {"embed_dim": WIDTH, "text_width": WIDTH, "text_heads": 8, "text_layers": 1, "vocab_size": 64}
TOWERS |= {"vision_width": 64, "vision_heads": 1, "vision_layers": 1, "image_size": 32}


def config_of(head: str, agg_module: str = "seqTransf", **sizes: int) -> RunConfig:
    """A method on towers of the papers' width, else as small as they may be; `sizes` changes them."""
    towers = {"name": None, "pretrained": None, "architecture": TOWERS | sizes}
    return config_from_dict(
        {"towers": towers, "temporal": {"agg_module": agg_module}, "head": {"name": head}}
    )


def model_of(head: str, agg_module: str = "seqTransf", **sizes: int) -> RetrievalModel:
    """That method with the weights of seed 0, to be evaluated."""
    torch.manual_seed(0)
    return create_model(config_of(head, agg_module, **sizes)).eval()


def xclip_model() -> RetrievalModel:
    """X-CLIP, its matrices a little off the identity, at CLIP's scale of 100."""
    model = model_of("xclip")
    with torch.no_grad():
        for matrix in model.head.parameters():
            matrix += 0.02 * torch.randn_like(matrix) / len(matrix) ** 0.5
        model.clip.logit_scale.fill_(100.0).log_()
    return model


def batch_of(pairs: int, vocabulary: int, side: int) -> Batch:
    """Random captions and videos of `side` x `side` pixels, without padding."""
    torch.manual_seed(0)
    ids = torch.randint(1, vocabulary - 2, (pairs, WORDS))
    ids[:, -1] = vocabulary - 1
    video = torch.randint(0, 256, (pairs, FRAMES, 3, side, side), dtype=torch.uint8)
    return Batch(ids, torch.ones_like(ids), video, torch.ones(pairs, FRAMES, dtype=torch.int64))


def words_of(frames: torch.Tensor, share: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """`[N, W, D]`, words that speak of their own video: `share` of its frames `[N, F, D]`, under noise."""
    own = frames[:, torch.arange(WORDS) % FRAMES]
    return share * own + torch.randn(own.shape, generator=generator)


def related_features(size: int) -> tuple[TokenSet, torch.Tensor, torch.Tensor]:
    """As many texts as videos, each of its own video: texts, frames `[V, F, D]` and their mask."""
    frames, ones = torch.randn(size, FRAMES, WIDTH), torch.ones(size, WORDS, dtype=torch.int64)
    words = words_of(frames, 0.3)
    return TokenSet(words.mean(1), words, ones), frames, ones[:, :FRAMES]


def encode(model: RetrievalModel, frames: torch.Tensor, mask: torch.Tensor) -> TokenSet:
    """The videos as the head takes them, 64 at a time."""
    with evaluating(model):
        parts = zip(frames.split(64), mask.split(64), strict=True)
        return TokenSet.cat([model.encode_video(*part) for part in parts])
