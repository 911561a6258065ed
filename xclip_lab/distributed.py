"""Several processes, one run: with torchrun a run makes the steps of one process with the whole batch, and an
evaluation its scores.

Two processes on one machine; and two machines with eight GPUs each, where the second says `--node-rank 1`:

    torchrun --nproc-per-node 2 -m xclip_lab train --preset quickstart
    torchrun --nproc-per-node 2 -m xclip_lab evaluate runs/my-run
    torchrun --nnodes 2 --node-rank 0 --master-addr FIRST_MACHINE --nproc-per-node 8 \\
        -m xclip_lab train --preset quickstart --run-dir runs/wide

`train.batch_size` is the batch of the whole run; each process reads its share of it, so every machine needs
the data and what `train.init` names (generated clips are made where they are missing). With `data.preload`
each process keeps all frames. The first process (rank 0, on the machine of node rank 0) alone holds the run
folder and saves; the others get weights and state from it, so the machines need no common disk for a training
(an evaluation reads its checkpoint on each, then takes the first one's weights). In an evaluation, and a
validation, each process encodes its share of the videos, and encodes, scores and ranks its share of the
captions; then every process has all of it.
Processes on GPUs take one each (`cuda:LOCAL_RANK`) and speak NCCL, on the CPU gloo; the tests run gloo.

How it is exact. Every process computes the same loss of all scores of the batch, of which it makes the rows
of its own texts; the gradient of that loss for its rows, times the number of processes, flows back, to its
texts and to the videos of all, whose processes add up what they get; then the gradients of all parameters
are averaged. For towers, `agg_module`, head and logit_scale alike this is the gradient of one process with
the whole batch. Where a score is not made of its own text and video alone (GLSCL's losses, the dropout of
`tightTransf`), or a process has no pair, each one scores all texts with all videos, and the gradient flows
back to its own rows. So it does with `official`, which leaves out the factor, as the papers' code does: what
lies before the gather gets 1 / processes of its gradient, the rest all of it (ledger 7). A model that lets a
video's features depend on the rest of its batch (ledger 3, 14) sees the rows of its own process as that rest.
Dropout behind the gather (`tightTransf`) is that of one process too; before it (GLSCL's decoder, which takes
one modality) each process draws for its own rows, by its number, and so other numbers than one process would.

When a process dies, the connections of the others break: each ends with one line, and the same command goes
on from the last checkpoint. GPUs would wait for a dead one instead, so before each exchange between them the
processes meet on the CPU, where no wait outlives a broken connection.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xclip_lab.errors import TrainingError
from xclip_lab.model import Complete, as_it_is
from xclip_lab.tokens import TokenSet

_TO_APPEAR = timedelta(minutes=10)
_TO_MEET = timedelta(days=1)  # the first process may make data for long
_BROKEN = re.compile(r"\bgloo\b|connection|broken pipe|timed out", re.IGNORECASE)


class PeerLost(TrainingError):
    """Another process of the run has ended, or cannot be reached."""


class Ranks:
    """This process's place among those of a run. The default is a process alone, for which all that follows
    does nothing.

    Attributes:
        rank: its number from 0. world: how many there are. local_rank: its number on its machine.
        terminated: it was sent SIGTERM, as torchrun does when one has died and when it is stopped itself.
        patient: what is in hand looks at that and ends well, as a training's step; else SIGTERM is an error.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.terminated = self.patient = False
        self._cpu: dist.ProcessGroup | None = None
        if world > 1:
            self._cpu = dist.new_group(backend="gloo", timeout=_TO_MEET)  # type: ignore[assignment]

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Within the block `patient` is set."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before

    @property
    def first(self) -> bool:
        """Whether this is the process that keeps the run folder."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """What the setting `train.device` means for this process. Raises TrainingError: no such device."""
        return resolve_device(local_device(name, self.world, self.local_rank))

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every process's numbers, equally many each, in the order of ranks."""
        if self.world == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.world)]
        with connected():
            dist.all_gather(found, own, group=self._cpu)
        return [one.tolist() for one in found]

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set in one process at least, or one was sent SIGTERM."""
        return any(one for [one] in self.exchange([flag or self.terminated]))

    def share(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        box = [value]
        with connected():
            dist.broadcast_object_list(box, src=0, group=self._cpu)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        with connected():
            dist.all_gather_object(found, value, group=self._cpu)
        return found

    def union(self, own: Mapping[str, str]) -> dict[str, str]:
        """The entries of every process's mapping."""
        return {key: value for of in self.collect(dict(own)) for key, value in of.items()}

    def shares(self, count: int, unit: int) -> list[slice]:
        """`count` rows in one stretch a process, equally many but for whole `unit`s; some may be empty."""
        units = -(-count // unit)
        edges = [min(count, units * rank // self.world * unit) for rank in range(self.world + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def complete(self, rows: Tensor, shares: Sequence[slice]) -> None:
        """Give every process all rows of a tensor on the CPU of which each has filled its share, in place."""
        if self.world == 1:
            return
        for rank, share in enumerate(shares):
            with connected():
                dist.broadcast(rows[share], src=rank, group=self._cpu)

    def largest(self, values: Tensor) -> None:
        """Give every process the elementwise maximum of a tensor on the CPU, in place."""
        if self.world > 1:
            with connected():
                dist.all_reduce(values, dist.ReduceOp.MAX, group=self._cpu)

    def wait(self) -> None:
        """Until every process is here."""
        self.exchange([0])

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the first one's parameters and buffers, in place."""
        if self.world == 1:
            return
        self.wait()
        for value in model.state_dict().values():
            with connected():
                dist.broadcast(value, src=0)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes; what has none in any of them keeps none."""
        if self.world == 1:
            return
        parameters = list(parameters)
        there = self.exchange([parameter.grad is not None for parameter in parameters])
        used = [parameter for parameter, *of in zip(parameters, *there, strict=True) if any(of)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        with connected():
            dist.all_reduce(flat)
        flat /= self.world
        means = flat.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, mean in zip(used, gradients, means, strict=True):
            parameter.grad = gradient.copy_(mean.view_as(gradient))


def gather_pairs(
    ranks: Ranks, text: TokenSet, video: TokenSet, official: bool, pairs_alone: bool = False
) -> tuple[TokenSet, TokenSet, Complete]:
    """What this process is to score, with what makes of that the scores of all: all texts and videos; or,
    where that comes to the same, its own texts and all videos.

    Args:
        text, video: this process's pairs, the same number of each; other processes may have other numbers,
            also none.
        official: pass gradients back as they are, not times the number of processes (ledger 7).
        pairs_alone: as `Head.pairs_alone`.
    """
    if ranks.world == 1:
        return text, video, as_it_is
    sizes = [size for [size] in ranks.exchange([len(text)])]

    def join(own: Tensor) -> Tensor:
        return _joined_rows(ranks, own, sizes, 1 if official else ranks.world)

    if official or not pairs_alone or 0 in sizes:
        return text.map(join), video.map(join), as_it_is
    return text, video.map(lambda own: _SharedRows.apply(own, ranks, sizes)), join


def _joined_rows(ranks: Ranks, own: Tensor, sizes: Sequence[int], factor: int) -> Tensor:
    """The rows of all processes, in the order of ranks; this one's with `factor` times their gradient."""
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own.detach()
    found = [torch.empty_like(padded) for _ in sizes]
    ranks.wait()
    with connected():
        dist.all_gather(found, padded)
    rows = [one[:size] for one, size in zip(found, sizes, strict=True)]
    rows[ranks.rank] = _with_gradient_times(factor, own)
    return torch.cat(rows)


class _SharedRows(torch.autograd.Function):
    """The rows of all processes; this one's take the sum of the gradients that all have for them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, sizes: Sequence[int]) -> Tensor:
        ctx.ranks, ctx.own = ranks, slice(sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1]))
        return _joined_rows(ranks, own, sizes, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradient = grads[0].clone(memory_format=torch.contiguous_format)  # it may be another node's too
        ctx.ranks.wait()
        with connected():
            dist.all_reduce(gradient)
        return gradient[ctx.own], None, None


def _with_gradient_times(factor: int, value: Tensor) -> Tensor:
    value = value.view_as(value)
    if value.requires_grad:
        value.register_hook(lambda gradient: gradient * factor)
    return value


_joined: Ranks | None = None


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Within the block: this process among those that torchrun started with it, by the environment variables
    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; alone where they are not set. Blocks may nest.

    Args:
        device: `train.device`.

    Raises:
        TrainingError: the device is none for several processes, or the others cannot be reached.
    """
    global _joined
    world = int(os.environ.get("WORLD_SIZE", 1))
    if _joined is not None or world == 1:
        yield _joined or Ranks()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    name = local_device(device, world, local_rank)
    try:
        backend = "nccl" if name.startswith("cuda") else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=_TO_APPEAR)
        _joined = Ranks(rank, world, local_rank)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"cannot reach the other processes of the run: {_reason(error)}") from error
    restore = _note_sigterm(_joined)
    try:
        yield _joined
        # Not after an error: the process is about to end, a dead one would keep this waiting, and torchrun's
        # SIGTERM must not end it before it has said why.
        dist.destroy_process_group()
        restore()
    except BaseException:
        _joined.patient = True
        raise
    finally:
        _joined = None


@contextmanager
def first_speaks(ranks: Ranks) -> Iterator[None]:
    """Within the block only the first process prints and tells that Ctrl-C stopped the run."""
    if ranks.first:
        yield
        return
    with redirect_stdout(None):
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU.

    Raises:
        TrainingError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # `meta` has no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise TrainingError(f"train.device: {name!r} cannot be used here; try auto or cpu") from error
    return device


def local_device(name: str, world: int, local_rank: int) -> str:
    """`train.device` for one of `world` processes: where they use GPUs, each has its own.

    Raises:
        TrainingError: more processes on this machine than GPUs, or a device that they cannot share.

    >>> local_device("cpu", world=2, local_rank=1)
    'cpu'
    """
    if world == 1:
        return name
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if name not in ("auto", "cuda"):
        raise TrainingError(
            f"train.device: {name!r} does not serve several processes; give auto, cpu or cuda"
        )
    if local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"there are {torch.cuda.device_count()} GPUs here; start at most so many processes on this "
            "machine (torchrun --nproc-per-node), or set train.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def _note_sigterm(ranks: Ranks) -> Callable[[], Any]:
    """Make SIGTERM set `ranks.terminated`, and raise `PeerLost` where nothing looks at that: what is in hand
    ends with a clear line either way.

    Returns what undoes it. Outside the main thread, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def note(number: int, frame: object) -> None:
        again, ranks.terminated = ranks.terminated, True
        if not (ranks.patient or again):
            raise PeerLost("stopped by SIGTERM: another process of the run has ended, or all are stopped")

    previous = signal.signal(signal.SIGTERM, note)
    return lambda: signal.signal(signal.SIGTERM, previous)


@contextmanager
def connected() -> Iterator[None]:
    """The error of a broken connection, for which torch has several kinds, as `PeerLost`. All others pass."""
    try:
        yield
    except RuntimeError as error:
        # gloo's are plain RuntimeErrors; subclasses, such as that of a full GPU, are not of a connection.
        of_gloo = type(error) is RuntimeError and _BROKEN.search(str(error))
        if not (of_gloo or isinstance(error, dist.DistError)):
            raise
        raise PeerLost(f"another process of the run has ended ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The first sentence of an error, without the place in the C++ code that gloo puts before it."""
    text = re.sub(r"^\[\S+\]\s*", "", str(error).strip())
    return re.split(r"\.\s|\n", text)[0] or type(error).__name__
