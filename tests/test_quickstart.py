"""The quickstart as a newcomer runs it, in full: what it promises is what it prints and saves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import pytest

from xclip_lab.metrics import METRICS
from xclip_lab.result import Result


@pytest.mark.slow
def test_quickstart_finds_the_clips_and_points_at_the_truth(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "xclip_lab", "quickstart", "--run-dir", str(run_dir)]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--data.root", str(tmp_path / "clips")], cwd=tmp_path, capture_output=True, text=True
    )
    print(f"quickstart took {time.monotonic() - began:.0f} s\n{done.stdout}")
    assert done.returncode == 0, done.stderr

    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert {side: list(values) for side, values in metrics.items()} == {
        "t2v": list(METRICS),
        "v2t": list(METRICS),
    }
    assert all(math.isfinite(value) for values in metrics.values() for value in values.values())
    assert metrics["t2v"]["R@1"] >= 70
    assert f"R@1  {metrics['t2v']['R@1']:8.2f}" in done.stdout
    result = Result.load(run_dir)
    assert len(result.videos) == 200
    assert result.stamp["intervals"] == {"draws": 1000, "clusters": "pair"}
    assert sum(result.stamp["decoders"].values()) == 200

    verdicts = {
        name: line
        for line in done.stdout.splitlines()
        for name in ("trained ", "frames shuffled ", "untrained ", "shuffled truth ")
        if line.startswith(name) and "of the attention inside" in line
    }
    assert len(verdicts) == 4
    assert verdicts["trained "].endswith(": points at the truth")
    assert verdicts["frames shuffled "].endswith(": points at the truth")
    assert verdicts["untrained "].endswith(": does not point at the truth")
    assert verdicts["shuffled truth "].endswith(": does not point at the truth")

    for name in ("clips", "training", "ranks", "levels", "pointing", "aosm"):
        for suffix in ("pdf", "png"):
            assert (run_dir / "figures" / f"{name}.{suffix}").stat().st_size > 1000
    assert (run_dir / "00_quickstart.ipynb").is_file()
