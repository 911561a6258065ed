"""The `official` tie policy gives the numbers of the official code."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.shared import golden_path, needs_golden
from xclip_lab.metrics import MetricError, ranks, retrieval_metrics

pytestmark = [needs_golden("metrics.json"), needs_golden("metrics.npz")]
OURS = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "R50": "R@50", "MR": "MdR", "MedianR": "MdR", "MeanR": "MnR"}
REPOSITORIES = ("clip4clip", "xclip", "clip2video", "glscl")


def golden(kind: str) -> dict:
    path = golden_path("metrics.json")
    return json.loads(path.read_text())[kind] if path.exists() else {}


def matrix(name: str) -> np.ndarray:
    with np.load(golden_path("metrics.npz"), allow_pickle=False) as arrays:
        return arrays[name]


def agree(found: dict[str, float], official: dict) -> None:
    """R@k of several captions is float32 in the official code: eight digits at most."""
    for theirs, ours in OURS.items():
        if theirs in official:
            assert found[ours] == pytest.approx(official[theirs], rel=1e-6), theirs


def single_cases() -> list[tuple[str, str]]:
    """Without GLSCL on float64, where the official code divides by zero and there is no number to meet."""
    cases = golden("single")
    pairs = [(name, repository) for name in cases for repository in REPOSITORIES]
    return [(name, repository) for name, repository in pairs if has_numbers(cases[name][repository])]


def has_numbers(results: dict) -> bool:
    return all(isinstance(result, dict) for result in results.values())


@pytest.mark.parametrize(("name", "repository"), single_cases())
def test_one_caption_a_video(name, repository):
    official = golden("single")[name][repository]
    scores, index = matrix(name), np.arange(len(matrix(name)))
    if np.isnan(scores).any():
        row, column = np.argwhere(np.isnan(scores))[0]
        with pytest.raises(MetricError, match=f"row {row}, column {column}"):
            retrieval_metrics(scores, index, "official")
        return
    found, places = retrieval_metrics(scores, index, "official"), ranks(scores, index, "official")
    for side in ("t2v", "v2t"):
        agree(found[side], official[side])
        assert (places[side] - 1).tolist() == official[side]["cols"]


@pytest.mark.parametrize("repository", REPOSITORIES)
@pytest.mark.parametrize("name", golden("multi"))
def test_several_captions_a_video(name, repository):
    case = golden("multi")[name]
    index = np.repeat(np.arange(len(case["counts"])), case["counts"])
    found, places = retrieval_metrics(matrix(name), index, "official"), ranks(matrix(name), index, "official")
    for side in ("t2v", "v2t"):
        agree(found[side], case[repository][side])
    assert places["t2v"].std() == pytest.approx(case[repository]["t2v"]["Std_Rank"])
    assert (places["v2t"] - 1).tolist() == case[repository]["v2t"]["cols"]


@pytest.mark.parametrize("name", golden("multi"))
def test_the_padded_official_form_is_the_same_problem(name):
    """Official `[V, captions padded by -inf, V]`: unpadded, and best caption a video, it is what we rank."""
    padded, case = matrix(f"{name}/padded"), golden("multi")[name]
    rows = padded.reshape(-1, padded.shape[-1])
    np.testing.assert_array_equal(rows[np.isfinite(rows).all(axis=1)], matrix(name))
    best = matrix(f"{name}/v2t_sim")  # [video, video whose captions compete]
    index = np.repeat(np.arange(len(case["counts"])), case["counts"])
    through_best = ranks(best, np.arange(len(best)), "official")["t2v"]
    assert ranks(matrix(name), index, "official")["v2t"].tolist() == through_best.tolist()
