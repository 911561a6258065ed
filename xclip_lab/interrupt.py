"""Ctrl-C that lets the work in hand finish."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

_NOTE = b"\nstopping after this step and saving; Ctrl-C once more stops at once\n"


class DelayedInterrupt:
    """While entered, the first SIGINT only sets `requested`; the second one raises KeyboardInterrupt.

    Loader workers that are forked meanwhile inherit this and outlive the first Ctrl-C of a terminal. Outside
    the main thread, where Python allows no handlers, it does nothing.

    Args:
        tell: say on stderr what the first SIGINT does; one process of a run is enough.
    """

    def __init__(self, tell: bool = True) -> None:
        self.requested = False
        self._teller = os.getpid() if tell else None

    def __enter__(self) -> DelayedInterrupt:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.getpid() == self._teller:
            os.write(2, _NOTE)
