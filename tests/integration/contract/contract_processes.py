"""Two processes of a distributed run, started, waited for and ended here."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

DEADLINE_SECONDS = 180


def run_two_processes(worker: Path, name: str, folder: Path) -> list[dict[str, object]]:
    """Run ``worker`` as rank 0 and rank 1 with ``name`` and ``folder``; return what each wrote to ``rankN.pt``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    try:
        for rank in ("0", "1"):
            environment = os.environ | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": "2",
                "NODE_RANK": "0",
                "LOCAL_RANK": rank,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            with open(folder / f"rank{rank}.log", "wb") as log:
                command = [sys.executable, str(worker), name, str(folder)]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        end = time.monotonic() + DEADLINE_SECONDS
        for process in processes:
            process.wait(timeout=max(1.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    logs = "".join((folder / f"rank{rank}.log").read_text(errors="replace")[-3000:] for rank in (0, 1))
    assert all((folder / f"rank{rank}.pt").exists() for rank in (0, 1)), logs
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
