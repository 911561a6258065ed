"""From tokens and pixels to metrics: the matrices and numbers of the official `eval_epoch`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.parity.test_metrics import agree
from tests.shared import golden_path, needs_golden
from xclip_lab.checkpoint import load_official
from xclip_lab.evaluation import score
from xclip_lab.metrics import ranks, retrieval_metrics

pytestmark = needs_golden("evalpipe_xclip.npz")


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(golden_path(name), allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def cases() -> Iterator[str]:
    if golden_path("evalpipe_xclip.npz").exists():
        yield from json.loads(str(arrays("evalpipe_xclip.npz")["meta"]))["weights"]


@pytest.fixture(scope="module", params=list(cases()))
def agg_module(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return arrays("evalpipe_xclip.npz")


@pytest.fixture(scope="module")
def meta(golden) -> dict:
    return json.loads(str(golden["meta"]))


@pytest.fixture(scope="module")
def model(agg_module, meta):
    weights = arrays(meta["weights"][agg_module])
    state = {
        key.removeprefix("sd/"): torch.tensor(value) for key, value in weights.items() if key[:3] == "sd/"
    }
    return load_official(state, "xclip", agg_module=agg_module)


def similarity(model, golden: dict[str, np.ndarray], kind: str, block_size: int) -> np.ndarray:
    inputs = {key: torch.tensor(value) for key, value in golden.items() if key.startswith(f"in/{kind}/")}
    with torch.no_grad():
        text = model.encode_text(inputs[f"in/{kind}/input_ids"], inputs[f"in/{kind}/attention_mask"])
        video = model.encode_video(inputs[f"in/{kind}/video"], inputs[f"in/{kind}/video_mask"])
    return score(model, text, video, block_size).numpy()


def calls(
    golden: dict[str, np.ndarray], meta: dict, agg_module: str, kind: str
) -> list[tuple[str, np.ndarray, dict]]:
    """What the official code called: function, the matrix handed to it, what it returned."""
    found = []
    for number, result in enumerate(meta["results"][f"{agg_module}/{kind}"]):
        if "fn" in result:
            handed = golden[f"out/{agg_module}/{kind}/call{number}_{result['fn']}_input"]
            found.append((result["fn"], handed, result["result"]))
    return found


@pytest.mark.parametrize("block_size", [4, 64])
def test_one_sentence_a_video(model, golden, meta, agg_module, block_size):
    ours = similarity(model, golden, "single", block_size)
    (_, t2v_handed, t2v), (_, v2t_handed, v2t) = calls(golden, meta, agg_module, "single")
    np.testing.assert_allclose(ours, t2v_handed, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours.T, v2t_handed, atol=1e-4, rtol=1e-4)
    index = np.arange(len(ours))
    found, places = retrieval_metrics(ours, index, "official"), ranks(ours, index, "official")
    for side, official in (("t2v", t2v), ("v2t", v2t)):
        agree(found[side], official)
        assert (places[side] - 1).tolist() == official["cols"]


@pytest.mark.parametrize("block_size", [3, 64])
def test_several_sentences_a_video(model, golden, meta, agg_module, block_size):
    ours = similarity(model, golden, "multi", block_size)
    index = golden["in/multi/video_of_sentence"]
    (_, padded, t2v), _, (_, v2t_handed, v2t) = calls(golden, meta, agg_module, "multi")
    rows = padded.reshape(-1, padded.shape[-1])  # [video, its captions padded by -inf, gallery]
    np.testing.assert_allclose(ours, rows[np.isfinite(rows).all(axis=1)], atol=1e-4, rtol=1e-4)
    best = np.stack([ours[index == video].max(axis=0) for video in range(len(padded))])
    np.testing.assert_allclose(best.T, v2t_handed, atol=1e-4, rtol=1e-4)
    found, places = retrieval_metrics(ours, index, "official"), ranks(ours, index, "official")
    agree(found["t2v"], t2v)
    agree(found["v2t"], v2t)
    assert places["t2v"].std() == pytest.approx(t2v["Std_Rank"])
    assert (places["v2t"] - 1).tolist() == v2t["cols"]
