"""X-CLIP's scores of a whole gallery, against the way of the official evaluation.

    xclip-lab bench scores [--size 1000] [--large 4000] [--repeats 3]

Random features at the papers' sizes (width 512, 32 words, 12 frames), random mixing matrices near the
identity. The naive way is the official loop: blocks of 32 texts and 32 videos in the shape of the released
module, and in every block the temporal transformer once more. Ours encodes each video once. The floor is all
products, and one exponential for each word and frame of a pair, at this machine's own rates.
"""

from __future__ import annotations

import time

import torch

from benchmarks.measure import Machine, Options, Row, in_turn, peak_of, report
from benchmarks.official import official_scores
from xclip_lab.config import model_config_from_dict
from xclip_lab.cost import random_features, scoring_cost
from xclip_lab.evaluation import score
from xclip_lab.metrics import ranks
from xclip_lab.model import RetrievalModel, create_model, evaluating
from xclip_lab.tokens import TokenSet

TOWERS = {"embed_dim": 512, "text_width": 512, "text_heads": 8, "text_layers": 1, "vocab_size": 64}
TOWERS |= {"vision_width": 64, "vision_heads": 1, "vision_layers": 1, "image_size": 32}
OFFICIAL_BLOCK = 32


def main() -> None:
    arguments = Options(__doc__, size=1000, large=4000, repeats=3).parse_args()
    size = arguments.size
    machine = Machine.measured()
    model = xclip_model()
    text, frames, mask = related_features(model, size)

    def ours() -> torch.Tensor:
        return score(model, text, encode(model, frames, mask))

    encoded = encode(model, frames, mask)
    peak = peak_of(lambda: score(model, text, encoded))
    peak_in_all = peak_of(ours)
    seconds = in_turn(
        {
            "official": lambda: official_way(model, text, frames, mask),
            "given": lambda: score(model, text, encoded),
            "all": ours,
        },
        arguments.repeats,
    )
    cost, exponentials = scoring_cost(model), size * size * 32 * 12 / machine.exponential
    pairs = 2 * cost.pair * size**2 / machine.product + exponentials
    whole = 2e9 * cost.gmac(size, size) / machine.product + exponentials
    name = f"{size:,} x {size:,}"
    rows = [
        Row(f"{name}, videos encoded", seconds["given"], seconds["official"], pairs, peak, 18.0),
        Row(
            f"{name}, with the temporal transformer",
            seconds["all"],
            seconds["official"],
            whole,
            peak_in_all,
            12.0,
        ),
    ]
    rows.append(large(model, arguments.large, size, seconds["given"]))
    report("scores", "X-CLIP's scores of a gallery", machine, rows)
    compare(official_way(model, text, frames, mask), ours())


def xclip_model() -> RetrievalModel:
    """X-CLIP at the papers' sizes on towers of no meaning, its matrices a little off the identity."""
    torch.manual_seed(0)
    towers = {"name": None, "pretrained": None, "architecture": TOWERS}
    model = create_model(model_config_from_dict({"towers": towers, "head": {"name": "xclip"}})).eval()
    with torch.no_grad():
        for matrix in model.head.parameters():
            matrix += 0.02 * torch.randn_like(matrix) / len(matrix) ** 0.5
        model.clip.logit_scale.fill_(100.0).log_()
    return model


def related_features(model: RetrievalModel, size: int) -> tuple[TokenSet, torch.Tensor, torch.Tensor]:
    """Texts that speak of their own video: words are noisy frames."""
    text, frames, mask = random_features(model, size, size)
    words = 0.3 * frames[:, torch.arange(32) % 12] + text.tokens
    return TokenSet(words.mean(1), words, text.mask), frames, mask


def encode(model: RetrievalModel, frames: torch.Tensor, mask: torch.Tensor) -> TokenSet:
    with evaluating(model):
        parts = [
            model.encode_video(frames[at : at + 64], mask[at : at + 64]) for at in range(0, len(frames), 64)
        ]
    return TokenSet.cat(parts)


def official_way(
    model: RetrievalModel, text: TokenSet, frames: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Blocks in two loops, everything of a video made again for each block of texts."""
    scores, step = torch.empty(len(text), len(frames)), OFFICIAL_BLOCK
    with evaluating(model):
        for top in range(0, len(text), step):
            for left in range(0, len(frames), step):
                rows, columns = slice(top, top + step), slice(left, left + step)
                video = model.encode_video(frames[columns], mask[columns])
                scores[rows, columns] = official_scores(model.head, text[rows], video)
    return scores * model.logit_scale.exp().item()


def large(model: RetrievalModel, size: int, small: int, seconds_of_small: float) -> Row:
    """A larger gallery, once: the time should grow as the pairs do, the memory not at all."""
    text, frames, mask = related_features(model, size)
    encoded, out = encode(model, frames, mask), torch.zeros(size, size)
    began = time.perf_counter()
    peak = peak_of(lambda: score(model, text, encoded, out=out))
    seconds = time.perf_counter() - began
    growth = seconds / seconds_of_small / (size / small) ** 2
    return Row(
        f"{size:,} x {size:,}, videos encoded",
        seconds,
        peak=peak,
        note=f"{growth:.2f} of the time a pair took in the smaller one",
    )


def compare(official: torch.Tensor, ours: torch.Tensor) -> None:
    """Say how far the two results lie apart."""
    truth = torch.arange(len(ours)).numpy()
    same = all(
        (a == b).all()
        for a, b in zip(ranks(official, truth).values(), ranks(ours, truth).values(), strict=True)
    )
    apart = (official - ours).abs().max()
    print(
        f"largest difference {apart:.1e} logit at scale 100; ranks {'the same' if same else 'NOT the same'}"
    )


if __name__ == "__main__":
    main()
