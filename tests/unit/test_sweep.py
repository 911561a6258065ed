"""Sweeps: what runs, what does not run again, what fails alone; and where cells run, with real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.shared import ROOT
from tests.unit.in_processes import behave, place_of, wait_until
from xclip_lab import sweep
from xclip_lab.__main__ import main
from xclip_lab.errors import ConfigError
from xclip_lab.executors import cluster, local
from xclip_lab.grid import Cell, cells, load_grid
from xclip_lab.runs import RunError
from xclip_lab.study import SMOKE
from xclip_lab.workers import Outcome, usable_cores

GRID = {
    "preset": "quickstart",
    "axes": {"head.temperature": [0.1, 0.2, 0.3]},
    "towers": {"preset": "quickstart-meanP", "also_trained": ["0.1"]},
    "seeds": [0, 1],
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, str]:
    return {"data.root": str(tmp_path_factory.mktemp("clips") / "clips")}


@pytest.fixture
def made(clips, tmp_path) -> list[Cell]:
    """Cells of two seeds with smoke sizes."""
    return cells(load_grid({**GRID, "overrides": SMOKE | clips}), tmp_path)


class Pretended:
    """An executor that runs nothing: cells whose name is in `failing` fail, the others leave their files."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.ran = failing, []

    def __call__(self, function, items):
        assert function is sweep.run_cell
        for index, cell in enumerate(items):
            assert cell.base is None or cell.base.done
            self.ran.append(cell.name)
            if cell.name in self.failing:
                yield index, Outcome(error="the loss is nan")
                continue
            place = cell.features if cell.embeds else cell.run_dir
            place.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.json", "stamp.json"):
                (cell.run_dir / name).touch()
            if cell.embeds:
                (place / "complete").touch()
            yield index, Outcome()


def test_towers_come_first_and_nothing_runs_twice(made):
    first, again = Pretended(), Pretended()
    assert sweep.run(made, first) == {}
    assert len(first.ran) == 2 + len(made) == 2 + 2 * 4
    assert first.ran[:2] == [f"towers of quickstart-meanP, seed {seed}" for seed in (0, 1)]
    assert all(cell.done for cell in made)
    missing = [cell for cell in made if cell.name in ("0.1, seed 0", "0.1, towers trained, seed 1")]
    for cell in missing:  # as if they had been evaluated by hand
        (cell.run_dir / "stamp.json").unlink()
    assert sweep.run(made, again) == {}
    assert again.ran == [cell.name for cell in missing]


def test_a_failed_cell_is_told_and_alone(made):
    executor = Pretended("0.2, seed 0", "towers of quickstart-meanP, seed 1")
    failed = sweep.run(made, executor)
    done = {cell.name for cell in made if cell.done}
    assert done == {
        "0.1, seed 0",
        "0.3, seed 0",
        "0.1, towers trained, seed 0",
        "0.1, towers trained, seed 1",
    }
    assert failed["0.2, seed 0"] == "the loss is nan"
    assert "the run of its towers failed" in failed["0.3, seed 1"]
    [cell] = [cell for cell in made if cell.name == "0.2, seed 0"]
    assert (cell.run_dir / "failed.txt").read_text() == "the loss is nan\n"
    with pytest.raises(RunError, match=r"^cells failed: 5, such as .*: the loss is nan; the same command"):
        sweep.raise_failures(failed)
    assert sweep.run(made, Pretended()) == {}


def test_data_that_cannot_be_used_stops_before_anything_starts(made):
    wrong = cells(load_grid("xclip-temporal", preset="xclip-msrvtt-b32"), "runs")
    executor = Pretended()
    with pytest.raises(Exception, match="msrvtt"):
        sweep.run(wrong, executor)
    assert executor.ran == []


