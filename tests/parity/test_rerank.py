"""QB-Norm gives the numbers of the official code."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.shared import golden_path, needs_golden
from xclip_lab.rerank import qb_norm

pytestmark = [needs_golden("metrics.json"), needs_golden("metrics.npz")]


def cases() -> dict[str, dict]:
    path = golden_path("metrics.json")
    return json.loads(path.read_text())["qb_norm"] if path.exists() else {}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(golden_path("metrics.npz"), allow_pickle=False) as stored:
        return {key.removeprefix("qb/"): stored[key] for key in stored.files if key.startswith("qb/")}


def test_no_result_is_left_out(arrays):
    assert {f"{name}/result" for name in cases()} == set(arrays) - {"train_test", "test_test"}


@pytest.mark.parametrize("name", cases())
def test_qb_norm(name, arrays):
    """The rows that were normalised are the official ones, and so is every number."""
    case, similarity = cases()[name], arrays["test_test"]
    parameters = {key: case[key] for key in ("beta", "k", "theta")}
    found = qb_norm(similarity, arrays["train_test"], **parameters)
    np.testing.assert_allclose(found, arrays[f"{name}/result"], rtol=1e-5)
    normalised = np.flatnonzero((found != similarity).any(axis=1))
    assert normalised.tolist() == case["rows_normalised"][0]
