"""From tokens and pixels to metrics: the matrices and numbers of the official `eval_epoch`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from tests.parity.families import logits_tolerance, official_model
from tests.parity.golden import Golden
from tests.parity.test_metrics import agree
from tests.shared import golden_path, golden_paths
from xclip_lab.evaluation import score
from xclip_lab.metrics import ranks, retrieval_metrics
from xclip_lab.model import RetrievalModel, evaluating
from xclip_lab.tokens import TokenSet


class Call(NamedTuple):
    """What the official code called, the matrix that it handed over, what came back."""

    function: str
    handed: np.ndarray
    result: dict


class Pipeline:
    """A case of `evalpipe_<family>.npz`."""

    def __init__(self, golden: Golden, case: str) -> None:
        self.golden, self.case = golden, case

    def __str__(self) -> str:
        return f"{self.weights.meta['model']}-{self.case}"

    @property
    def weights(self) -> Golden:
        return Golden(golden_path(self.golden.meta["weights"][self.case])).variant(None)

    @property
    def tolerance(self) -> dict[str, float]:
        return logits_tolerance(self.weights)

    def calls(self, kind: str) -> list[Call]:
        """In the order in which they were made."""
        results = self.golden.meta["results"].get(f"{self.case}/{kind}", [])
        return [
            Call(
                result["fn"],
                self.golden.arrays[f"out/{self.case}/{kind}/call{number}_{result['fn']}_input"],
                result["result"],
            )
            for number, result in enumerate(results)
            if "fn" in result
        ]

    def similarity(self, model: RetrievalModel, kind: str, block_size: int) -> np.ndarray:
        batch, size = self.golden.batch(kind), self.golden.meta["batch_size_val"]
        texts = zip(batch.token_ids.split(size), batch.text_mask.split(size), strict=True)
        videos = zip(batch.video.split(size), batch.video_mask.split(size), strict=True)
        with evaluating(model):
            text = TokenSet.cat([model.encode_text(*part) for part in texts])
            video = TokenSet.cat([model.encode_video(*part) for part in videos])
        return score(model, text, video, block_size).numpy()


def pipelines(kind: str, but: str | None = None) -> list[Pipeline]:
    """The cases of which the official code's calls and the weights are at hand, `but` those of one family."""
    found = [
        Pipeline(golden, case)
        for path in golden_paths("evalpipe_*.npz")
        if path.stem != f"evalpipe_{but}"
        for golden in [Golden(path)]
        for case, file in golden.meta["weights"].items()
        if golden_path(file).exists()
    ]
    return [pipeline for pipeline in found if pipeline.calls(kind)]


@pytest.fixture
def model(pipeline):
    return official_model(pipeline.weights)


@pytest.mark.parametrize("pipeline", pipelines("single"), ids=str)
@pytest.mark.parametrize("block_size", [4, 64])
def test_one_sentence_a_video(pipeline, model, block_size):
    ours = pipeline.similarity(model, "single", block_size)
    t2v, v2t = (call for call in pipeline.calls("single") if call.function == "compute_metrics")
    np.testing.assert_allclose(ours, t2v.handed, **pipeline.tolerance)
    np.testing.assert_allclose(ours.T, v2t.handed, **pipeline.tolerance)
    index = np.arange(len(ours))
    found, places = retrieval_metrics(ours, index, "official"), ranks(ours, index, "official")
    for side, official in (("t2v", t2v.result), ("v2t", v2t.result)):
        agree(found[side], official)
        assert (places[side] - 1).tolist() == official["cols"]


@pytest.mark.parametrize("pipeline", pipelines("multi", but="glscl"), ids=str)
@pytest.mark.parametrize("block_size", [3, 64])
def test_several_sentences_a_video(pipeline, model, block_size):
    """Without GLSCL, whose released code takes wrong videos here and then fails (ledger 12)."""
    ours = pipeline.similarity(model, "multi", block_size)
    index = pipeline.golden.arrays["in/multi/video_of_sentence"]
    calls = {call.function: call for call in pipeline.calls("multi")}
    t2v, v2t = calls["tensor_text_to_video_metrics"], calls["compute_metrics"]
    rows = t2v.handed.reshape(-1, t2v.handed.shape[-1])  # [video, its captions padded by -inf, gallery]
    np.testing.assert_allclose(ours, rows[np.isfinite(rows).all(axis=1)], **pipeline.tolerance)
    best = np.stack([ours[index == video].max(axis=0) for video in range(len(t2v.handed))])
    np.testing.assert_allclose(best.T, v2t.handed, **pipeline.tolerance)
    found, places = retrieval_metrics(ours, index, "official"), ranks(ours, index, "official")
    agree(found["t2v"], t2v.result)
    agree(found["v2t"], v2t.result)
    assert places["t2v"].std() == pytest.approx(t2v.result["Std_Rank"])
    assert (places["v2t"] - 1).tolist() == v2t.result["cols"]
