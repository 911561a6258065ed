"""Two real processes over gloo make the steps of one, and end in one clear line when one of them dies."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit import training
from tests.unit.ranks import complaint, returned, run_ranks
from tests.unit.tiny import TINY
from tests.unit.training import (
    STEPS,
    NoisyModel,
    after_step,
    assert_same,
    at_saving_stage,
    die,
    film,
    frames_of,
    outcome,
    real_processes,
    tiny_config,
    tiny_dataset,
    train_tiny,
)
from xclip_lab import Batch, batching, create_model, load_config, train
from xclip_lab.__main__ import main
from xclip_lab.checkpoint import load_model, save_model
from xclip_lab.clips import FrameStore
from xclip_lab.config import presets
from xclip_lab.distributed import PeerLost, Ranks, connected, joined, local_device
from xclip_lab.errors import TrainingError
from xclip_lab.model import RetrievalModel, official_name
from xclip_lab.optim import create_optimizer
from xclip_lab.result import Result
from xclip_lab.resume import Checkpoints
from xclip_lab.step import Stepper

PAIRS = 6
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "xclip_lab"]


@pytest.fixture(scope="module")
def processes():
    context = real_processes()
    context.set_forkserver_preload([__name__, "torch.utils.tensorboard"])
    return context


def pairs(rows: list[int]) -> Batch | None:
    """Some of six pairs that are the same in every process; None for none."""
    if not rows:
        return None
    torch.manual_seed(1)
    ids = torch.randint(1, 58, (PAIRS, 8))
    for row, length in enumerate(torch.randint(2, 9, (PAIRS,))):
        ids[row, length - 1], ids[row, length:] = 59, 0
    frame_mask = (torch.arange(4) < torch.randint(1, 5, (PAIRS, 1))).long()
    video = torch.randint(0, 256, (PAIRS, 4, 3, 32, 32), dtype=torch.uint8)
    return Batch(ids[rows], (ids > 0).long()[rows], video[rows], frame_mask[rows])


def step(
    rows: list[list[list[int]]], preset: str = "quickstart", dropout: bool = False, **settings
) -> tuple[dict, dict]:
    """One step: its numbers, and each parameter's gradient.

    Args:
        rows: of each process, of each part.
    """
    with joined("cpu") as ranks:
        config = load_config(preset, TINY | {"optim.max_grad_norm": 1e9} | settings)
        torch.manual_seed(0)
        model = create_model(config).train(dropout)
        named = [(official_name(name), parameter) for name, parameter in model.named_parameters()]
        optimizer = create_optimizer(named, config.optim, total_steps=10)
        stepper = Stepper(model, optimizer, config, ranks, torch.device("cpu"), Path("last"))
        numbers = stepper.make(1, [pairs(part) for part in rows[ranks.rank]])
        return numbers, {name: parameter.grad for name, parameter in model.named_parameters()}


def step_of_two(processes, folder: Path, rows: list[list[list[int]]], **settings) -> tuple[dict, dict]:
    assert run_ranks(processes, folder, functools.partial(step, rows, **settings)) == [0, 0]
    numbers, gradients = returned(folder, 0)
    others, other_gradients = returned(folder, 1)
    assert numbers == others
    assert_same(other_gradients, gradients)
    return numbers, gradients


def assert_equal_steps(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    for name, gradient in expected[1].items():
        if gradient is None:
            assert found[1][name] is None, name
        else:
            assert_equal_gradients(name, found[1][name], gradient)


def assert_equal_gradients(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 2e-6 of the tensor's largest entry, or of 1: the processes add up in another order."""
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    assert error < 2e-6, (name, error.item())


@pytest.mark.parametrize("preset", [name for name in presets() if name.startswith("quickstart")])
def test_gradients_are_those_of_one_process(processes, tmp_path, preset):
    """Of every method."""
    whole = step([[[0, 1, 2, 3, 4, 5]]], preset)
    found = step_of_two(processes, tmp_path, [[[0, 1, 2]], [[3, 4, 5]]], preset=preset)
    assert_equal_steps(found, whole)


