"""A papermill engine for the terminal: Ctrl-C reaches the kernel, and the progress bars are seen."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from html import unescape
from typing import Any

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines

NAME = "xclip-lab"
_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())  # what it says of a failed notebook becomes one clear error
_REFERENCE = "IPY_MODEL_"  # ipywidgets' prefix of a reference to another widget
_PATIENCE = 3  # Ctrl-C so often ends the kernel whatever it does
_EVERY_SECONDS = {True: 0.1, False: 20.0}  # between two states of a bar, on a terminal and elsewhere


class TerminalEngine(Engine):
    """Runs a notebook with `TerminalClient`."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> Any:
        client = TerminalClient(
            nb_man,
            kernel_name=kernel_name,
            timeout=None,
            startup_timeout=120,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's own notes; a cell's errors are no such
            log=_LOG,
            stdout_file=kwargs["stdout_file"],
            stderr_file=kwargs["stderr_file"],
        )
        with client.forwarded_interrupts():
            # What the process writes past Python comes as a cell's output too; once is enough.
            return client.execute(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


papermill_engines.register(NAME, TerminalEngine)


class TerminalClient(PapermillNotebookClient):
    """papermill's client with the manners of a program in a terminal."""

    def __init__(self, nb_man: Any, **options: Any) -> None:
        super().__init__(nb_man, **options)
        self.interrupts = 0
        self._bar_shown = 0.0
        self._bar_open = False

    def forwarded_interrupts(self) -> ForwardedInterrupts:
        """While entered, Ctrl-C goes to the kernel, which lives in a session that no terminal reaches."""
        return ForwardedInterrupts(self)

    def execute_cell(self, cell: Any, cell_index: int, *args: Any, **kwargs: Any) -> Any:
        # Between two cells a kernel ignores the signal.
        if self.interrupts:
            raise KeyboardInterrupt
        done = super().execute_cell(cell, cell_index, *args, **kwargs)
        if self.interrupts:
            raise KeyboardInterrupt
        return done

    def log_output_message(self, output: Any) -> None:
        self._end_bar()
        super().log_output_message(output)

    def handle_comm_msg(self, outs: Any, msg: Any, cell_index: int) -> None:
        """In a notebook tqdm's bars are widgets; show the text of the one that has just changed."""
        super().handle_comm_msg(outs, msg, cell_index)
        changed = msg["content"]["comm_id"]
        if self.stderr_file is not None and "value" in msg["content"]["data"].get("state", {}):
            for state in self.widget_state.values():
                if f"{_REFERENCE}{changed}" in (state.get("children") or ()):
                    self._show_bar(state["children"])

    def _show_bar(self, children: list[str]) -> None:
        """`children` are a bar's: the text on its left, the bar, the text on its right."""
        values = [
            self.widget_state.get(child.removeprefix(_REFERENCE), {}).get("value") for child in children
        ]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        terminal = self.stderr_file.isatty()
        now = time.monotonic()
        if len(texts) < 2 or now - self._bar_shown < _EVERY_SECONDS[terminal]:
            return
        self._bar_shown = now
        line = unescape(" ".join(text.strip() for text in texts)).replace("\u2007", " ")
        if terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            self.stderr_file.write(f"\r{line}\x1b[K")
            self._bar_open = True
        else:
            self.stderr_file.write(line + "\n")
        self.stderr_file.flush()

    def _end_bar(self) -> None:
        if self._bar_open:
            self.stderr_file.write("\r\x1b[K")
            self.stderr_file.flush()
            self._bar_open = False


class ForwardedInterrupts:
    """Sends SIGINT on to a client's kernel. Does nothing outside the main thread: only that gets signals."""

    def __init__(self, client: TerminalClient) -> None:
        self.client = client

    def __enter__(self) -> None:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *error: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
        self.client._end_bar()

    def _handle(self, number: int, frame: object) -> None:
        self.client.interrupts += 1
        provisioner = getattr(self.client.km, "provisioner", None)
        pid = getattr(provisioner, "pid", None)
        if pid is None or self.client.interrupts >= _PATIENCE:
            raise KeyboardInterrupt
        print(file=sys.stderr)
        os.killpg(pid, signal.SIGINT)
