"""Asynchronous training against the number of workers, and a push and a pull against the size of the model."""

import functools
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator

import torch

from lightning_accel.async_sgd import ParameterStore, Settings, run_workers
from lightning_accel.bench.async_peers import one_process
from lightning_accel.bench.async_task import BATCH, Task
from lightning_accel.bench.async_turns import joined, leases_within, wait_for
from lightning_accel.bench.growth.points import ENOUGH, point
from lightning_accel.bench.suites.async_sgd import transfer_seconds
from lightning_accel.evidence.growth.curves import GrowthRow
from lightning_accel.measure import available_cores

_WORKERS = (1, 2, 3)
_LEASES = 64
_SETTINGS = {
    "async, a push a step": Settings(lease_batches=_LEASES),
    "async, local_steps=16": Settings(lease_batches=_LEASES, local_steps=16),
}
_MEGABYTES = (0.1, 1, 4, 16, 40, 160)
_ALONE = "one process"
_SECONDS = 4.0  # of a size of parameters, for as long as there are enough pairs


def rows(*, quick: bool, device: str) -> Iterator[GrowthRow]:
    """Yield the points: about a minute and a half on two cores.

    Args:
        quick: Two sizes a curve, and one round.
        device: To train on; transfers are the CPU's.
    """
    for megabytes in _MEGABYTES[:2] if quick else _MEGABYTES:
        seconds, setup = transfer_seconds(int(1e6 * megabytes), rounds=200, budget_seconds=_SECONDS)
        curve = "parameters, a worker's push and pull"
        yield point("async_sgd", curve, "MB", megabytes, seconds, cost=True, setup_seconds=setup)
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "sklearn.datasets"])  # a slow import
    rounds, window, workers = (1, 0.3, _WORKERS[:2]) if quick else (ENOUGH, 1.2, _WORKERS)
    yield from _training(rounds, window, workers, device)


def _training(rounds: int, window: float, workers: tuple[int, ...], device: str) -> Iterator[GrowthRow]:
    runs: dict[tuple[str, int], Callable[[], tuple[float, float]]] = {
        (name, count): functools.partial(_asynchronous, count, window, name, device)
        for name in _SETTINGS
        for count in workers
    }
    runs[_ALONE, 1] = lambda: (BATCH * one_process(window, device).seconds_per_sample, 0.0)
    paces: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    starts: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    order, generator = list(runs), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for key in order:
            pace, start = runs[key]()
            paces[key].append(pace)
            starts[key].append(start)
    for name in _SETTINGS:
        for count in workers:
            seconds = {_ALONE: paces[_ALONE, 1], name: paces[name, count]}
            curve = f"workers on {available_cores()} cores, digits CNN, batch {BATCH}, seconds a batch of all, {name}"
            setup = sorted(starts[name, count])[rounds // 2]
            yield point("async_sgd", curve, "workers", count, seconds, setup_seconds=setup)


def _asynchronous(workers: int, window: float, name: str, device: str) -> tuple[float, float]:
    """Return seconds a batch of all workers together, and seconds from the call until all of them could train."""
    called = time.monotonic()
    found, _ = run_workers(
        _work, (workers, window, name, device), workers=workers, settings=_SETTINGS[name], start_method="forkserver"
    )
    rates, begins = zip(*found, strict=True)
    return 1.0 / sum(rates), max(begins) - called


def _work(store: ParameterStore, workers: int, window: float, name: str, device: str) -> list[tuple[float, float]]:
    """Train for ``window`` seconds; return each worker's batches a second and when it began."""
    task = Task(device)
    worker, number = joined(store, task, _SETTINGS[name])
    wait_for(store, number, range(workers))
    batches, began = 0, time.monotonic()
    for _, lease in leases_within(store, worker, task, window):
        task.optimizer.zero_grad()
        task.loss(torch.tensor(lease.unit)).backward()
        task.optimizer.step()
        batches += 1
    pace = batches / (time.monotonic() - began), began
    store.kv(f"pace {number}", json.dumps(pace).encode())
    worker.flush()
    return [tuple(json.loads(store.kv(f"pace {other}") or b"[]")) for other in range(workers)]
