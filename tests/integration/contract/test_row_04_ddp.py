"""Row 4: two DDP processes hold equal parameters after several phases, or the run is refused in `setup`."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerators import ACCELERATORS

WORKER = Path(__file__).with_name("contract_ddp_worker.py")
DEADLINE_SECONDS = 180


def run_two_processes(name, folder):
    """Start both ranks, wait for both, and let none live on."""
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
                command = [sys.executable, str(WORKER), name, str(folder)]
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


@pytest.mark.slow
@pytest.mark.parametrize("entry", ACCELERATORS, ids=lambda entry: entry.name)
def test_two_processes_stay_equal_or_are_refused(entry, tmp_path):
    one, other = run_two_processes(entry.name, tmp_path)
    if entry.ddp_refusal is not None:
        assert re.search(entry.ddp_refusal, one["error"]), one["error"]
        assert re.search(entry.ddp_refusal, other["error"]), other["error"]
        return
    assert "error" not in one, one["error"]
    assert "error" not in other, other["error"]
    assert one["acted"]
    assert other["acted"]
    assert one["in optimizer"]
    assert list(one["state"]) == list(other["state"])
    for name, value in one["state"].items():
        if "running_" in name:
            continue  # batch norm's statistics are those of each process's own batches, in plain DDP too
        assert torch.equal(value, other["state"][name]), name
