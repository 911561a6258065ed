"""Run folders and executed notebooks: kernels here are real."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from xclip_lab import runs
from xclip_lab.config import load_config, save_config
from xclip_lab.errors import DatasetError
from xclip_lab.runs import (
    RunError,
    config_hash,
    execute_notebook,
    list_runs,
    new_run_dir,
    notebook_path,
    result_dir,
)


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook whose first cell holds the parameters."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


def test_a_config_has_one_folder(tmp_path):
    config = load_config("quickstart")
    first = new_run_dir(config, tmp_path)
    today = datetime.date.today().isoformat()
    assert first.name == f"{today}_quickstart_{config_hash(config)}"
    assert not any(tmp_path.iterdir())  # the run makes it
    assert new_run_dir(load_config("quickstart", {"seed": "0"}), tmp_path) == first
    save_config(config, tmp_path / "config.yaml")
    assert new_run_dir(load_config(tmp_path / "config.yaml"), tmp_path) == first
    assert new_run_dir(load_config("quickstart", {"train.tower_chunk": 4}), tmp_path) == first
    changes: list[dict[str, object]] = [{"seed": 1}, {"head.temperature": 0.7}, {"data.root": "elsewhere"}]
    others = {new_run_dir(load_config("quickstart", change), tmp_path) for change in changes}
    assert len(others - {first}) == 3


def test_a_run_is_found_again_on_a_later_day(tmp_path):
    config = load_config("quickstart")
    begun = tmp_path / f"2001-02-03_quickstart_{config_hash(config)}"
    begun.mkdir()
    assert new_run_dir(config, tmp_path) == begun


def test_a_result_never_goes_into_the_run_folder(tmp_path):
    config, other = load_config("quickstart"), load_config("quickstart", {"data.frame_order": 2})
    run_dir, stray = tmp_path / "runs" / "mine", tmp_path / "stray.safetensors"
    checkpoint = run_dir / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    save_config(config, run_dir / "config.yaml")
    for file in (checkpoint / "model.safetensors", stray):
        file.touch()
    (run_dir / "checkpoints" / "best").symlink_to(checkpoint.name)
    for given in (run_dir, run_dir / "checkpoints" / "best", checkpoint / "model.safetensors"):
        assert result_dir(given, config, "evaluation/test", tmp_path) == run_dir / "evaluation" / "test"
    places = {
        result_dir(given, settings, "evaluation/test", tmp_path / "runs").relative_to(tmp_path / "runs")
        for given in ("", stray)
        for settings in (config, other)
    }
    assert sorted(place.parts[0].split("_")[0] for place in places) == 2 * ["checkpoint"] + 2 * ["untrained"]
    assert {place.parts[1:] for place in places} == {("evaluation", "test")}
    assert new_run_dir(config, tmp_path / "runs").name not in {place.parts[0] for place in places}


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="choose another place for the run"):
        new_run_dir(load_config("quickstart"), tmp_path / "runs")


def test_data_are_made_once_and_never_mixed(tmp_path):
    few = {"data.generate.train_clips": 2, "data.generate.test_clips": 2, "data.root": f"{tmp_path}/clips"}
    runs.prepare_data(load_config("quickstart", few), progress=False)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.*")}
    assert len([path for path in made if path.suffix == ".mp4"]) == 4
    runs.prepare_data(load_config("quickstart", few), progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.*")} == made
    with pytest.raises(DatasetError, match="another root"):
        runs.prepare_data(load_config("quickstart", few | {"data.generate.seed": 1}), progress=False)
    runs.prepare_data(load_config("xclip-folder-b32", {"data.root": str(tmp_path / "own")}))
    assert not (tmp_path / "own").exists()


def test_notebooks_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "NOTEBOOKS", tmp_path)
    with pytest.raises(RunError, match="clone the project"):
        notebook_path("00_quickstart")
    path = write_notebook(tmp_path / "00_quickstart.ipynb", "seed = 0")
    assert notebook_path("00_quickstart") == path
    with pytest.raises(RunError, match=r"no notebook 'quickstart' .*00_quickstart"):
        notebook_path("quickstart")


def test_an_executed_notebook(tmp_path, capsys):
    source = write_notebook(
        tmp_path / "show.ipynb",
        "seed = 0\noverrides = {}",
        "from tqdm.auto import tqdm\nimport time\nfor step in tqdm(range(9), 'train'):\n    time.sleep(0.02)",
        "print('got', seed, overrides)",
    )
    before = source.read_bytes()
    parameters = {"seed": 3, "overrides": {"head.temperature": "0.1", "train.max_steps": None}}
    executed = execute_notebook(source, parameters, tmp_path / "run")
    assert executed == tmp_path / "run" / "show.ipynb"
    assert source.read_bytes() == before
    shown = capsys.readouterr()
    assert shown.out == "got 3 {'head.temperature': '0.1', 'train.max_steps': None}\n"
    assert "train:" in shown.err
    assert "/9 [" in shown.err
    assert any(cell.outputs for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code")


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        (
            "from xclip_lab.errors import ConfigError\nraise ConfigError('no such\\nkey')",
            r"no such\\nkey \(cell",
        ),
        ("1 / 0", r"ZeroDivisionError: division by zero \(cell"),
        ("import os\nos._exit(1)", "the process of the notebook died"),
    ],
)
def test_a_failed_notebook_is_one_line_and_a_copy(tmp_path, capfd, cell, line):
    source = write_notebook(tmp_path / "fail.ipynb", "seed = 0", "print('so far')", cell)
    with pytest.raises(RunError, match=f"^{line}") as failed:
        execute_notebook(source, {"seed": 1}, tmp_path / "run", progress=False)
    assert len(str(failed.value).splitlines()) == 1
    assert str(tmp_path / "run" / "fail.ipynb") in str(failed.value)
    assert "so far" in (tmp_path / "run" / "fail.ipynb").read_text()
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_no_notebook_can_run_in(tmp_path):
    source = write_notebook(tmp_path / "one.ipynb", "seed = 0")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file: File exists; choose another place for the run$"):
        execute_notebook(source, {}, tmp_path / "file", progress=False)


def test_interrupt_reaches_the_kernel(tmp_path):
    saved = tmp_path / "saved"
    source = write_notebook(
        tmp_path / "long.ipynb",
        "seed = 0",
        "import time\nfrom pathlib import Path\n"
        f"try:\n    Path({str(tmp_path / 'begun')!r}).touch()\n    time.sleep(100)\n"
        f"except KeyboardInterrupt:\n    Path({str(saved)!r}).touch()\n"
        "    raise KeyboardInterrupt('at step 4')",
    )
    program = (
        "import sys\nfrom xclip_lab.runs import execute_notebook\n"
        "try:\n    execute_notebook(sys.argv[1], {'seed': 1}, sys.argv[2])\n"
        "except KeyboardInterrupt as error:\n    sys.exit(f'stopped {error}')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, source, tmp_path / "run"], stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "begun", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.strip().splitlines() == ["stopped at step 4"]
    assert saved.exists()
    assert "KeyboardInterrupt" in (tmp_path / "run" / "long.ipynb").read_text()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until `path` is there; fails where the process ends before."""
    end = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_result_in_the_folder_of_a_run_stays(tmp_path):
    run_dir, result = tmp_path / "run", tmp_path / "run" / "evaluation" / "test"
    config = load_config("quickstart")
    result.mkdir(parents=True)
    save_config(config, run_dir / "config.yaml")
    (result / "metrics.json").write_text("new")
    (run_dir / "metrics.json").write_text("old")
    for name, kept in (("stamp.json", "old"), (None, "new")):
        (run_dir / "stamp.json").unlink(missing_ok=True)
        if name:
            (run_dir / name).write_text("{}")
        runs.keep_metrics(result, config, config, "test")
        assert (run_dir / "metrics.json").read_text() == kept


