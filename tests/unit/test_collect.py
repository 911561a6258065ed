"""All runs as one table: also those that failed or are damaged."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from tests.unit.test_tables import leave_result
from xclip_lab import runs
from xclip_lab.config import save_config
from xclip_lab.grid import cells, load_grid
from xclip_lab.runs import RunError

TWO = {"preset": "quickstart", "axes": {"optim.lr": [0.1, 0.2]}}


def test_every_run_is_a_row_and_a_broken_one_says_so(tmp_path):
    made = cells(
        load_grid({"preset": "quickstart", "axes": {"head.temperature": [0.1, 0.2, 0.3, 0.4, 0.5]}}), tmp_path
    )
    good, failed, damaged, evaluated, unreadable = made
    for cell in made:
        cell.run_dir.mkdir()
        save_config(cell.config, cell.run_dir / "config.yaml")
    leave_result(good, 30)
    (good.run_dir / "cost.json").write_text('{"seconds": 12.5, "peak_memory_mib": 900.0}')
    (failed.run_dir / "failed.txt").write_text("the loss is nan\n")
    leave_result(damaged, 30)
    (damaged.run_dir / "metrics.json").write_text('{"t2v": ')
    leave_result(evaluated, 40)
    place = evaluated.run_dir / "evaluation" / "test"
    place.mkdir(parents=True)
    for name in ("metrics", "intervals", "stamp"):
        (evaluated.run_dir / f"{name}.json").rename(place / f"{name}.json")
    (unreadable.run_dir / "config.yaml").write_text("preset: [")
    (tmp_path / "without_config").mkdir()
    (tmp_path / "without_config" / "failed.txt").write_text("no clips")
    (tmp_path / "tables").mkdir()
    leave_result(cells(load_grid(TWO), tmp_path / "sweep")[0], 20)
    save_config(good.config, cells(load_grid(TWO), tmp_path / "sweep")[0].run_dir / "config.yaml")

    table = runs.collect(tmp_path)
    rows = table.set_index("run")
    [deeper] = [name for name in rows.index if name.startswith("sweep/")]
    assert set(rows.index) == {cell.run_dir.name for cell in made} | {"without_config", deeper}
    assert rows.loc[deeper, "t2v/R@1"] == 20.0
    row = rows.loc[good.run_dir.name]
    assert (row["t2v/R@1"], row["t2v/R@1 low"] < 30.0 < row["t2v/R@1 high"]) == (30.0, True)
    assert (row["seconds"], row["peak_memory_mib"]) == (12.5, 900.0)
    assert row["stamp/intervals.draws"] == 50
    assert (row["stamp/split"], row["preset"], row["head.temperature"]) == ("test", "quickstart", 0.1)
    assert rows.loc[evaluated.run_dir.name, "t2v/R@1"] == 40.0
    assert rows.loc[failed.run_dir.name, "state"] == "failed: the loss is nan"
    assert "the result in" in rows.loc[damaged.run_dir.name, "state"]
    assert pd.isna(rows.loc[damaged.run_dir.name, "t2v/R@1"])
    assert rows.loc[unreadable.run_dir.name, "state"] == "config.yaml is damaged"
    assert rows.loc["without_config", "state"] == "failed: no clips"
    kept = table.to_csv(index=False)
    assert kept.count("\n") == 1 + len(table)


def test_settings_that_all_runs_share_are_left_out(tmp_path):
    for cell in cells(load_grid(TWO), tmp_path):
        cell.run_dir.mkdir()
        save_config(cell.config, cell.run_dir / "config.yaml")
    table = runs.collect(tmp_path)
    assert table["optim.lr"].tolist() == [0.1, 0.2] or table["optim.lr"].tolist() == [0.2, 0.1]
    assert {"preset", "seed", "head.name"} <= set(table)
    assert "optim.weight_decay" not in table
    assert json.loads(table.to_json())
    with pytest.raises(RunError, match="no folder"):
        runs.collect(tmp_path / "none")
