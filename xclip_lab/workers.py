"""Work in other processes that may hang, crash or be interrupted, and the rest goes on.

A damaged video can send a decoder into an endless loop or a segmentation fault; neither can be stopped from
within the process. Workers are fresh Python processes that import the function's module and nothing else of
the parent's. They are no children of the terminal: Ctrl-C reaches the parent alone, which kills them. One
that lost its parent ends: the same command may come again, and finds no rival.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from xclip_lab.errors import UserError

Item = TypeVar("Item")
_CHILD = (
    "import sys; sys.path[:] = {path!r}; from xclip_lab.workers import _serve; _serve({descriptor}, {parent})"
)


@dataclass(frozen=True)
class Outcome:
    """What became of one item: the function's value, or why there is none, in one line."""

    value: Any = None
    error: str | None = None


def usable_cores() -> int:
    """How many cores this process may use: a good number of workers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def watched(
    function: Callable[[Item], Any],
    items: Iterable[Item],
    workers: int,
    timeout_s: float,
    environments: Sequence[Mapping[str, str]] = (),
) -> Generator[tuple[int, Outcome], None, None]:
    """Run `function` on every item and yield each one's number and outcome, as they are finished.

    An item that takes longer than `timeout_s`, ends its process or raises has an `error`; a lost process is
    replaced. Closing the iterator, as Ctrl-C does, kills the workers.

    Args:
        function: of a module, not `__main__`; it, the items and the values must be picklable.
        items: taken one by one, as workers are free.
        workers: processes; 0 runs all in this one, without watchdog.
        timeout_s: seconds for one item, start-up and imports not counted.
        environments: of each worker, variables beside the parent's.
    """
    if workers == 0:
        for index, item in enumerate(items):
            yield index, attempt(function, item)
        return
    waiting = enumerate(items)
    busy: dict[Any, tuple[_Worker, int]] = {}  # by connection

    def give(worker: _Worker, index: int, item: Item) -> None:
        worker.send(function, item)
        busy[worker.connection] = worker, index

    try:
        for index, item in islice(waiting, workers):
            give(_Worker(timeout_s, environments[index] if environments else {}), index, item)
        while busy:
            for connection in wait(list(busy)):
                worker, index = busy.pop(connection)
                outcome = worker.receive()
                following = next(waiting, None)
                if following is None:
                    worker.kill()
                else:
                    give(worker, *following)
                yield index, outcome
    finally:
        for worker, _ in busy.values():
            worker.kill()


class _Worker:
    """A process that works on one item at a time; a new one where it was lost."""

    def __init__(self, timeout_s: float, environment: Mapping[str, str]) -> None:
        self.timeout_s, self.environment = timeout_s, environment
        self._start()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        code = _CHILD.format(path=sys.path, descriptor=theirs.fileno(), parent=os.getpid())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def send(self, function: Callable[[Item], Any], item: Item) -> None:
        task = pickle.dumps((function, item, self.timeout_s))
        try:
            self.connection.send_bytes(task)
        except OSError:  # it was lost
            self.kill()
            self._start()
            self.connection.send_bytes(task)

    def receive(self) -> Outcome:
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            code = self._process.wait()
        if code == -signal.SIGALRM:
            return Outcome(error=f"gave no answer in {self.timeout_s:g} s")
        if code >= 0:
            return Outcome(error=f"ended its process with exit code {code}")
        cause = " (out of memory?)" if code == -signal.SIGKILL else ""
        return Outcome(error=f"ended its process by {signal.Signals(-code).name}{cause}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # a garbage collector may have closed it
            self.connection.close()


def _serve(descriptor: int, parent: int) -> None:
    """What a worker does, until its parent closes the pipe or is no more."""
    threading.Thread(target=_end_without, args=[parent], daemon=True).start()
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):
        while True:
            connection.send_bytes(_answer(connection.recv_bytes()))


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _answer(task: bytes) -> bytes:
    try:
        function, item, timeout_s = pickle.loads(task)
        # The kernel's clock, without a handler: it ends the process whatever the function is stuck in, also
        # when the parent is no longer there to do it.
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        return pickle.dumps(attempt(function, item))
    except Exception as error:
        return pickle.dumps(Outcome(error=_in_one_line(error)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def attempt(function: Callable[[Item], Any], item: Item) -> Outcome:
    """The function's value, or its error in one line."""
    try:
        return Outcome(function(item))
    except Exception as error:
        return Outcome(error=_in_one_line(error))


def _in_one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    kind, text = type(error).__name__, " ".join(str(error).split())
    return f"{kind}: {text}" if text else kind
