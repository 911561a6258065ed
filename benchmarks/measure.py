"""What the benchmarks share: options, ways timed in turn in one process, peak memory, the
machine's rates, a report."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.pyplot as plt
import torch

from xclip_lab.atomic import check_writable
from xclip_lab.drawing import styled
from xclip_lab.errors import UserError
from xclip_lab.parallel import in_threads
from xclip_lab.plots import save_figure

RECORDS = Path("runs/bench")
MIB = 2**20


class Options(argparse.ArgumentParser):
    """The options of a benchmark, which its docstring describes: `counts` are numbers from 1 on."""

    def __init__(self, text: str | None, **counts: int) -> None:
        self.benchmark = Path(sys.argv[0]).stem
        prog, form = f"xclip-lab bench {self.benchmark}", argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=text, formatter_class=form)
        for name, default in counts.items():
            self.add_argument(f"--{name}", type=count, default=default, help=f"default {default}")

    def parse_args(self, *given: Any, **more: Any) -> Any:
        found = super().parse_args(*given, **more)
        check_writable(RECORDS, " for the record")
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.benchmark}: {message}; --help tells the options")


def count(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return Path(text)


@dataclass(frozen=True)
class Row:
    """One path. Seconds are medians; `baseline` is the naive way in the same process; `floor` the least that
    this machine's own rates allow; `peak` bytes above what was there before."""

    path: str
    seconds: float
    baseline: float | None = None
    floor: float | None = None
    peak: int | None = None
    aim: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.baseline is None else self.baseline / self.seconds


def in_turn(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each way; all of them once, then all again, so that a slow spell hits each."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(of) for name, of in taken.items()}


def peak_of(way: Callable[[], object]) -> int:
    """Bytes that the process grows by at the most (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide as much of the peak
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    before = held("VmRSS")
    way()
    return held("VmHWM") - before


def _least(way: Callable[[], object]) -> float:
    """Seconds of the quickest of several goes."""
    return min(in_turn({"": way}, 1)[""] for _ in range(9))


def held(name: str) -> int:
    """Bytes that Linux says this process has, by the names of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


@dataclass(frozen=True)
class Machine:
    """What this machine does at its best, with all cores: products in FLOP/s, exponentials and bytes copied
    a second."""

    processor: str
    cores: int
    torch: str
    product: float
    exponential: float
    copy: float

    @classmethod
    def measured(cls) -> Machine:
        left, right, large = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.randn(2**25)
        flats, copied = torch.randn(torch.get_num_threads(), 2**17), torch.empty_like(large)

        def exponentials(flat: torch.Tensor) -> None:
            out = torch.empty_like(flat)
            for _ in range(400):
                torch.exp(flat, out=out)

        return cls(
            _processor(),
            os.cpu_count() or 1,
            torch.__version__,
            2 * 2048**3 / _least(lambda: left @ right),
            400 * flats.numel() / _least(lambda: list(in_threads(exponentials, flats, len(flats)))),
            2 * large.nbytes / _least(lambda: copied.copy_(large)),
        )

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.cores} cores, {torch.get_num_threads()} threads, torch {self.torch}\n"
            f"at most {self.product / 1e9:.0f} GFLOP/s in float32, {self.exponential / 1e9:.2f} G exp/s, "
            f"{self.copy / 1e9:.0f} GB/s copied; load {os.getloadavg()[0]:.1f}"
        )


def bfloat16_rate() -> float:
    """FLOP/s of a large product in bfloat16, all cores."""
    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    return 2 * 2048**3 / in_turn({"product": lambda: left @ right}, 7)["product"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def report(name: str, title: str, machine: Any, rows: list[Row]) -> None:
    """Print the rows; keep them with the machine's facts, and a figure, in `runs/bench/`.

    Args:
        machine: a dataclass such as `Machine`, whose text names the machine in the first line.
    """
    print(f"{title}\n{machine}\n")
    _line("", ["seconds", "naive", "ratio", "aim", "floor", "of floor", "MiB"])
    for row in rows:
        times = [row.ratio, row.aim, row.floor and row.seconds / row.floor]
        ratio, aim, of_floor = ("" if value is None else f"{value:.1f}" for value in times)
        seconds, naive, floor = (_digits(value) for value in (row.seconds, row.baseline, row.floor))
        peak = "" if row.peak is None else f"{row.peak / MIB:.0f}"
        _line(row.path, [seconds, naive, ratio, aim, floor, of_floor, peak], row.note)
    record = {
        "title": title,
        "options": sys.argv[1:],
        "machine": asdict(machine),
        "rows": [asdict(row) for row in rows],
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    compared = [row for row in rows if row.ratio]
    if compared:
        save_figure(_figure(title, machine, compared), RECORDS, name)
    print(f"\nkept in {RECORDS / name}.*")


@styled
def _figure(title: str, machine: Any, rows: list[Row]) -> plt.Figure:
    """How many times as fast as the naive way, with the aim as a mark."""
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.5 * len(rows)), layout="constrained")
    places = range(len(rows))
    axis.barh(places, [row.ratio for row in rows], color="0.75")
    for place, row in zip(places, rows, strict=True):
        axis.text(row.ratio, place, f" {row.ratio:.1f}", va="center", fontsize=10)
        if row.aim:
            axis.plot([row.aim, row.aim], [place - 0.4, place + 0.4], color="black", linewidth=2)
    axis.set_yticks(places, [row.path for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as the naive way (black: the aim)")
    axis.set_title(f"{title}\n{str(machine).splitlines()[0]}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _line(path: str, cells: list[str], note: str = "") -> None:
    print(f"{path:<44}{''.join(f'{cell:>10}' for cell in cells)}  {note}".rstrip())


def _digits(seconds: float | None) -> str:
    """Three digits at the least, of a microsecond as of an hour."""
    return "" if seconds is None else f"{seconds:.{max(0, 2 - math.floor(math.log10(seconds)))}f}"
