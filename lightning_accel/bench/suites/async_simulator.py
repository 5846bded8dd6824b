"""The simulator of asynchronous training against real worker processes: throughput of two and of three workers.

In every round one real worker is timed twice, once with a core for itself and one for the server, once while processes
that compute and know no server keep all cores but one busy, which costs both more (caches and memory are shared); then
two and three real workers. A push of one worker alone is never stale, and stale ones take the server longer: how long,
its overlapped pushes show. The simulator is given these times and the number of cores, and says what two and three
should make. Of two kinds of steps, one computes, so that three workers compete for two cores; the other waits as for an
accelerator.
"""

import contextlib
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event

import torch

from lightning_accel.async_sgd import ParameterStore, Settings, Statistics, run_workers
from lightning_accel.async_sgd.simulation.costs import Costs
from lightning_accel.async_sgd.simulation.run import simulate_times
from lightning_accel.bench.async_task import Task
from lightning_accel.bench.async_turns import joined, leases_within, wait_for
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import available_cores, compare_paired

_LEASES = 64
_WAITS = Settings(lease_batches=_LEASES)  # for the answer to each push, so that those of one worker are never stale
_SETTINGS = {
    "a push a step": _WAITS,
    "overlap": Settings(lease_batches=_LEASES, overlap=True),
    "local_steps=16": Settings(lease_batches=_LEASES, local_steps=16),
}
_KINDS = {"computing": 0.0, "waiting 20 ms": 0.02}  # seconds that a step waits
_WORKERS = (2, 3)
_BATCHES = 3000  # of a simulated run
_LOOK = 0.5  # seconds between looks whether a process still lives
_START = 0.2  # part of a real run before the server's time is counted


@dataclass(frozen=True)
class _Pace:
    """What a real run came to, in seconds a batch, means over its workers; the server's, over pushes.

    Attributes:
        rate: Batches a second of all workers.
        step: From one batch to the next.
        computing: Of a worker's processor.
        waiting: In which a step waited on purpose.
        serving: Of the server's processor, a push.
        stale: The same of a stale push; None: pushes were stale.
    """

    rate: float
    step: float
    computing: float
    waiting: float
    serving: float
    stale: float | None = None


