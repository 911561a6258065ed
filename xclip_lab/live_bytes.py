"""How much memory the tensors of a computation take, operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it, in this thread, and are still there.

    Attributes:
        after: the count after each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.after: list[int] = []
        self._now = 0
        self._there: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):  # of tensors that were there before: views of them are free
            self._note(storage, 0)
        outputs = func(*args, **(kwargs or {}))
        for storage in _storages(outputs):
            self._note(storage, storage.nbytes())
        self.after.append(self._now)
        return outputs

    def _note(self, storage: UntypedStorage, size: int) -> None:
        place = storage._cdata
        if place in self._there:
            return

        def gone(_: object) -> None:
            del self._there[place]
            self._now -= size

        self._there[place] = weakref.ref(storage, gone)
        self._now += size


def _storages(values: object) -> Iterator[UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