def test_processes_have_their_own_gpu(tmp_path):
    items = [tmp_path / "item-0", tmp_path / "item-1"]
    found = [outcome.value for _, outcome in local(gpus=["4", "7"])(place_of, items)]
    assert {card for _, card, _ in found} == {"4", "7"}
    assert len({pid for pid, *_ in found}) == 2
    assert {threads for *_, threads in found} == {str(max(1, usable_cores() // 2))}


def test_a_lost_process_frees_its_gpu():
    outcomes = dict(local(1, gpus=["4"])(behave, ["die", "refuse", "go on"]))
    assert "SIGKILL" in outcomes[0].error
    assert outcomes[1].error == "the loss is nan"
    assert outcomes[2].value == "4"
    with pytest.raises(ConfigError, match="workers: 0"):
        local(0)


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[1]).read()
open({seen!r}, "a").write(script)
last = int(re.search(r"--array=0-([0-9]+)", script).group(1))
for task in range(last + 1):
    slurm = dict(JOB_ID=12, ARRAY_JOB_ID=12, ARRAY_TASK_ID=task, PROCID=0, LOCALID=0, NODEID=0, NTASKS=1)
    slurm |= dict(JOB_NUM_NODES=1, JOB_NODELIST="here")
    env = os.environ | {{f"SLURM_{{key}}": str(value) for key, value in slurm.items()}}
    subprocess.Popen(["bash", sys.argv[1]], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 12")
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == *=* || "$1" == --unbuffered ]] && shift || shift 2; done
exec "$@"
"""


def test_jobs_on_this_machine_through_submitit(tmp_path):
    pytest.importorskip("submitit")
    executor = cluster(tmp_path / "jobs", cpus=1, gpus=0, hours=0.1, system="local")
    outcomes = dict(executor(behave, ["refuse", "die", "go on"]))
    assert outcomes[0] == Outcome(error="the loss is nan")
    assert "job " in outcomes[1].error
    assert outcomes[2] == Outcome("none")


def test_an_array_of_slurm_jobs(tmp_path, monkeypatch):
    """The script that sbatch gets, and what comes back; sbatch and srun here only start processes."""
    pytest.importorskip("submitit")
    seen = tmp_path / "script"
    commands = {"sbatch": SBATCH.format(python=sys.executable, seen=str(seen)), "srun": SRUN}
    commands |= {"sacct": "#!/bin/bash\n", "scancel": "#!/bin/bash\n"}
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    executor = cluster(tmp_path / "jobs", cpus=3, gpus=2, hours=1.5, partition="gpu", at_once=1)
    outcomes = dict(executor(behave, ["refuse", "go on"]))
    assert outcomes == {0: Outcome(error="the loss is nan"), 1: Outcome("none")}
    script = seen.read_text()
    for line in ("cpus-per-task=3", "gpus-per-node=2", "time=90", "partition=gpu", "array=0-1%1"):
        assert f"#SBATCH --{line}\n" in script
    assert "export OMP_NUM_THREADS=3\n" in script
    assert "#SBATCH --job-name=xclip-lab\n" in script


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"cluster slurm: .*srun"):
        cluster(tmp_path)


def test_the_command_without_data_shows_what_is_published(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "xclip-temporal", "--preset", "xclip-msrvtt-b32", "--seeds", "0"]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "to do  off, seed 0" in printed
    assert re.search(r"on +trained +46\.1 +not run", printed)
    assert main(command) == 2
    printed = capsys.readouterr()
    assert re.search(r"on +trained +46\.1 +not run", printed.out)
    assert len(printed.err.splitlines()) == 1
    assert "msrvtt" in printed.err
    assert main(["sweep", "xclip-temporal", "--partition", "gpu"]) == 2
    assert "give --slurm as well" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_sweep_finishes_only_what_is_missing(clips, tmp_path):
    """With real notebooks: kill -9 in the middle; the same command keeps what was done and does the rest."""
    command = [sys.executable, "-m", "xclip_lab", "sweep", "xclip-contrasts", "--smoke", "--workers", "2"]
    command += ["--run-dir", str(tmp_path / "runs"), "--data.root", clips["data.root"]]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    finished = tmp_path.glob
    wait_until(lambda: len(list(finished("runs/*/metrics.json"))) >= 2, 400)
    first.kill()
    first.wait()
    before = {path: path.stat().st_mtime_ns for path in finished("runs/*/metrics.json")}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = {path: path.stat().st_mtime_ns for path in finished("runs/*/metrics.json")}
    assert len(before) < len(after) == 4
    assert before.items() <= after.items()
    assert (tmp_path / "runs/tables/xclip-contrasts.csv").is_file()
