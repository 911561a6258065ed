"""Name -> class. A name that is not there is answered with the nearest one that is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from xclip_lab.errors import ConfigError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'xclip'?"` where one of `known` is close to `name`, else an empty string.

    >>> did_you_mean("xlcip", ["xclip", "wti"])
    "; did you mean 'xclip'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """A table of plug-ins of one kind, filled by decorators where the plug-ins are defined."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter the decorated object under `name`."""

        def enter(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """The entry called `name`; raises ConfigError that lists what there is."""
        if not isinstance(name, str) or name not in self._entries:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{did_you_mean(str(name), self._entries)} "
                f"(known: {', '.join(sorted(self._entries))})"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
