"""AOSM's Triton kernels on a GPU: time, peak memory and error against the formula on the same GPU.

    xclip-lab bench aosm_gpu [--tiles]

Random features of X-CLIP's sizes (width 512, 32 words, 12 frames) in float16, with learned matrices near the
identity and with the identity itself. The formula runs in float32 on the same numbers, in blocks of texts
that fit; of the largest size it scores a sample. Peak memory is above features and result, the floor the
product alone at the GPU's rate. Errors are in logits, at scale 100. `--tiles` tries other tiles.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import MIB, Options, Row, report
from benchmarks.models import FRAMES, WIDTH, WORDS
from xclip_lab.aosm import formula, kernels
from xclip_lab.aosm.kernels import FORWARD, Tile, matrix_aosm
from xclip_lab.aosm.matrices import Matrices
from xclip_lab.errors import UserError

TAU, SCALE = 0.01, 100
SIZES = {(1000, 1000): "1.5 ms", (59_800, 2_990): "270 ms, MSR-VTT full"}  # texts, videos: the goal
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
    gpu, rows = Gpu.measured(), []
    for general in (False, True):
        matrices, kind = near_identity(general), "learned" if general else "identity"
        if arguments.tiles:
            print(f"{gpu}; {kind} matrices")
            tiles(matrices)
            continue
        for (texts, videos), goal in SIZES.items():
            name, some = f"{texts:,} x {videos:,}, {kind}", (features(texts, WORDS), features(videos, FRAMES))
            rows.append(scoring(name, *some, matrices, goal, gpu.product))
        rows.append(training(f"forward and backward, batch {BATCH}, {kind}", matrices))
    if rows:
        report("aosm_gpu", "AOSM by the Triton kernels", gpu, rows)


@dataclass(frozen=True)
class Gpu:
    """The GPU, and its FLOP/s in a large product of float16: what the floor is reckoned with."""

    processor: str
    torch: str
    product: float

    @classmethod
    def measured(cls) -> Gpu:
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
        seconds = timed(lambda: left @ right)[0]
        return cls(torch.cuda.get_device_name(), torch.__version__, 2 * 8192**3 / seconds)

    def __str__(self) -> str:
        return f"{self.processor}, torch {self.torch}\nat most {self.product / 1e12:.0f} TFLOP/s in float16"


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
def scoring(name: str, words: Tensor, frames: Tensor, matrices: Matrices, goal: str, rate: float) -> Row:
    ours, memory, scores = timed(lambda: matrix_aosm(words, frames, matrices, TAU))
    few_words, few_frames = words[:1000].float(), frames[:1000].float()
    eager, eager_memory, expected = timed(lambda: in_blocks(few_words, few_frames, matrices), rounds=3)
    share = words.shape[0] * frames.shape[0] / expected.numel()
    error = SCALE * (scores[:1000, :1000] - expected).abs().max().item()
    in_double = Matrices(*(matrix.double() for matrix in matrices))
    exact = in_blocks(few_words[:SAMPLE].double(), few_frames[:SAMPLE].double(), in_double)
    exact_error = SCALE * (scores[:SAMPLE, :SAMPLE] - exact).abs().max().item()
    floor = 2 * words.shape[0] * frames.shape[0] * WORDS * FRAMES * WIDTH / rate
    scaled = "" if share == 1 else f"1,000 x 1,000 times {share:.0f}, "
    note = (
        f"goal {goal}; formula: {scaled}{eager_memory / MIB:.0f} MiB; {error:.1e} logits from it, "
        f"{exact_error:.1e} from it in float64 ({SAMPLE} x {SAMPLE})"
    )
    return Row(name, ours, eager * share, floor, memory, note=note)


def training(name: str, matrices: Matrices) -> Row:
    """Forward and backward."""
    leaves = [features(BATCH, WORDS), features(BATCH, FRAMES), *matrices]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    weights = torch.randn(BATCH, BATCH, device="cuda")

    def step(score: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            (score(leaves[0], leaves[1], Matrices(*leaves[2:])) * weights).sum(), leaves
        )

    ours, memory, made = timed(lambda: step(lambda w, f, m: matrix_aosm(w, f, m, TAU)))
    eager, eager_memory, expected = timed(
        lambda: step(lambda w, f, m: formula.matrix_aosm(w.float(), f.float(), m, TAU)), rounds=3
    )
    error = max(
        ((x - y).float().norm() / y.float().norm()).item() for x, y in zip(made, expected, strict=True)
    )
    note = f"formula: {eager_memory / MIB:.0f} MiB; gradients differ by {error:.1e} of their norm at most"
    return Row(name, ours, eager, peak=memory, note=note)


@torch.no_grad()
def tiles(matrices: Matrices) -> None:
    words, frames = features(1000, WORDS), features(1000, FRAMES)
    for tile in TILES:
        FORWARD[torch.float16] = tile
        try:
            print(f"  {1e3 * timed(lambda: matrix_aosm(words, frames, matrices, TAU))[0]:.3g} ms with {tile}")
        except Exception as error:  # more registers or shared memory than the GPU has
            print(f"  does not fit: {tile} ({type(error).__name__})")


def timed(function: Callable, rounds: int = 10):
    """Seconds (the median), peak bytes above what stands before and what it returns, and the result."""
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
    return statistics.median(taken) / 1e3, peak, result


if __name__ == "__main__":
    main()
