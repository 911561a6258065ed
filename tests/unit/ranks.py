"""Real processes over gloo, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

from xclip_lab.errors import UserError


def run_ranks(processes, folder: Path, target, *args, world: int = 2) -> list[int | None]:
    """`target(*args)` in processes with torchrun's environment; their exit codes, 2 for a user's error. What
    they return or complain of lies in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        processes.Process(target=_rank, args=(rank, world, port, folder, target, args))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def _rank(rank: int, world: int, port: int, folder: Path, target, args) -> None:
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_RANK": f"{rank}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader workers as in a process of its own
    try:
        torch.save(target(*args), folder / f"{rank}.pt")
    except UserError as error:
        (folder / f"{rank}.txt").write_text(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def returned(folder: Path, rank: int):
    return torch.load(folder / f"{rank}.pt", weights_only=False)


def complaint(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.txt").read_text()
