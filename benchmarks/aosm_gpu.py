"""AOSM's Triton kernels on a GPU: time, peak memory and error against the formula on the same GPU.

    xclip-lab bench aosm_gpu [--tiles]

Random features of X-CLIP's sizes (width 512, 32 words, 12 frames) in float16, with learned matrices near the
identity and with the identity itself. The formula runs in float32 on the same numbers, in blocks of texts
that fit; of the largest size it scores a sample. Errors are in logits: of the similarity at scale 100.
`--tiles` tries other tiles.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import Options
from xclip_lab.aosm import formula, kernels
from xclip_lab.aosm.kernels import FORWARD, Tile, matrix_aosm
from xclip_lab.aosm.matrices import Matrices
from xclip_lab.errors import UserError

WORDS, FRAMES, WIDTH, TAU, SCALE = 32, 12, 512, 0.01, 100
SIZES = {"1,000 x 1,000": (1000, 1000, 1.5), "MSR-VTT full, 59,800 x 2,990": (59_800, 2_990, 270)}
BATCH, SAMPLE = 300, 256
TILES = [
    Tile(rows, columns, 64, warps, stages, twice)
    for rows, columns, warps in ((64, 64, 4), (128, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8))
    for stages in (2, 3, 4)
    for twice in (False, True)
]


def main() -> None:
    parser = Options(__doc__)
    parser.add_argument("--tiles", action="store_true", help="time 1,000 x 1,000 with other tiles")
    arguments = parser.parse_args()
    reason = kernels.available("cuda" if torch.cuda.is_available() else "cpu", torch.float16, WORDS, FRAMES)
    if reason or not torch.cuda.is_available():
        raise UserError(f"aosm_gpu: not run, {reason or 'there is no GPU here'}")
    rate = product_rate()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"{rate / 1e12:.0f} TFLOP/s in float16; medians"
    )
    for general in (False, True):
        matrices = near_identity(general)
        print("learned matrices" if general else "identity matrices")
        if arguments.tiles:
            tiles(matrices)
            continue
        for name, (texts, videos, goal) in SIZES.items():
            scoring(name, features(texts, WORDS), features(videos, FRAMES), matrices, goal, rate)
        training(matrices)


def product_rate() -> float:
    """FLOP/s of a large product of float16: what the floor is reckoned with."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    return 2 * 8192**3 / (measured(lambda: left @ right)[0] / 1e3)


def features(count: int, length: int) -> Tensor:
    torch.manual_seed(length)
    return normalize(torch.randn(count, length, WIDTH, device="cuda", dtype=torch.float16), dim=-1)


def near_identity(general: bool) -> Matrices:
    torch.manual_seed(0)
    sizes = (WORDS, FRAMES, WORDS, FRAMES)
    return Matrices(*(torch.eye(n).add(torch.randn(n, n), alpha=0.02 * general).cuda() for n in sizes))


def in_blocks(words: Tensor, frames: Tensor, matrices: Matrices, block: int = 50) -> Tensor:
    return torch.cat([formula.matrix_aosm(part, frames, matrices, TAU) for part in words.split(block)])


@torch.no_grad()
def scoring(name: str, words: Tensor, frames: Tensor, matrices: Matrices, goal: float, rate: float) -> None:
    ours, memory, scores = measured(lambda: matrix_aosm(words, frames, matrices, TAU))
    few_words, few_frames = words[:1000].float(), frames[:1000].float()
    eager, eager_memory, expected = measured(lambda: in_blocks(few_words, few_frames, matrices), rounds=3)
    share = words.shape[0] * frames.shape[0] / expected.numel()
    error = SCALE * (scores[:1000, :1000] - expected).abs().max().item()
    in_double = Matrices(*(matrix.double() for matrix in matrices))
    exact = in_blocks(few_words[:SAMPLE].double(), few_frames[:SAMPLE].double(), in_double)
    exact_error = SCALE * (scores[:SAMPLE, :SAMPLE] - exact).abs().max().item()
    floor = 2e3 * words.shape[0] * frames.shape[0] * WORDS * FRAMES * WIDTH / rate
    scaled = "" if share == 1 else f" (1,000 x 1,000 times {share:.0f})"
    print(
        f"  {name}: {ours:.3g} ms (goal {goal} ms, product alone {floor:.3g} ms), {memory:.0f} MB above "
        f"features and result; formula "
        f"{eager * share:.4g} ms{scaled}, {eager_memory:.0f} MB; {error:.1e} logits from it, "
        f"{exact_error:.1e} from it in float64 ({SAMPLE} x {SAMPLE})"
    )


def training(matrices: Matrices) -> None:
    leaves = [features(BATCH, WORDS), features(BATCH, FRAMES), *matrices]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    weights = torch.randn(BATCH, BATCH, device="cuda")

    def step(score: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            (score(leaves[0], leaves[1], Matrices(*leaves[2:])) * weights).sum(), leaves
        )

    ours, memory, made = measured(lambda: step(lambda w, f, m: matrix_aosm(w, f, m, TAU)))
    eager, eager_memory, expected = measured(
        lambda: step(lambda w, f, m: formula.matrix_aosm(w.float(), f.float(), m, TAU)), rounds=3
    )
    error = max(
        ((x - y).float().norm() / y.float().norm()).item() for x, y in zip(made, expected, strict=True)
    )
    print(
        f"  forward and backward, batch {BATCH}: {ours:.3g} ms, {memory:.0f} MB; formula {eager:.4g} ms, "
        f"{eager_memory:.0f} MB; gradients differ by {error:.1e} of their norm at most"
    )


@torch.no_grad()
def tiles(matrices: Matrices) -> None:
    words, frames = features(1000, WORDS), features(1000, FRAMES)
    for tile in TILES:
        FORWARD[torch.float16] = tile
        try:
            print(f"  {measured(lambda: matrix_aosm(words, frames, matrices, TAU))[0]:.3g} ms with {tile}")
        except Exception as error:  # more registers or shared memory than the GPU has
            print(f"  does not fit: {tile} ({type(error).__name__})")


def measured(function: Callable, rounds: int = 10):
    """Milliseconds (the median), peak MB above what stands before and what it returns, and the result."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - max(before, torch.cuda.memory_allocated())
    taken = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        function()
        ended.record()
        torch.cuda.synchronize()
        taken.append(began.elapsed_time(ended))
    return statistics.median(taken), peak / 2**20, result


if __name__ == "__main__":
    main()