def rows(*, quick: bool) -> Iterator[BenchRow]:
    """Yield for each kind of step, settings and number of workers by how much the simulator is off."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "sklearn.datasets"])  # a slow import
    rounds, window = (1, 1.0) if quick else (8, 2.0)
    for kind, wait in _KINDS.items():
        for name in ["a push a step"] if wait or quick else list(_SETTINGS):
            real: dict[int, list[float]] = {workers: [] for workers in _WORKERS}
            foretold: dict[int, list[float]] = {workers: [] for workers in _WORKERS}
            for _ in range(rounds):
                roomy = _measured(1, window, wait, name)
                with _neighbours(available_cores() - 1):
                    crowded = _measured(1, window, wait, name)
                    stale = _measured(1, window, wait, "overlap").serving if _SETTINGS[name] == _WAITS else None
                crowded, roomy = replace(crowded, stale=stale), replace(roomy, stale=stale)
                for workers in _WORKERS:
                    foretold[workers].append(_foretold(workers, name, roomy, crowded))
                    real[workers].append(_measured(workers, window, wait, name).rate)
            for workers in _WORKERS:
                yield _row(f"{kind}, {name}", workers, foretold[workers], real[workers])


def _row(case: str, workers: int, foretold: list[float], real: list[float]) -> BenchRow:
    high = statistics.median(foretold) >= statistics.median(real)
    return BenchRow(
        suite="async_simulator",
        case=f"digits CNN, {case}, {workers} workers on {available_cores()} cores: batches a second",
        variant="simulated" if high else "real",
        baseline="real" if high else "simulated",
        ratio=compare_paired(foretold, real) if high else compare_paired(real, foretold),
        target=1.1,
        better="at most",
        note=f"simulated {statistics.median(foretold):.1f}, real {statistics.median(real):.1f} batches a second "
        f"(medians of {len(real)} rounds); the larger by the smaller one",
    )


def costs_of(roomy: _Pace, crowded: _Pace, *, workers: int, cores: int, local_steps: int) -> Costs:
    """Return what one real worker's times say of the parts of a step.

    Args:
        roomy: One worker and the server, each with a core.
        crowded: The same while others compute on all cores but one.
        workers: That are to be simulated: together with the server more than there are cores, they share them.
        cores: Of this machine.
        local_steps: Of the run.
    """
    pace = roomy if workers < cores else crowded
    # what is neither computed nor waited for on purpose is a call to the server, and its answer
    idle = max(1, local_steps) * (pace.step - pace.computing - pace.waiting) - pace.serving
    return Costs(
        compute=pace.computing,
        wait=pace.waiting,
        apply=pace.serving if pace.stale is None else pace.stale,
        message=max(0.0, idle / 2.0),
        cores=cores,
    )


def _foretold(workers: int, name: str, roomy: _Pace, crowded: _Pace) -> float:
    settings = _SETTINGS[name]
    costs = costs_of(roomy, crowded, workers=workers, cores=available_cores(), local_steps=settings.local_steps)
    found = simulate_times(_BATCHES, settings=settings, step_seconds=[costs.step] * workers, costs=costs, jitter=0.05)
    return found.throughput


@contextlib.contextmanager
def _neighbours(count: int) -> Iterator[None]:
    """Let ``count`` other processes make steps that nobody hears of."""
    context = multiprocessing.get_context("forkserver")
    computing = [context.Event() for _ in range(count)]
    processes = [context.Process(target=_compute, args=(event,), daemon=True) for event in computing]
    for process in processes:
        process.start()
    try:
        for process, event in zip(processes, computing, strict=True):
            while not event.wait(_LOOK):
                if process.exitcode is not None:
                    raise RuntimeError(f"a process that was to compute ended with {process.exitcode}.")
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _compute(computing: Event) -> None:
    task = Task("cpu")
    computing.set()
    for epoch in itertools.count():
        for unit in task.units(epoch):
            task.optimizer.zero_grad()
            task.loss(torch.tensor(unit)).backward()
            task.optimizer.step()


def _measured(workers: int, window: float, wait: float, name: str) -> _Pace:
    """Run real workers for ``window`` seconds."""
    ticks: list[tuple[float, float, int]] = []

    def tick(found: Statistics) -> None:
        ticks.append((time.perf_counter(), time.process_time(), found.version))

    found, _ = run_workers(
        _work,
        (workers, window, wait, name),
        workers=workers,
        settings=_SETTINGS[name],
        on_tick=tick,
        start_method="forkserver",
    )
    trained = [t for t in ticks if t[2] > ticks[-1][2] * _START and t[2] < ticks[-1][2]]
    (_, first, few), (_, last, many) = trained[0], trained[-1]
    step, computing, waiting = (
        statistics.fmean(values) for values in zip(*(paces[1:] for paces in found), strict=True)
    )
    rate = sum(paces[0] for paces in found)
    return _Pace(rate, step, computing, waiting, serving=(last - first) / max(1, many - few))


def _work(store: ParameterStore, workers: int, window: float, wait: float, name: str) -> list[list[float]]:
    """Train for ``window`` seconds; returns each worker's batches a second, and seconds a batch of `_Pace`."""
    task = Task("cpu")
    worker, number = joined(store, task, _SETTINGS[name])
    wait_for(store, number, range(workers))
    batches, waited = 0, 0.0
    began, computed = time.perf_counter(), time.process_time()
    for _, lease in leases_within(store, worker, task, window):
        task.optimizer.zero_grad()
        task.loss(torch.tensor(lease.unit)).backward()
        if wait:
            asleep = time.perf_counter()
            time.sleep(wait)
            waited += time.perf_counter() - asleep
        task.optimizer.step()
        batches += 1
    passed, computed = time.perf_counter() - began, time.process_time() - computed
    paces = [batches / passed, passed / batches, computed / batches, waited / batches]
    store.kv(f"pace {number}", json.dumps(paces).encode())
    worker.flush()
    return [json.loads(store.kv(f"pace {other}") or b"[]") for other in range(workers)]
