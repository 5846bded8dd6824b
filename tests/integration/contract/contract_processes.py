"""Two processes of a distributed run, started, waited for and ended here."""

import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

DEADLINE_SECONDS = 180


def run_two_processes(work: Callable[[str, Path], None], name: str, folder: Path) -> list[dict[str, object]]:
    """Call ``work`` as rank 0 and rank 1 with ``name`` and ``folder``; return what each wrote to ``rankN.pt``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")  # which has imported by now what takes seconds
    processes = [context.Process(target=_work_as, args=(rank, port, work, name, folder)) for rank in ("0", "1")]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + DEADLINE_SECONDS
        for process in processes:
            process.join(max(1.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    logs = "".join((folder / f"rank{rank}.log").read_text(errors="replace")[-3000:] for rank in (0, 1))
    assert all((folder / f"rank{rank}.pt").exists() for rank in (0, 1)), logs
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def _work_as(rank: str, port: str, work: Callable[[str, Path], None], name: str, folder: Path) -> None:
    """Work in a process of its own, with torchrun's environment; what it says goes to ``rankN.log``."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "LOCAL_RANK": rank,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work(name, folder)
