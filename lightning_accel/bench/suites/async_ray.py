"""What a push and a pull cost through Ray, beside shared memory, and two nodes against one process.

Everything runs on one machine: nodes are simulated, so no network is measured, only what Ray's processes, copies and
calls cost. Starting them is not counted.
"""

import functools
import logging
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_accel.async_sgd import Compression, Settings, run_workers
from lightning_accel.async_sgd.ray_engine.cluster import connected, refuse_without_ray
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.run import run_on_ray
from lightning_accel.async_sgd.store import Opening
from lightning_accel.bench.async_peers import one_process
from lightning_accel.bench.async_task import BATCH, Outcome
from lightning_accel.bench.ray_nodes import simulated_nodes
from lightning_accel.bench.suites.async_sgd import async_worker
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired

log = logging.getLogger(__name__)

_ELEMENTS = 10_000_000  # 40 MB
_CASE = "40 MB of parameters"
_WAITED, _AHEAD, _ASKED = "push and pull", "pull that came with the push", "pull that is asked for"
_WARM_UP = 16  # steps; the first push waits seconds for what a shard loads in its first step
_COMPRESSIONS: tuple[Any, ...] = ("none", "fp16", "int8")
_TRAINING = {
    "2 nodes": Settings(lease_batches=64),
    "2 nodes, local_steps=16": Settings(lease_batches=64, local_steps=16),
    "2 nodes, n_push=n_fetch=4, overlap, int8": Settings(
        lease_batches=64, n_push=4, n_fetch=4, overlap=True, compression=Compression("int8")
    ),
}


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the cost of pushes and pulls by each engine and compression, then throughput of two nodes.

    Args:
        quick: Fewer and shorter.
        device: Where the throughput is measured.
    """
    try:
        refuse_without_ray()
    except ModuleNotFoundError as error:  # an extra: the other suites of `suite=all` go on
        log.warning("suite async_ray is left out: %s", error)
        return
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "sklearn.datasets"])
    yield from _transfers(5 if quick else 20)
    yield from _training(2 if quick else 5, 1.0 if quick else 3.0, device)


def _transfers(rounds: int) -> Iterator[BenchRow]:
    with connected(RayOptions(), cores=1, nbytes=4 * _ELEMENTS):
        for name in _COMPRESSIONS:
            settings = Settings(staleness="none", compression=Compression(name))
            ray, _ = run_on_ray(transfer, (rounds,), workers=1, settings=settings, options=RayOptions())
            here, _ = run_workers(transfer, (rounds,), workers=1, settings=settings, start_method="forkserver")
            for case in (_WAITED, _AHEAD, _ASKED):
                yield _cost(f"{_CASE}, {case}", f"Ray, {name}", "shared memory, " + name, ray[case], here[case])


def transfer(store: Any, rounds: int) -> dict[str, list[float]]:
    """Push and pull so many times; returns the seconds of each kind."""
    parameter = nn.Parameter(torch.zeros(_ELEMENTS))
    gradient = torch.randn(_ELEMENTS)
    store.join(lambda: Opening(["weight"], [parameter], [], [], [torch.optim.SGD([parameter], lr=0.001)]))
    target = torch.empty(_ELEMENTS)
    seconds: dict[str, list[float]] = {_WAITED: [], _AHEAD: [], _ASKED: []}
    for _ in range(rounds + 3):
        began = time.perf_counter()
        store.wait_for(store.push([gradient], optimizer=0))
        pushed = time.perf_counter()
        store.pull([target], [])
        pulled = time.perf_counter()
        store.pull([target], [])
        asked = time.perf_counter()
        for case, value in ((_WAITED, pulled - began), (_AHEAD, pulled - pushed), (_ASKED, asked - pulled)):
            seconds[case].append(value)
    return {case: values[3:] for case, values in seconds.items()}  # the first find nothing ready


def _training(rounds: int, window: float, device: str) -> Iterator[BenchRow]:
    found: dict[str, list[Outcome]] = {name: [] for name in ("one process", *_TRAINING)}
    with simulated_nodes(2) as cluster, connected(RayOptions(address=cluster.address), cores=2):
        for _ in range(rounds):
            found["one process"].append(one_process(window, device))
            for name, settings in _TRAINING.items():
                task = functools.partial(
                    async_worker, window=window, delay=0.0, device=device, settings=settings, warm_up=_WARM_UP
                )
                outcome, _ = run_on_ray(task, (), workers=2, settings=settings, options=RayOptions())
                found[name].append(outcome)
    alone = found["one process"]
    for name in _TRAINING:
        mine, theirs = ([o.seconds_per_sample for o in outcomes] for outcomes in (found[name], alone))
        yield BenchRow(
            suite="async_ray",
            case="digits CNN, batch 64, samples a second",
            variant=name,
            baseline="one process",
            ratio=compare_paired(theirs, mine),
            seconds={name: BATCH * statistics.median(mine), "one process": BATCH * statistics.median(theirs)},
        )
        accuracy = statistics.fmean(o.accuracy for o in found[name]), statistics.fmean(o.accuracy for o in alone)
        yield BenchRow(
            suite="async_ray",
            case="digits CNN, accuracy in the last half second",
            variant=name,
            baseline="one process",
            ratio=compare_paired([o.accuracy for o in found[name]], [o.accuracy for o in alone]),
            note=f"{100 * accuracy[0]:.1f} % against {100 * accuracy[1]:.1f} %",
        )


def _cost(case: str, variant: str, baseline: str, mine: list[float], theirs: list[float]) -> BenchRow:
    return BenchRow(
        suite="async_ray",
        case=case,
        variant=variant,
        baseline=baseline,
        ratio=compare_paired(mine, theirs),
        seconds={variant: statistics.median(mine), baseline: statistics.median(theirs)},
        better="at most",
    )