def scored(rows: list[list[list[int]]], preset: str) -> list[tuple[int, int]]:
    """Of a step, how many texts and videos this process gave to the head."""
    seen: list[tuple[int, int]] = []
    forward = RetrievalModel._head_output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RetrievalModel,
            "_head_output",
            lambda model, text, video: seen.append((len(text), len(video))) or forward(model, text, video),
        )
        step(rows, preset)
    return seen


@pytest.mark.parametrize(
    ("preset", "shares"), [("quickstart", [(4, 6), (2, 6)]), ("quickstart-glscl", [(6, 6), (6, 6)])]
)
def test_processes_share_the_rows_of_the_loss(processes, tmp_path, preset, shares):
    rows = [[[0, 1, 2, 3]], [[4, 5]]]
    assert run_ranks(processes, tmp_path, functools.partial(scored, rows, preset)) == [0, 0]
    assert [returned(tmp_path, rank) for rank in range(2)] == [[share] for share in shares]


def test_cached_gradients_are_those_of_one_process(processes, tmp_path):
    whole = step([[[0, 1, 2, 3, 4, 5]]])
    found = step_of_two(processes, tmp_path, [[[0, 1, 2]], [[3, 4, 5]]], **{"train.tower_chunk": 2})
    assert_equal_steps(found, whole)


def test_dropout_of_the_head_is_that_of_one_process(processes, tmp_path):
    """Behind the gather, where `tightTransf` has it."""
    preset, rows = "quickstart-tightTransf", [0, 1, 2, 3, 4, 5]
    whole = step([[rows]], preset, dropout=True)
    found = step_of_two(processes, tmp_path, [[rows[:3]], [rows[3:]]], preset=preset, dropout=True)
    assert_equal_steps(found, whole)
    with pytest.raises(AssertionError):  # it is on, and the comparison sees it
        assert_equal_steps(found, step([[rows]], preset))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([[0, 1, 2, 3]], [[4]]),
        ([[]], [[0, 1, 2]]),
        ([[0, 1], [4]], [[2], []]),
        ([[0, 1], []], [[2], []]),
    ],
    ids=["unequal", "none in one", "parts", "none in a part"],
)
def test_broken_videos_leave_the_gradients_exact(processes, tmp_path, first, second):
    """Processes with unequal numbers of pairs, or none, against one process with all of them."""
    parts = [mine + its for mine, its in zip(first, second, strict=True)]
    found = step_of_two(processes, tmp_path, [first, second])
    assert_equal_steps(found, step([parts]))


def test_a_step_without_any_pair_updates_nothing(processes, tmp_path):
    numbers, gradients = step_of_two(processes, tmp_path, [[[]], [[]]])
    assert numbers == {"pairs": 0}
    assert all(gradient is None for gradient in gradients.values())


def test_official_gradients_are_halved_before_the_gather_only(processes, tmp_path):
    """Ledger 7."""
    official = {"train.gather_gradients": "official"}
    _, whole = step([[[0, 1, 2, 3, 4, 5]]])
    _, found = step_of_two(processes, tmp_path, [[[0, 1, 2]], [[3, 4, 5]]], **official)
    for name, gradient in whole.items():
        after = name.startswith("head.") or name == "clip.logit_scale"
        assert_equal_gradients(name, found[name], gradient if after else gradient / 2)


def train_alike(run_dir: Path, folder: Path, overrides: dict) -> tuple[dict, int]:
    """Train without dropout on files, with validation. Returns the result and how often this process
    validated."""
    calls = 0
    real = train.evaluate

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    train.evaluate = counted
    try:
        torch.set_num_threads(1)
        config = tiny_config({"evaluation.bootstrap": 0, **overrides})
        dataset = film(tiny_dataset(8), folder)
        torch.manual_seed(int(os.environ.get("RANK", 0)))  # the first process's weights are everyone's
        model = NoisyModel(config.model)
        model.dropout.p = 0.0
        result = train.fit(model, config, dataset, run_dir, val=dataset, progress=False)
    finally:
        train.evaluate = real
    return vars(result), calls


