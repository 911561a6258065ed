"""Work in other processes: what hangs, crashes or raises is told, and the rest is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shared import ROOT
from xclip_lab.errors import VideoError
from xclip_lab.workers import Outcome, watched


def behave(what: str) -> object:
    if what == "hang":
        time.sleep(600)
    if what.startswith("die "):
        os.kill(os.getpid(), signal.Signals[what.removeprefix("die ")])
    if what == "leave":
        sys.exit(3)
    if what == "refuse":
        raise VideoError("a.mp4: PyAV: not a video")
    if what == "raise":
        raise ValueError("two\nlines")
    return (lambda: 0) if what == "unpicklable" else what.upper()


def busy_loop(_: int) -> None:
    """Holds the interpreter's lock: no Python code of the process can stop it."""
    while True:
        sum(range(10**9))


def write_pid_and_hang(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def outcomes(items: list[str], workers: int, timeout_s: float = 5.0) -> list[Outcome]:
    found = dict(watched(behave, items, workers, timeout_s))
    assert sorted(found) == list(range(len(items)))
    return [found[index] for index in range(len(items))]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_values_and_errors(workers):
    assert outcomes(["a", "refuse", "raise", "b"], workers) == [
        Outcome("A"),
        Outcome(error="a.mp4: PyAV: not a video"),
        Outcome(error="ValueError: two lines"),
        Outcome("B"),
    ]


def test_lost_processes_are_replaced():
    items = ["a", "die SIGSEGV", "b", "hang", "die SIGKILL", "leave", "unpicklable", "c", "d"]
    found = outcomes(items, workers=2, timeout_s=1.0)
    assert [outcome.value for outcome in found] == ["A", None, "B", None, None, None, None, "C", "D"]
    errors = [outcome.error for outcome in found if outcome.error]
    assert errors[:4] == [
        "ended its process by SIGSEGV",
        "gave no answer in 1 s",
        "ended its process by SIGKILL (out of memory?)",
        "ended its process with exit code 3",
    ]
    assert "behave.<locals>.<lambda>" in errors[4]


def test_a_hang_that_holds_the_lock_is_ended():
    [(_, outcome)] = watched(busy_loop, [0], workers=1, timeout_s=0.5)
    assert outcome.error == "gave no answer in 0.5 s"


def test_what_is_done_first_comes_first():
    assert [index for index, _ in watched(time.sleep, [1.0, 0.0, 0.0], workers=2, timeout_s=9)] == [1, 2, 0]


def test_items_are_taken_as_workers_are_free():
    taken = []
    stream = watched(abs, (taken.append(number) or number for number in range(100)), 2, 9)
    next(stream)
    stream.close()
    assert len(taken) <= 4


def test_a_forgotten_iterator_goes_in_silence():
    """The garbage collector may finalize the connections before it closes the iterator."""
    stream = watched(time.sleep, [0.0, 600.0, 600.0], workers=2, timeout_s=600)
    next(stream)
    busy = dict(stream.gi_frame.f_locals["busy"])
    assert len(busy) == 2
    for connection in busy:
        connection.__del__()
    stream.close()
    assert all(worker._process.returncode == -signal.SIGKILL for worker, _ in busy.values())


def test_nothing_to_do():
    assert list(watched(behave, [], workers=2, timeout_s=1)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, number):
    """Ctrl-C kills a worker at once; one whose parent was killed ends in a moment, whatever it does."""
    code = (
        "from tests.unit.test_workers import write_pid_and_hang, watched\n"
        f"list(watched(write_pid_and_hang, [{str(tmp_path / 'pid')!r}], 1, 600))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    worker = int((tmp_path / "pid").read_text())
    os.killpg(parent.pid, number)  # as a terminal does it: all that stand in its group
    _, complaint = parent.communicate(timeout=10)
    assert complaint.count("Traceback") == (number == signal.SIGINT)
    wait_until(lambda: not alive(worker))


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has buried yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_import_no_more_than_the_function_needs():
    [(_, outcome)] = watched(modules_that_start_with, ["torch"], workers=1, timeout_s=9)
    assert outcome.value == []


def modules_that_start_with(name: str) -> list[str]:
    return [module for module in sys.modules if module.partition(".")[0] == name]
