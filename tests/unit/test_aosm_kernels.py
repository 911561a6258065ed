"""The Triton kernels equal the formula: aosm_kernel_cases.py, through the interpreter and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xclip_lab.aosm import kernels
from xclip_lab.aosm.matrices import Matrices
from xclip_lab.errors import ConfigError

CASES = Path(__file__).with_name("aosm_kernel_cases.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton here: torch brings it on Linux only"
)


# Triton looks at TRITON_INTERPRET when it is imported, and torch may import it at any time: in a process that
# other tests share it would come too late, or turn their kernels, torch.compile's too, into interpreted ones.
@needs_triton
@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["interpreter", "gpu"])
def test_kernels_equal_the_formula(interpreted):
    if interpreted == "0" and (reason := kernels.available("cuda" if torch.cuda.is_available() else "cpu")):
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", str(CASES)]
    ended = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may have
FP16, FP32 = torch.float16, torch.float32
COMPILED = [  # capability, precision, words, frames, are there masks, do matrices mix the words, the frames
    (80, FP16, 32, 12, True, True, True),
    (80, FP32, 32, 12, False, False, False),
    (86, FP32, 32, 12, True, True, True),
    (89, FP16, 32, 12, False, False, True),
    (90, FP16, 32, 12, False, False, False),
    (90, FP16, 32, 12, True, True, True),
    (90, FP32, 32, 12, False, True, True),
    (90, FP16, 77, 64, True, True, True),
    (90, FP16, 77, 1, True, True, False),
    (100, FP16, 32, 12, False, True, True),
    (120, FP32, 32, 12, False, True, True),
]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_compiler_takes_them(name, case):
    """What the interpreter takes, the compiler need not; it needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from xclip_lab.aosm import programs

    capability, dtype, words, frames, masked, *mixes = case
    table = kernels.FORWARD if name == "forward" else kernels.BACKWARD
    tile = kernels.SMALL if SHARED[capability] < 200 else table[dtype]
    plan = kernels._Plan.cut(tile, words, frames, 512, *mixes)
    constants = {**plan.constants, "TWICE": plan.tile.twice} if name == "forward" else {**plan.constants}
    if not masked:
        constants |= {"word_mask": None, "frame_mask": None}
    if not any(mixes) and name == "backward":
        constants |= {"tiles": None, "of_words": None, "of_frames": None}
    features = {FP16: "*fp16", FP32: "*fp32"}[dtype]
    types = {"words": features, "frames": features, "word_mask": "*i8", "frame_mask": "*i8"}
    types |= {"texts": "i32", "videos": "i32", "k": "fp32", "scale": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    program = getattr(programs, name)
    signature = {argument: types.get(argument, "*fp32") for argument in program.arg_names}
    read = [argument for argument in ("words", "frames", "out") if argument in program.arg_names]
    aligned = {(program.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in read}
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(program, signature, constants, aligned)  # as tensors are: loads go ahead in steps
    made = triton.compile(source, target=target, options=options)
    assert made.metadata.shared <= SHARED[capability] * 1024


@needs_triton
def test_no_gpu_is_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    one = torch.ones(1, 1)
    with pytest.raises(ConfigError, match="need an NVIDIA GPU, and the device is cpu; use another backend"):
        kernels.matrix_aosm(one[None], one[None], Matrices(one, one, one, one), 0.01)


@needs_triton
def test_an_old_gpu_is_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "capability 8.0 (A100 and later), and Tesla T4 has 7.5" in kernels.available("cuda:0")


def test_no_triton_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton, which is not installed" in kernels.available("cuda:0")