@pytest.mark.parametrize(
    "overrides", [{"data.workers": 1}, {"data.preload": True, "train.accumulate": 2}], ids=["decode", "parts"]
)
def test_a_run_of_two_processes_is_that_of_one(processes, tmp_path, overrides):
    for name in ("alone", "0", "1"):
        (tmp_path / name).mkdir()
    alone, validated = train_alike(tmp_path / "alone/run", tmp_path / "alone", overrides)
    codes = run_ranks(processes, tmp_path, functools.partial(_train_in_own_folder, tmp_path, overrides))
    assert codes == [0, 0]
    (found, first_validated), (other, other_validated) = returned(tmp_path, 0), returned(tmp_path, 1)
    assert (validated, first_validated, other_validated) == (2, 2, 2)
    assert other == found
    assert found["steps"] == alone["steps"] == 4
    assert found["stamp"] == pytest.approx(alone["stamp"])
    clocks = {"seconds", "pairs_per_second", "wait"}
    for row, expected in zip(found["history"], alone["history"], strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - clocks:
            assert row[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-5), (row["step"], key)
    assert {path.name for path in (tmp_path / "0/run").iterdir()} == {
        path.name for path in (tmp_path / "alone/run").iterdir()
    }
    assert not (tmp_path / "1/run").exists()


def _train_in_own_folder(folder: Path, overrides: dict) -> tuple[dict, int]:
    """As on two machines: nothing of the other process's folder is seen."""
    own = folder / os.environ["RANK"]
    return train_alike(own / "run", own, overrides)


def train_two(run_dir: Path, overrides: dict | None = None) -> dict:
    return vars(train_tiny(run_dir, overrides))


def train_two_and_act(run_dir: Path, rank: int, after: int, act) -> dict:
    """One of the processes does something after a step."""
    if int(os.environ["RANK"]) != rank:
        return train_two(run_dir)
    with after_step(after, act):
        return train_two(run_dir)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """What ten uninterrupted steps of two processes, with dropout, come to."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(processes, folder, train_two, folder / "run") == [0, 0]
    return outcome(folder / "run")


def resumes_exactly(processes, folder: Path, whole) -> None:
    assert run_ranks(processes, folder, train_two, folder / "run") == [0, 0]
    assert returned(folder, 1)["steps"] == STEPS
    assert_same(outcome(folder / "run"), whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed(processes, tmp_path, whole, rank):
    codes = run_ranks(processes, tmp_path, train_two_and_act, tmp_path / "run", rank, 7, die)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 2
    line = complaint(tmp_path, 1 - rank)
    assert line.startswith("step 7: another process of the run has ended (")
    last = tmp_path / "run/checkpoints/last"
    assert line.endswith(f"the checkpoint of step 6 in {last} is good: the same command goes on from there")
    assert len(line.splitlines()) == 1
    resumes_exactly(processes, tmp_path, whole)


def test_a_rank_that_is_killed_before_any_checkpoint(processes, tmp_path, whole):
    codes = run_ranks(processes, tmp_path, train_two_and_act, tmp_path / "run", 1, 1, die)
    assert codes == [2, -signal.SIGKILL]
    assert complaint(tmp_path, 0).endswith("there is no checkpoint yet: the same command begins anew")
    resumes_exactly(processes, tmp_path, whole)


def train_two_and_die_while_saving(run_dir: Path) -> dict:
    if os.environ["RANK"] != "0":
        return train_two(run_dir)
    with at_saving_stage(10, 2, die):
        return train_two(run_dir)


def test_the_first_rank_is_killed_while_saving(processes, tmp_path, whole):
    codes = run_ranks(processes, tmp_path, train_two_and_die_while_saving, tmp_path / "run")
    assert codes == [-signal.SIGKILL, 2]
    assert complaint(tmp_path, 1).startswith("step 5: another process of the run has ended (")
    resumes_exactly(processes, tmp_path, whole)


@pytest.mark.parametrize(("rank", "act"), [(0, interrupt), (1, interrupt), (1, terminate)])
def test_all_ranks_stop_after_the_same_step(processes, tmp_path, whole, rank, act):
    codes = run_ranks(processes, tmp_path, train_two_and_act, tmp_path / "run", rank, 4, act)
    assert codes == [130, 130]
    assert Checkpoints(tmp_path / "run").load()["step"] == 4
    resumes_exactly(processes, tmp_path, whole)


def train_two_and_be_stopped_early(run_dir: Path) -> None:
    """torchrun stops the first process while something slow comes before the steps."""
    if os.environ["RANK"] == "0":
        Stepper.choose_chunk = lambda stepper: terminate() or time.sleep(60)
    train_two(run_dir)


def test_a_rank_that_is_stopped_before_the_steps_ends_at_once(processes, tmp_path):
    assert run_ranks(processes, tmp_path, train_two_and_be_stopped_early, tmp_path / "run") == [2, 2]
    assert complaint(tmp_path, 0).startswith("before the first step: stopped by SIGTERM")


def train_two_and_be_stopped_later(run_dir: Path) -> None:
    """What follows a training is as easily stopped as what precedes one."""
    with joined("cpu"):
        train_two(run_dir)
        with pytest.raises(PeerLost):
            terminate()
        terminate()  # what ends because of the first is not disturbed


def test_after_a_training_a_stop_is_heard_again(processes, tmp_path):
    assert run_ranks(processes, tmp_path, train_two_and_be_stopped_later, tmp_path / "run") == [0, 0]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"), True),
        (torch.distributed.DistBackendError("NCCL error in: NCCLUtils.hpp:275, remote process exited"), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_only_broken_connections_count_as_the_end_of_another_process(error, lost):
    with pytest.raises(PeerLost if lost else type(error)) as raised, connected():
        raise error
    assert (raised.value is error) != lost
    if lost:
        assert str(raised.value).startswith("another process of the run has ended (")


def train_with_broken(run_dir: Path, accumulate: int) -> dict:
    """The videos of places 4 to 7, 10 and 11 of the first epoch's order are broken."""
    config = tiny_config({"data.on_error": "skip", "train.accumulate": accumulate})
    dataset = tiny_dataset()
    order = batching.epoch_order(len(dataset), config.seed, epoch=0)
    broken = {dataset.samples[order[place]].video_id for place in (4, 5, 6, 7, 10, 11)}
    store = frames_of(dataset)
    kept = {name: clip for name, clip in store.clips.items() if name not in broken}
    torch.manual_seed(config.seed)
    model = NoisyModel(config.model)
    model.dropout.p = 0.0
    store = FrameStore(kept, {name: f"{name}: damaged" for name in broken})
    return vars(train.fit(model, config, dataset, run_dir, store=store, progress=False))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_broken_videos_in_a_run(processes, tmp_path, accumulate):
    alone = train_with_broken(tmp_path / "alone", accumulate)
    codes = run_ranks(processes, tmp_path, train_with_broken, tmp_path / "run", accumulate)
    assert codes == [0, 0]
    found = returned(tmp_path, 0)
    assert [row["pairs"] for row in found["history"]] == [row["pairs"] for row in alone["history"]]
    assert [row["pairs"] for row in found["history"][:3]] == [4, 0, 2]
    losses = [row["loss"] for row in found["history"] if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in alone["history"] if "loss" in row], abs=1e-5)
    assert found["broken"] == alone["broken"]


