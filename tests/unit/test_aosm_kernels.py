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


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_compiler_takes_them(name, capability):
    """What the interpreter takes, the compiler need not; it needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from xclip_lab.aosm import programs

    tile = (kernels.FORWARD if name == "forward" else kernels.BACKWARD)[torch.float16]
    constants = kernels._Plan.of(tile, torch.empty(1, 32, 512), torch.empty(1, 12, 512), True, True).constants
    types = {"words": "*fp16", "frames": "*fp16", "word_mask": "*i8", "frame_mask": "*i8", "texts": "i32"}
    types |= {"videos": "i32", "k": "fp32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    program = getattr(programs, name)
    signature = {argument: types.get(argument, "*fp32") for argument in program.arg_names}
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(ASTSource(program, signature, constants), target=target, options=options)
    assert made.metadata.shared <= {80: 163, 90: 227}[capability] * 1024


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
