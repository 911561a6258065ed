"""A paper's table beside ours: the published values, the verdicts, the intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from xclip_lab import tables
from xclip_lab.errors import DatasetError
from xclip_lab.grid import cells, load_grid
from xclip_lab.result import Result
from xclip_lab.stats import cluster_mean_interval

QUERIES = 100
STAMP = {"ties": "pessimistic", "intervals": {"draws": 50}, "seed": 0, "split": "test", "protocol": "9k"}


def leave_result(cell, right: int, **stamp) -> np.ndarray:
    """A result in which the first `right` of the captions find their videos first; the hits, in percent."""
    hits = np.arange(QUERIES) < right
    similarity = np.zeros((QUERIES, QUERIES), dtype=np.float32)
    np.fill_diagonal(similarity, np.where(hits, 1.0, -1.0))
    names = [f"v{number}" for number in range(QUERIES)]
    index = np.arange(QUERIES)
    gallery = {"captions": names, "videos": names, "rows": index}
    Result.rank(similarity, index, index // 2, STAMP | stamp, **gallery).save(cell.run_dir)
    return 100.0 * hits


def test_the_paper_is_judged_by_runs_on_its_data_alone(tmp_path):
    """X-CLIP states 45.2 for 0.1 and 43.9 for 1.0, text to video."""
    for preset, verdicts in ((None, {"other data"}), ("xclip-msrvtt-b32", {"inside", "outside", "not run"})):
        grid = load_grid("xclip-temperatures", preset)
        made = cells(grid, tmp_path)
        for cell in made:
            if cell.row in ("0.1", "1.0"):
                leave_result(cell, {"0.1": 46, "1.0": 80}[cell.row])
        found = tables.table(grid, made).set_index("row")
        assert found["t2v published"].to_dict() == {"1.0": 43.9, "0.1": 45.2, "0.01": 46.1, "0.001": 45.6}
        assert set(found["t2v verdict"]) == verdicts | {"not run"}
        assert found.loc["0.001", "t2v verdict"] == "not run"
        assert np.isnan(found.loc["0.001", "t2v R@1"])
    assert found.loc["0.1", "t2v verdict"] == found.loc["0.1", "v2t verdict"] == "inside"
    assert found.loc["1.0", "t2v verdict"] == "outside"
    assert found.loc["0.1", "towers"] == "trained"
    other = load_grid("xclip-temperatures", "xclip-msrvtt-b16")
    leave_result(cells(other, tmp_path)[0], 40)
    assert tables.table(other, cells(other, tmp_path))["t2v verdict"][0] == "other towers"


def test_seeds_are_pooled_and_their_range_is_told(tmp_path):
    grid = load_grid("xclip-temporal", seeds=[0, 1])
    made = cells(grid, tmp_path)
    hits = [leave_result(cell, right) for cell, right in zip(made[::2], (30, 50), strict=True)]
    row = tables.table(grid, made).iloc[0]
    oracle = cluster_mean_interval(np.mean(hits, axis=0), np.arange(QUERIES) // 2)
    assert (row["row"], row["runs"], row["t2v min"], row["t2v max"]) == ("off", 2, 30.0, 50.0)
    assert row["towers"] == "frozen, of quickstart-meanP"
    for side in ("t2v", "v2t"):
        ours = [row[f"{side} {key}"] for key in ("R@1", "low", "high")]
        assert ours == pytest.approx(list(oracle))


def test_identical_rows_of_the_paper_are_flagged_and_nothing_is_made_up(tmp_path):
    grid = load_grid("xclip-contrasts", seeds=[0])
    found = tables.save(grid, cells(grid, tmp_path), tmp_path / "tables")
    flagged = found[found["note"] != ""]
    assert flagged["row"].tolist() == ["SF+WV+WF", "SV+SF+WV"]
    assert flagged["note"].tolist() == [
        f"published with the values of {other}, probably a slip" for other in ("SV+SF+WV", "SF+WV+WF")
    ]
    assert found["row"].tolist()[-3:] == ["SV", "WF", "SV+SF+WV+WF"]
    assert found["towers"].tolist()[-3:] == ["trained"] * 3
    text = (tmp_path / "tables/xclip-contrasts.md").read_text()
    assert text.count("| not run |") == 4 * 18  # value and verdict, in both directions
    assert "Frozen towers: frame and word features of one training of quickstart-meanP" in text
    assert pd.read_csv(tmp_path / "tables/xclip-contrasts.csv").shape == found.shape
    glscl = load_grid("glscl", seeds=[0])
    made = cells(glscl, tmp_path)
    leave_result(made[1], 30)
    found = tables.table(glscl, made)
    assert found["t2v published"].tolist()[0] == 48.1
    assert found["t2v published"].isna().sum() == len(found) - 1
    assert found["t2v verdict"][1] == "not published here"
    assert tables.shown(found)["t2v published"][1] == "not published here"


def test_cells_of_unlike_galleries_make_no_table(tmp_path):
    grid = load_grid("xclip-temporal", seeds=[0])
    made = cells(grid, tmp_path)
    leave_result(made[0], 30)
    leave_result(made[1], 30, protocol="7k")
    with pytest.raises(DatasetError, match="protocol"):
        tables.table(grid, made)


def test_the_figure_has_every_row(tmp_path):
    grid = load_grid("xclip-contrasts", seeds=[0])
    made = cells(grid, tmp_path)
    leave_result(made[0], 30)
    leave_result(made[1], 40)
    drawn = tables.figure(grid, tables.table(grid, made))
    left, right = drawn.axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert len(labels) == 18
    assert labels[10] == "SF+WV+WF *"
    assert labels[15] == "SV, towers trained"
    assert [left.get_title(loc="left"), right.get_title(loc="left")] == ["text-to-video", "video-to-text"]
    legend = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert "published (other data)" in legend
    assert tables.figure(grid, pd.DataFrame()) is None
