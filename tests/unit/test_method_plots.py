"""The comparison's figures carry the numbers of its table."""

from __future__ import annotations

import pandas as pd

from xclip_lab import method_plots


def table() -> pd.DataFrame:
    rows = [
        {"method": method, "level": level, "R@1": value, "low": value - 5, "high": value + 5}
        | {"seed_min": value - 2, "seed_max": value + 2, "seeds": 2, "captions": 10, "gmac": gmac}
        for method, gmac, value in (("X-CLIP", 30.0, 61.5), ("GLSCL", 0.5, 48.25))
        for level in ("all", "1 objects")
    ]
    return pd.DataFrame(rows)


def texts(figure) -> str:
    return " ".join(text.get_text() for axis in figure.axes for text in axis.texts)


def test_level_recalls_writes_means_and_ranges():
    figure = method_plots.level_recalls(table())
    assert "61.5" in texts(figure)
    assert "46 to 50" in texts(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["X-CLIP", "GLSCL"]


def test_recall_against_cost_has_a_log_axis_and_a_line_a_method():
    figure = method_plots.recall_against_cost(table())
    assert figure.axes[0].get_xscale() == "log"
    legend = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert "X-CLIP  (61.5%, 30.0 GMAC)" in legend


def test_nothing_to_draw():
    assert method_plots.level_recalls(pd.DataFrame()) is None
    assert method_plots.recall_against_cost(pd.DataFrame()) is None