def test_a_batch_that_does_not_divide_is_refused(processes, tmp_path):
    overrides = {"train.batch_size": 5}
    assert run_ranks(processes, tmp_path, train_two, tmp_path / "run", overrides) == [2, 2]
    line = "train.batch_size: 2 processes cannot share a batch of 5 in 1 part(s) equally"
    assert complaint(tmp_path, 0) == f"{line}; a batch of 4 or 6 they can"


def train_differently(run_dir: Path) -> dict:
    return train_two(run_dir, {"train.epochs": 1 + int(os.environ["RANK"])})


def test_processes_that_were_started_differently(processes, tmp_path):
    assert run_ranks(processes, tmp_path, train_differently, tmp_path / "run") == [2, 2]
    assert "not started as the first one: train.epochs (1 there, 2 here)" in complaint(tmp_path, 1)
    assert complaint(tmp_path, 0).startswith("before the first step: another process of the run has ended")


def test_a_device_for_several_processes():
    assert local_device("cuda:1", world=1, local_rank=0) == "cuda:1"
    with pytest.raises(TrainingError, match=r"'cuda:1' does not serve several processes; give auto, cpu or"):
        local_device("cuda:1", world=2, local_rank=0)


def test_alone_without_torchrun():
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    assert Ranks().exchange([1, 2]) == [[1, 2]]
    assert Ranks().collect("a") == ["a"]