def test_list_of_runs(tmp_path):
    with pytest.raises(RunError, match="no folder"):
        list_runs(tmp_path / "none")
    config = load_config("quickstart", {"train.epochs": 10, "data.test_split": "val"})
    for name in ("b", "a", "damaged"):
        (tmp_path / name).mkdir()
        save_config(config, tmp_path / name / "config.yaml")
    (tmp_path / "damaged" / "config.yaml").write_text("preset: [")
    (tmp_path / "stranger").mkdir()
    checkpoint = tmp_path / "b" / "checkpoints" / "last"
    checkpoint.mkdir(parents=True)
    (checkpoint / "stamp.json").write_text(json.dumps({"step": 40, "total_steps": 200, "epoch": 2}))
    (tmp_path / "b" / "evaluation" / "val").mkdir(parents=True)
    metrics = {"t2v": {"R@1": 12.5}, "v2t": {"R@1": 10.0}}
    (tmp_path / "b" / "evaluation" / "val" / "metrics.json").write_text(json.dumps(metrics))
    first, second, third = list_runs(tmp_path)
    assert (first.name, first.preset, first.state, first.metrics) == ("a", "quickstart", "no checkpoint", {})
    assert second.state == "epoch 2 of 10, step 40 of 200"
    assert second.metrics == metrics
    (checkpoint / "stamp.json").write_text('{"step": 40}')
    assert list_runs(tmp_path)[1].state == "the checkpoint's stamp.json is damaged"
    assert third.state == "config.yaml is damaged"
