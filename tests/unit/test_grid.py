"""Grids: the papers' tables are there in full, and every cell is the run that its row says."""

from __future__ import annotations

import pytest
import yaml

from xclip_lab.errors import ConfigError
from xclip_lab.grid import GridError, cells, grid_names, load_grid
from xclip_lab.published import ablation
from xclip_lab.runs import config_hash

LETTERS = {"SV": "video-sentence", "SF": "sentence-frame", "WV": "video-word", "WF": "frame-word"}
OWN = {"preset": "quickstart", "axes": {"head.temperature": [0.1, 0.2], "train.batch_size": [8, 16]}}


@pytest.mark.parametrize("name", grid_names())
def test_a_grid_of_the_package_is_whole(name):
    """Every row is a run of its own, on generated clips and, where a paper has the table, as it ran it."""
    grid = load_grid(name, seeds=[0])
    made = [cell for cell in cells(grid, "runs") if not cell.trains]
    assert len({cell.run_dir for cell in made}) == len(made) == len(grid.rows) > 1
    assert all((cell.base is None) == (grid.towers is None) for cell in made)
    if grid.published:
        official = cells(load_grid(name, grid.published.preset, [0]), "runs")
        assert len({cell.run_dir for cell in official}) == len(official) == len(grid.rows)
        assert all(cell.base is None and cell.config.data.dataset == "msrvtt" for cell in official)
        assert grid.rows.keys() >= grid.published.models.keys()
    if grid.published and grid.published.ablation:
        stated = ablation(grid.published.ablation).rows
        assert grid.rows.keys() == {row for row in stated if not row.endswith("-b16")}


def test_a_row_of_the_contrasts_is_what_its_name_says():
    grid = load_grid("xclip-contrasts", seeds=[0])
    assert len(grid.rows) == 15
    made = cells(grid, "runs")
    for cell in made:
        assert set(cell.config.head.contrasts) == {LETTERS[part] for part in cell.row.split("+")}
    trained = {cell.row for cell in made if cell.trains}
    assert trained == {"SV", "WF", "SV+SF+WV+WF"}


def test_frozen_towers_are_those_of_one_training_for_each_seed(tmp_path):
    grid = load_grid("xclip-temporal", overrides={"head.mask_padding": True, "train.epochs": 1})
    made = cells(grid, tmp_path)
    bases = {cell.config.seed: cell.base for cell in made if cell.base}
    assert len({base.run_dir for base in bases.values()}) == len(bases) == 2
    for cell in made:
        base = bases[cell.config.seed]
        assert cell.base == base
        assert cell.config.head.mask_padding
        assert cell.config.data.features == str(base.features)
        assert cell.config.towers.pretrained.startswith(str(base.run_dir))
        assert base.config.head.name == "clip4clip"  # head.mask_padding is no setting of it
        assert base.config.train.epochs == 1
        assert base.config.data.generate == cell.config.data.generate


def test_axes_multiply_and_a_config_has_one_folder(tmp_path):
    made = cells(load_grid({**OWN, "seeds": [0, 5], "repeats": 2}), tmp_path)
    assert len({cell.run_dir for cell in made}) == len(made) == 2 * 2 * 2 * 2
    assert {cell.row for cell in made} == {"0.1 / 8", "0.1 / 16", "0.2 / 8", "0.2 / 16"}
    first, again = made[0], made[4]
    assert (first.repeat, again.repeat) == (1, 2)
    assert first.config == again.config
    assert again.name == "0.1 / 8, seed 0, repeat 2"
    assert first.run_dir.name == f"quickstart_s0_{config_hash(first.config)}"


def test_a_file_is_a_grid_and_the_call_overrides_it(tmp_path):
    path = tmp_path / "mine.yaml"
    own = {"overrides": {"train.epochs": 7}, "towers": {"preset": "quickstart-meanP"}}
    path.write_text(yaml.safe_dump({**OWN, "of_preset": own}))
    grid = load_grid(path, seeds=3, overrides={"optim.lr": 1e-3})
    assert (grid.name, grid.seeds, grid.towers.preset) == ("mine", [3], "quickstart-meanP")
    assert {cell.config.train.epochs for cell in cells(grid, tmp_path)} == {7}
    assert {cell.config.optim.lr for cell in cells(grid, tmp_path)} == {1e-3}
    other = load_grid(path, preset="quickstart-wti", overrides={"train.epochs": 2})
    assert other.towers is None
    small = cells(load_grid(path, smoke=True), tmp_path)
    assert [cell.row for cell in small] == ["0.1 / 8", "0.2 / 8"]
    assert {cell.base.config.train.max_steps for cell in small} == {3}


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("xclip-contrast", "did you mean 'xclip-contrasts'"),
        ("missing.yaml", "missing.yaml: cannot be read"),
        ({"preset": "quickstart"}, "axes is missing"),
        ({**OWN, "axis": {}}, "unknown key 'axis'; did you mean 'axes'"),
        ({**OWN, "axes": {"head.temperature": 0.1}}, "axis head.temperature is neither a list"),
        ({**OWN, "towers": {"preset": "quickstart-meanP", "also_trained": ["0.1 / 9"]}}, "no row '0.1 / 9'"),
        ({**OWN, "towers": {"preset": "quickstart-meanP", "frozen": True}}, "unknown key 'frozen'"),
        ({**OWN, "towers": "quickstart-meanP"}, "'quickstart-meanP' are no keys"),
        ({**OWN, "towers": {"overrides": {}}}, "towers: preset is missing"),
        ({**OWN, "seeds": []}, "name one or more"),
        ({**OWN, "seeds": [1, 1]}, "each once"),
        ({**OWN, "seeds": 3}, "seeds: 3 is not a list"),
        ({**OWN, "seeds": [-1]}, "seeds: -1 is not allowed"),
        ({**OWN, "repeats": 2.5}, "repeats: 2.5 is not allowed"),
        ({**OWN, "overrides": [1]}, "are no keys with values"),
        ({**OWN, "of_preset": 3}, "of_preset: 3 are no keys"),
        ({**OWN, "axes": ["head.temperature"]}, "axes: .* are no keys"),
        ({**OWN, "axes": {"seed": [0, 1]}}, "axis seed sets seed, which seeds sets"),
        ({**OWN, "axes": OWN["axes"] | {"a": {"x": {"head.temperature": 1}}}}, "which axis head.temperature"),
        ({**OWN, "published": {"preset": "xclip"}}, "no preset 'xclip'"),
        ({**OWN, "published": {"preset": "xclip-msrvtt-b32", "ablation": "x"}}, "no published ablation 'x'"),
        ({**OWN, "title": ["no text"]}, "title: .* is not allowed"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(grid, told):
    with pytest.raises(ConfigError, match=told.replace("'", ".")) as caught:
        load_grid(grid)
    assert "\n" not in str(caught.value)


def test_what_varies_cannot_be_overridden_and_a_bad_value_names_its_row(tmp_path):
    with pytest.raises(GridError, match=r"head\.temperature: it varies"):
        load_grid("xclip-temperatures", overrides={"head.temperature": 0.3})
    bad = load_grid({**OWN, "axes": {"head.temperature": [0.1, "warm"]}})
    with pytest.raises(GridError, match=r"warm: head\.temperature"):
        cells(bad, tmp_path)
