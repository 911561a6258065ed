"""Figures show what their data say: alignment, sums, marks; and they leave matplotlib's settings alone."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from xclip_lab import plots, text
from xclip_lab.attention import Explanation, explain
from xclip_lab.clips import Clip
from xclip_lab.metrics import rank_entries, retrieval_metrics
from xclip_lab.model import create_model
from xclip_lab.pointing import Pointing
from xclip_lab.result import Result
from xclip_lab.stats import cluster_mean_interval
from xclip_lab.study import configure
from xclip_lab.synthetic import ClipTruth

CAPTION = "a red circle moves left, then a $5 star grows"
FRAMES = 4


def clip(index: int = 0, caption: str = CAPTION, frames: int = FRAMES) -> Clip:
    noise = torch.Generator().manual_seed(index)
    pixels = torch.randint(0, 255, (frames, 3, 32, 32), dtype=torch.uint8, generator=noise)
    return Clip(index, f"v{index}", caption, pixels, torch.arange(float(frames)) / 8 + 0.125)


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    torch.manual_seed(0)
    return explain(create_model(configure("quickstart", {}, smoke=True)), clip())


@pytest.fixture
def truth() -> ClipTruth:
    words = CAPTION.split()
    frames = np.zeros((len(words), 8), dtype=bool)
    frames[1:5, :2] = True
    return ClipTruth(3, 0, words, ["colour"] * len(words), frames, fps=8.0)


def result() -> Result:
    similarity = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    text_to_video = np.array([0, 1, 2, 3, 4, 4])
    return Result(
        scores=similarity,
        text_to_video=text_to_video,
        captions=[CAPTION] * 6,
        videos=[f"v{i}" for i in range(5)],
        rows=np.arange(6),
        clusters=np.arange(5),
        entries=rank_entries(similarity, text_to_video),
        metrics=retrieval_metrics(similarity, text_to_video),
        intervals={},
        stamp={"ties": "pessimistic", "seed": 0},
    )


def pointing() -> Pointing:
    rows = [
        {"word_class": kind, "inside": 0.1 * (n % 7), "uniform": 0.5, "cluster": n % 4}
        for n in range(12)
        for kind in ("colour", "shape", "motion")
    ]
    words = pd.DataFrame(rows)
    return Pointing(words, cluster_mean_interval(words["inside"] - 0.5, words["cluster"]), 1.0)


def level_table() -> pd.DataFrame:
    row = {"captions": 4, "R@1": 75.0, "low": 50.0, "high": 100.0}
    row |= {"control": 25.0, "control_low": float("nan"), "control_high": float("nan")}
    return pd.DataFrame.from_dict({"all": row, "1 objects": row}, orient="index")


def history(validated: bool) -> list[dict]:
    rows = [{"step": step, "loss": 4 / step, "lr": 1e-3 / step} for step in range(1, 30)]
    if validated:
        rows[-1] |= {"val/t2v/R@1": 50.0, "val/v2t/R@1": 40.0}
    return rows


def every_figure(explanation: Explanation, truth: ClipTruth) -> dict[str, Figure | None]:
    return {
        "aosm": plots.aosm_figure(explanation, truth),
        "bars": plots.recall_bars(level_table(), chance=0.5),
        "curve": plots.training_curve(history(validated=True)),
        "heatmap": plots.similarity_heatmap(result()),
        "pointing": plots.pointing_figure({"trained": pointing(), "untrained": pointing()}),
        "ranks": plots.rank_histogram(result()),
        "retrieved": plots.retrieved_videos(CAPTION, [clip(0), clip(1)], [1, 9], [3.0, 2.0], "v1"),
        "strips": plots.film_strips([(CAPTION, clip(frames=20)), ("x", clip(frames=1))]),
    }


def test_saved_as_pdf_and_png_without_a_trace(explanation, truth, tmp_path):
    before = dict(mpl.rcParams)
    for name, figure in every_figure(explanation, truth).items():
        assert plots.save_figure(figure, tmp_path / "figures", name) is figure
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


def test_nothing_to_draw(tmp_path):
    assert plots.pointing_figure({}) is None
    assert plots.save_figure(None, tmp_path, "pointing") is None
    assert not list(tmp_path.iterdir())


def matrices(figure: Figure) -> list:
    """The axes that show the word x frame matrices, from left to right."""
    return [axis for axis in figure.axes if axis.images and axis.images[0].get_array().ndim == 2][:3]


def test_frames_stand_above_their_columns(explanation):
    figure = plots.aosm_figure(explanation)
    pictures = [axis for axis in figure.axes if axis.images and axis.images[0].get_array().ndim == 3]
    assert len(pictures) == 3 * FRAMES
    for number, matrix in enumerate(matrices(figure)):
        box = matrix.get_position()
        for column, picture in enumerate(pictures[number * FRAMES : (number + 1) * FRAMES]):
            place = picture.get_position()
            assert place.y0 >= box.y1
            assert box.x0 + box.width * column / FRAMES <= place.x0 + 1e-6
            assert place.x1 <= box.x0 + box.width * (column + 1) / FRAMES + 1e-6
            np.testing.assert_array_equal(picture.images[0].get_array(), explanation.pixels[column])


def test_matrices_have_words_as_rows(explanation):
    shown = [axis.images[0].get_array() for axis in matrices(plots.aosm_figure(explanation))]
    expected = [explanation.similarity, explanation.over_frames, explanation.over_words]
    for found, values in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(found, values)
    labels = [label.get_text() for label in matrices(plots.aosm_figure(explanation))[0].get_yticklabels()]
    assert labels == explanation.tokens
    assert labels[0] == "[start]"
    assert labels[2] == "red"


def test_truth_is_outlined_where_it_is(explanation, truth):
    assert not any(axis.collections for axis in matrices(plots.aosm_figure(explanation)))
    words = text.token_words(CAPTION, 24)
    top, bottom = words.index(1), len(words) - words[::-1].index(4)  # "red" to "left,"
    for axis in matrices(plots.aosm_figure(explanation, truth)):
        points = np.concatenate([path.vertices for path in axis.collections[0].get_paths()])
        # Frames at 0.125 and 0.25 s are the file's frames 1 and 2; of these only 1 is told of.
        assert points.min(0).tolist() == [-0.5, top - 0.5]
        assert points.max(0).tolist() == [0.5, bottom - 0.5]


def test_contributions_add_up_to_the_logit(explanation):
    figure = plots.aosm_figure(explanation)
    [axis] = [axis for axis in figure.axes if axis.get_xlabel() == "contribution to the logit"]
    *parts, total = axis.patches
    assert len(parts) == 4
    assert total.get_x() == 0
    assert total.get_width() == pytest.approx(explanation.logit)
    ends = [part.get_x() + part.get_width() for part in parts]
    assert [part.get_x() for part in parts] == pytest.approx([0, *ends[:-1]])
    assert ends[-1] == pytest.approx(explanation.logit, rel=1e-4, abs=1e-5)
    printed = [text.get_text() for text in axis.texts]
    assert printed[-1] == f"{explanation.logit:.2f}"


def test_long_clips_are_thinned():
    figure = plots.film_strips([("x", clip(frames=20))], most_frames=5)
    times = [axis.get_xlabel() for axis in figure.axes]
    assert times == ["0.1 s", "0.8 s", "1.4 s", "1.9 s", "2.5 s"]


def test_validation_gets_its_own_panel():
    assert len(plots.training_curve(history(validated=False)).axes) == 2
    assert len(plots.training_curve(history(validated=True)).axes) == 3


def test_rank_shares_sum_to_a_hundred():
    bars = plots.rank_histogram(result()).axes[0].containers
    assert [sum(bar.get_height() for bar in side) for side in bars] == pytest.approx([100, 100])
