"""A run that was killed, interrupted or short of disk goes on bit for bit."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit import training
from tests.unit.training import (
    STEPS,
    after_step,
    assert_same,
    at_saving_stage,
    disk_full,
    outcome,
    real_processes,
    train_tiny,
)
from xclip_lab.errors import TrainingError, disk_remedy, one_line
from xclip_lab.resume import Checkpoints, write_state

SAVE = 2  # the save at step 5: it replaces the checkpoint of step 3
STAGES = range(1, 18)  # of one save; the last one removes what is no longer wanted


@pytest.fixture(scope="module")
def processes():
    return real_processes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What ten uninterrupted steps come to."""
    run_dir = tmp_path_factory.mktemp("whole")
    train_tiny(run_dir)
    return outcome(run_dir)


def run_process(processes, target, *args) -> int | None:
    process = processes.Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def no_rubbish(run_dir: Path) -> bool:
    folder = run_dir / "checkpoints"
    named = {os.readlink(link) for link in folder.iterdir() if link.is_symlink()}
    return {path.name for path in folder.iterdir()} == {"last", "best"} | named


def resumes_exactly(run_dir: Path, whole) -> None:
    assert train_tiny(run_dir).steps == STEPS
    assert_same(outcome(run_dir), whole)
    assert no_rubbish(run_dir)
    board = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=False).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_two_runs_are_equal(tmp_path, whole):
    train_tiny(tmp_path)
    assert_same(outcome(tmp_path), whole)


def test_another_seed_is_another_run(tmp_path, whole):
    train_tiny(tmp_path, {"seed": 1})
    with pytest.raises(AssertionError):
        assert_same(outcome(tmp_path)["weights"], whole["weights"])


@pytest.mark.parametrize("step", [1, 4, 5, 8, 10])
def test_killed_after_a_step(tmp_path, processes, whole, step):
    assert run_process(processes, training.train_and_die_after, tmp_path, step) == -signal.SIGKILL
    resumes_exactly(tmp_path, whole)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_saving(tmp_path, processes, whole, stage):
    died = run_process(processes, training.train_and_die_while_saving, tmp_path, stage, SAVE)
    assert died == -signal.SIGKILL
    assert Checkpoints(tmp_path).load()["step"] in (3, 5)
    resumes_exactly(tmp_path, whole)


def test_stages_are_all_there_are(tmp_path):
    with at_saving_stage(0, SAVE, disk_full) as seen:
        train_tiny(tmp_path)
    assert len(seen) == len(STAGES), seen
    assert seen[-1] == "rmtree"


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_disk_full_while_saving(tmp_path, whole, stage):
    with (
        at_saving_stage(stage, SAVE, disk_full) as seen,
        pytest.raises(TrainingError, match="No space left on device") as failed,
    ):
        train_tiny(tmp_path)
    assert len(str(failed.value).splitlines()) == 1
    assert "checkpoint of step 5" in str(failed.value), seen
    assert no_rubbish(tmp_path)
    assert Checkpoints(tmp_path).load()["step"] in (3, 5)
    resumes_exactly(tmp_path, whole)


def train_with_small_files(run_dir: Path, limit: int) -> None:
    """Exit code 3 where the training reports that the checkpoint cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train_tiny(run_dir)
    except TrainingError as error:
        one_line = len(str(error).splitlines()) == 1
        tidy = not list((run_dir / "checkpoints").iterdir())
        where = f"cannot save the checkpoint of step 3 in {run_dir / 'checkpoints'}"
        expected = f"{where}: File too large; there is no earlier one; raise the limit"
        os._exit(3 if one_line and tidy and expected in str(error) else 4)


@pytest.mark.parametrize("limit", [100_000, 2_500_000], ids=["model", "state"])
def test_write_that_really_fails(tmp_path, processes, limit):
    assert run_process(processes, train_with_small_files, tmp_path, limit) == 3


def train_with_tiny_files(run_dir: Path, limit: int) -> None:
    """Exit code 3 where the training reports that the run folder cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train_tiny(run_dir)
    except TrainingError as error:
        os._exit(3 if f"cannot write to {run_dir}: File too large; raise the limit" in str(error) else 4)


def test_record_that_really_cannot_be_written(tmp_path, processes):
    assert run_process(processes, train_with_tiny_files, tmp_path, 200) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_full_device(size):
    with pytest.raises((OSError, RuntimeError)) as failed:
        write_state({"weights": torch.zeros(size)}, Path("/dev/full"))
    assert one_line(failed.value) == os.strerror(errno.ENOSPC)
    assert disk_remedy(failed.value) == "make room or choose another place"
    assert disk_remedy(failed.value, elsewhere=False) == "make room"


def save_safetensors(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        save_file({"weights": torch.zeros(1000)}, folder / "model.safetensors")
    except Exception as error:
        os._exit(3 if one_line(error) == os.strerror(errno.EFBIG) else 4)


def test_reason_of_safetensors(tmp_path, processes):
    assert run_process(processes, save_safetensors, tmp_path) == 3


def test_interrupt_finishes_the_step_and_saves(tmp_path, whole):
    with (
        after_step(4, lambda: signal.raise_signal(signal.SIGINT)),
        pytest.raises(KeyboardInterrupt, match="after step 4"),
    ):
        train_tiny(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Checkpoints(tmp_path).load()["step"] == 4
    resumes_exactly(tmp_path, whole)


def test_second_interrupt_stops_at_once(tmp_path, whole):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with after_step(4, twice), pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path)
    assert Checkpoints(tmp_path).load()["step"] == 3
    resumes_exactly(tmp_path, whole)


def test_finished_run_returns_at_once(tmp_path):
    first = train_tiny(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    with after_step(1, disk_full):  # no step may be made
        again = train_tiny(tmp_path)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"} == before


def test_runs_begun_before_there_were_chunks_go_on(tmp_path):
    train_tiny(tmp_path, {"train.max_steps": 2})
    file = tmp_path / "checkpoints" / "last" / "training.pt"
    state = torch.load(file, weights_only=True)
    del state["tower_chunk"]
    torch.save(state, file)
    again = train_tiny(tmp_path, {"train.max_steps": 2})
    assert again.steps == 2


def test_official_recipe_with_parts_resumes(tmp_path):
    overrides = {"optim.recipe": "official", "train.accumulate": 2, "train.precision": "bf16"}
    train_tiny(tmp_path / "whole", overrides)
    with after_step(7, disk_full), pytest.raises(TrainingError):
        train_tiny(tmp_path / "parted", overrides)
    train_tiny(tmp_path / "parted", overrides)
    assert_same(outcome(tmp_path / "parted"), outcome(tmp_path / "whole"))
