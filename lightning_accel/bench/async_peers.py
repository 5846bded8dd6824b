"""What asynchronous training is compared with: one process, and lock-step with Gloo DDP."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, nn

from lightning_accel.bench.async_task import Outcome, Task

_STOP_EVERY = 5  # steps between two agreements of the lock-step ranks on whether the window is over


def one_process(window: float, device: str) -> Outcome:
    """Train in one process for ``window`` seconds."""
    return _started(_lone, 1, (window, device))


def lock_step(workers: int, window: float, delay: float, device: str) -> Outcome:
    """Train with Gloo DDP for ``window`` seconds; all ranks but the first wait ``delay`` seconds at each step."""
    with tempfile.TemporaryDirectory() as folder:
        return _started(_rank, workers, (workers, window, delay, device, str(Path(folder) / "rendezvous")))


def _started(function: Callable[..., None], ranks: int, args: tuple[object, ...]) -> Outcome:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    processes = [context.Process(target=function, args=(rank, theirs, *args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    theirs.close()
    try:
        outcome: Outcome = ours.recv()  # raises EOFError if rank 0 fails
        return outcome
    finally:
        ours.close()
        for process in processes:
            process.join(30)
            if process.exitcode is None:
                process.kill()


def _lone(rank: int, sender: "multiprocessing.connection.Connection", window: float, device: str) -> None:
    task, samples, epoch = Task(device), 0, rank
    began = time.perf_counter()
    while time.perf_counter() - began < window:
        for unit in task.units(epoch):
            passed = time.perf_counter() - began
            if passed >= window:
                break
            task.note(passed)
            task.optimizer.zero_grad()
            task.loss(torch.tensor(unit)).backward()
            task.optimizer.step()
            samples += len(unit)
        epoch += 1
    sender.send(task.outcome(samples / (time.perf_counter() - began)))


def _rank(  # noqa: PLR0917  # a process is started with a flat list of arguments
    rank: int,
    sender: "multiprocessing.connection.Connection",
    workers: int,
    window: float,
    delay: float,
    device: str,
    rendezvous: str,
) -> None:
    task = Task(device)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    net = nn.parallel.DistributedDataParallel(task.net)
    samples, steps, over = 0, 0, torch.zeros(1)
    distributed.barrier()
    began = time.perf_counter()
    for epoch in range(1_000_000):
        for unit in task.units(epoch)[rank::workers]:
            if rank == 0:
                task.note(time.perf_counter() - began)
            task.optimizer.zero_grad()
            task.loss(torch.tensor(unit), net).backward()
            task.optimizer.step()
            time.sleep(delay if rank else 0.0)
            samples += len(unit)
            steps += 1
            if steps % _STOP_EVERY == 0:
                over.fill_(float(time.perf_counter() - began >= window))
                distributed.all_reduce(over)
                if over.item() > 0:
                    break
        if over.item() > 0:
            break
    if rank == 0:
        sender.send(task.outcome(samples * workers / (time.perf_counter() - began)))
    distributed.destroy_process_group()
