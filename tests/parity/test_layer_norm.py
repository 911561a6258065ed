"""Each LayerNorm has the official epsilon, in every family."""

from __future__ import annotations

import pytest

from tests.parity.families import assert_near, logits_tolerance, official_model
from tests.parity.golden import Golden, keys, model_cases
from xclip_lab.attention import run_with_cache

CASES = [path for path in model_cases() if "out/lneps/logits" in keys(path)]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_layer_norm_epsilon(golden):
    """Weights scaled down until the epsilon shows."""
    scaled = {f"sd/{name}" for name in golden.names("out/lneps/scaled_params")}
    arrays = {key: value * 2**-8 if key in scaled else value for key, value in golden.arrays.items()}
    logits, _ = run_with_cache(official_model(Golden(arrays)), golden.batch("infer"))
    assert_near(logits, golden["out/lneps/logits"], "logits", **logits_tolerance(golden))