def small_run(folder: Path) -> list[str]:
    """Arguments of a run of seconds."""
    sizes = {"data.generate.train_clips": 24, "data.generate.test_clips": 12, "data.generate.size": 32}
    sizes |= {"data.generate.frames": 8, "towers.architecture.image_size": 32, "train.batch_size": 4}
    sizes |= {"towers.architecture.vision_layers": 1, "max_frames": 4, "train.epochs": 2}
    sizes |= {"data.root": folder / "data", "run-dir": folder / "run"}
    return ["train", "--preset", "quickstart", *(f"--{key}={value}" for key, value in sizes.items())]


def test_the_commands_under_torchrun(tmp_path, capsys):
    done = subprocess.run([*TORCHRUN, *small_run(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"run folder {tmp_path / 'run'}") == 1
    assert done.stdout.count("trained for 12 steps") == 1
    history = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert history[-1]["step"] == 12
    assert main(small_run(tmp_path)) == 0  # a finished run is one process's as well
    assert "trained for 12 steps" in capsys.readouterr().out
    assert training.resume.read_stamp(tmp_path / "run/checkpoints/best", tmp_path / "run")["step"] == 12
    words = ["evaluate", str(tmp_path / "run"), "--evaluation.batch_size=4", "--out"]
    assert main([*words, str(tmp_path / "alone")]) == 0
    command = [*TORCHRUN, *words, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"saved in {tmp_path / 'two'}") == 1
    alone, two = Result.load(tmp_path / "alone"), Result.load(tmp_path / "two")
    np.testing.assert_allclose(two.similarity, alone.similarity, rtol=1e-4, atol=1e-4)
    assert two.metrics == alone.metrics
    assert two.stamp == alone.stamp
    other = shutil.copytree(tmp_path / "run", tmp_path / "run1")  # the first one's weights count
    model = load_model(other)
    torch.nn.init.normal_(model.head.word_logit_weight)
    save_model(model, other / "checkpoints/best")
    (tmp_path / "run0").symlink_to(tmp_path / "run")
    words = f"{sys.executable} -m xclip_lab evaluate {tmp_path}/run$RANK --evaluation.batch_size=4"
    command = [*TORCHRUN[:-2], "--no-python", "bash", "-c", f"exec {words} --out {tmp_path}/mixed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    mixed = Result.load(tmp_path / "mixed")
    np.testing.assert_allclose(mixed.similarity, two.similarity, rtol=1e-4, atol=1e-4)
