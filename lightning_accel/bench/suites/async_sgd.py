"""Asynchronous SGD against one process and against lock-step, with and without a worker that is three times slower.

Every variant is real processes on the digits; a round runs each once, in shuffled order, and counts samples within a
window that opens when all processes are there. Starting processes is not counted, for either side. Then workers are
killed, stopped and slowed down.
"""

import functools
import logging
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lightning_accel.async_sgd import ParameterStore, Settings, run_workers
from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.shared_memory.memory import Mailbox, ParameterPage
from lightning_accel.bench.async_chaos import chaos
from lightning_accel.bench.async_faults import HANG_SECONDS, kill_sweep
from lightning_accel.bench.async_peers import lock_step, one_process
from lightning_accel.bench.async_start import PLAIN, seconds_to_first_step
from lightning_accel.bench.async_task import ACCURACY, BATCH, Outcome, Task
from lightning_accel.bench.async_turns import joined, leases_within, wait_for
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import PairedRatio, compare_paired, time_interleaved

_WORKERS = 2
_SLOWDOWN = 3.0
_TRANSFER_BYTES = 40_000_000
_EACH = Settings(lease_batches=64)  # a push and a pull each step, waited for
_OVERLAP = Settings(lease_batches=64, overlap=True)  # the next batch is not waited for
_LOCAL = Settings(lease_batches=64, local_steps=16)  # own steps; the way made goes to the server, averaged
_CALM_SECONDS = 15.0
_START_SECONDS = 1.0  # that the first step may come later than a plain Trainer's


def rows(*, quick: bool, device: str, kills: int = 200, chaos_minutes: float = 1.0) -> Iterator[BenchRow]:
    """Yield throughput, time to accuracy, the cost of a push and a pull, and what faults do.

    Args:
        quick: Fewer and shorter.
        device: Where the throughput is measured; transfers and faults are the CPU's.
        kills: How many processes are killed, >= 1.
        chaos_minutes: How long workers are struck at random. Up to 5 minutes a fault comes every 3 seconds, over that
            every 30.

    Raises:
        ValueError: If ``kills < 1`` or ``chaos_minutes <= 0``.
    """
    if kills < 1:
        raise ValueError(f"`kills` must be >= 1, got {kills}.")
    if chaos_minutes <= 0.0:
        raise ValueError(f"`chaos_minutes` must be > 0, got {chaos_minutes}.")
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "sklearn.datasets"])  # a slow import
    yield _transfer(rounds=15 if quick else 60)
    yield from _starts(1 if quick else 2)
    yield from _training(*((2, 1.0) if quick else (6, 2.5)), device=device)
    with _silent():
        yield _killed(min(kills, 20) if quick else kills)
        yield _chaotic(6.0 if quick else 60.0 * chaos_minutes, calm=3.0 if quick else _CALM_SECONDS)


def _starts(rounds: int) -> Iterator[BenchRow]:
    """The first fit of a process, and how much later the second one of the same process would be."""
    methods = ("auto", "forkserver", "spawn")
    found: dict[str, list[list[float]]] = {method: [] for method in (PLAIN, *methods)}
    for _ in range(rounds):
        for method, several in found.items():
            several.append(seconds_to_first_step(method, 2))
    plain = [first for first, _ in found[PLAIN]]
    for method in methods:
        firsts = [first for first, _ in found[method]]
        again = statistics.median(second for _, second in found[method])
        yield BenchRow(
            suite="async_sgd",
            case="from `fit` to the first step of two workers",
            variant=f"start_method={method}",
            baseline=f"plain Trainer, and {_START_SECONDS:g} s",
            ratio=compare_paired(firsts, [seconds + _START_SECONDS for seconds in plain]),
            seconds={method: statistics.median(firsts), PLAIN: statistics.median(plain)},
            target=1.0 if method == "auto" else None,
            better="at most",
            note=f"a new process each time, its own imports not counted; {again:.2f} s in its second fit",
        )


def _training(rounds: int, window: float, *, device: str) -> Iterator[BenchRow]:
    slow = (_SLOWDOWN - 1.0) * Task(device).seconds_a_step()  # one delay for all, or the variants would not compare
    each, local = "async, 2 workers", "async, 2 workers, local_steps=16"
    uneven, ranks = "async, overlap, one 3x slower", "DDP, one 3x slower"
    one, healthy_ranks = "one process", "DDP, 2 ranks"
    variants: dict[str, Callable[[], Outcome]] = {
        one: functools.partial(one_process, window, device),
        each: functools.partial(_asynchronous, window, 0.0, device, _EACH),
        local: functools.partial(_asynchronous, window, 0.0, device, _LOCAL),
        healthy_ranks: functools.partial(lock_step, _WORKERS, window, 0.0, device),
        uneven: functools.partial(_asynchronous, window, slow, device, _OVERLAP),
        ranks: functools.partial(lock_step, _WORKERS, window, slow, device),
    }
    found: dict[str, list[Outcome]] = {name: [] for name in variants}
    order, generator = list(variants), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            found[name].append(variants[name]())
    yield _throughput(found, local, one, target=1.8)
    yield _throughput(found, each, one, target=None)
    yield _throughput(found, healthy_ranks, one, target=None)
    yield _throughput(found, uneven, ranks, target=2.0)
    yield _time_to_accuracy(found, uneven, ranks, target=1.8)
    for name in (local, each):
        yield _time_to_accuracy(found, name, one, target=None)
    for name in (local, each, uneven):
        yield _final_accuracy(found, name, one)


def _time_to_accuracy(found: dict[str, list[Outcome]], ours: str, theirs: str, *, target: float | None) -> BenchRow:
    times = {name: [outcome.seconds_to_accuracy for outcome in found[name]] for name in (ours, theirs)}
    return BenchRow(
        suite="async_sgd",
        case=f"digits CNN, seconds to {ACCURACY:.0%}",
        variant=ours,
        baseline=theirs,
        ratio=compare_paired(times[theirs], times[ours]),
        seconds={name: statistics.median(values) for name, values in times.items()},
        target=target,
        note="start-up not counted; parameters are judged every 0.1 s",
    )


def _final_accuracy(found: dict[str, list[Outcome]], ours: str, theirs: str) -> BenchRow:
    values = {name: [outcome.accuracy for outcome in found[name]] for name in (ours, theirs)}
    return BenchRow(
        suite="async_sgd",
        case="digits CNN, accuracy in the last half second",
        variant=ours,
        baseline=theirs,
        ratio=compare_paired(values[ours], values[theirs]),  # a ratio of accuracies, not of times
        target=0.995,
        note=_accuracies(found, ours, theirs),
    )


def _killed(kills: int) -> BenchRow:
    damage = kill_sweep(kills)
    died = damage.deaths + damage.faults["kill of the parent"]
    share = max(0.0, 1.0 - damage.harm / max(1, died))
    return BenchRow(
        suite="async_sgd",
        case=f"{died} processes killed: workers, coordinators, parents",
        variant="kills without any harm",
        baseline="all kills",
        ratio=PairedRatio(median=share, low=share, high=share, p_value=1.0, pairs=died),
        target=1.0,
        note=f"{damage.torn} torn, {damage.hangs} hangs over {HANG_SECONDS:.0f} s (longest {damage.longest:.1f} s), "
        f"{damage.lost} batches lost, {damage.twice} twice, {damage.left} processes or shared memory left",
    )


def _chaotic(seconds: float, *, calm: float) -> BenchRow:
    quiet = chaos(calm, every=float("inf"), stretch=calm / 3.0)
    pace = sum(quiet.steps) / sum(quiet.worker_seconds)
    every = 3.0 if seconds <= 300.0 else 30.0
    found = chaos(seconds, every=every, stretch=max(2.0, seconds / 12.0))
    expected = [pace * worker_seconds for worker_seconds in found.worker_seconds]
    ratio = compare_paired([float(steps) for steps in found.steps], expected)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(found.damage.faults.items()))
    damage = found.damage
    return BenchRow(
        suite="async_sgd",
        case=f"4 workers, a random fault every {every:.0f} s for {seconds / 60.0:.1f} min: steps",
        variant="done",
        baseline="of as many live workers without faults",
        ratio=replace(ratio, median=sum(found.steps) / sum(expected)),
        target=0.95,
        note=f"{faults}; {damage.torn} torn, {damage.lost} batches lost, {damage.twice} twice, {damage.left} left, "
        f"longest standstill {damage.longest:.1f} s; a batch waits 20 ms; chaos_minutes=30 is the long run",
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Leave out the warnings of deaths, which are on purpose here."""
    logger = logging.getLogger("lightning_accel.async_sgd")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _throughput(found: dict[str, list[Outcome]], variant: str, baseline: str, *, target: float | None) -> BenchRow:
    times = {name: [outcome.seconds_per_sample for outcome in found[name]] for name in (variant, baseline)}
    return BenchRow(
        suite="async_sgd",
        case=f"digits CNN, batch {BATCH}, samples a second",
        variant=variant,
        baseline=baseline,
        ratio=compare_paired(times[baseline], times[variant]),
        seconds={name: BATCH * statistics.median(values) for name, values in times.items()},
        target=target,
        note=f"seconds are of {BATCH} samples, all workers together; " + _accuracies(found, variant, baseline),
    )


def _accuracies(found: dict[str, list[Outcome]], *names: str) -> str:
    medians = (f"{name} {statistics.median(o.accuracy for o in found[name]):.3f}" for name in names)
    return "accuracy: " + ", ".join(medians)


def transfer_seconds(
    nbytes: int, *, rounds: int, budget_seconds: float = math.inf
) -> tuple[dict[str, list[float]], float]:
    """Time a push and a pull within one process, and copying the same bytes twice.

    Args:
        nbytes: Of float32 parameters.
        rounds: At most.
        budget_seconds: After which no further round begins, if there were six.

    Returns:
        Seconds of ``"copy_"`` and ``"push + pull"``, and those to make the shared memory and publish once.
    """
    tensor = torch.randn(nbytes // 4)
    spec = TensorSpec.of("parameters", tensor)
    begin = time.perf_counter()
    page, mailbox = ParameterPage([spec], 1), Mailbox([spec.nbytes], 4096)
    page.publish([tensor], 0, [0])
    setup, target = time.perf_counter() - begin, torch.empty_like(tensor)
    sources = tensor.clone(), torch.empty_like(tensor)
    sequence = 0

    def push_and_pull() -> None:
        nonlocal sequence
        sequence += 1
        with mailbox.writing(sequence, {"base_version": 0}, lambda _: None) as areas:
            areas[0].view(tensor.dtype).copy_(tensor)
        page.read_into([target])

    def copy_twice() -> None:
        sources[1].copy_(sources[0])
        target.copy_(sources[0])

    seconds = time_interleaved(
        {"copy_": copy_twice, "push + pull": push_and_pull},
        rounds=rounds,
        warmup=3,
        budget_seconds=budget_seconds,
        min_rounds=6,
    )
    page.segment.close()
    mailbox.segment.close()
    return seconds, setup


def _transfer(rounds: int) -> BenchRow:
    """One push and one pull of 40 MB within one process, against copying the same bytes twice."""
    seconds, _ = transfer_seconds(_TRANSFER_BYTES, rounds=rounds)
    return BenchRow(
        suite="async_sgd",
        case="40 MB of parameters, push and pull",
        variant="push + pull",
        baseline="copy_",
        ratio=compare_paired(seconds["push + pull"], seconds["copy_"]),
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        target=2.0,
        better="at most",
        note="the worker's side; the server applies and publishes meanwhile",
    )


def _asynchronous(window: float, delay: float, device: str, settings: Settings) -> Outcome:
    outcome: Outcome
    outcome, _ = run_workers(
        async_worker,
        (window, delay, device, settings),
        workers=_WORKERS,
        settings=settings,
        start_method="forkserver",
    )
    return outcome


def async_worker(
    store: ParameterStore, window: float, delay: float, device: str, settings: Settings, *, warm_up: int = 0
) -> Outcome | None:
    """Train one of two workers for so many seconds; returns what the run came to, in the coordinator.

    Args:
        store: Of the worker.
        window: Seconds.
        delay: Seconds that all workers but the first wait in each step.
        device: To train on.
        settings: Of the run.
        warm_up: Steps before the window begins, where the first pushes load what later ones find.
    """
    task = Task(device)
    worker, number = joined(store, task, settings)
    for unit in task.units(0)[:warm_up]:
        task.optimizer.zero_grad()
        task.loss(torch.tensor(unit)).backward()
        task.optimizer.step()
    worker.flush()
    wait_for(store, number, range(2))
    samples, began = 0, time.perf_counter()
    for passed, lease in leases_within(store, worker, task, window):
        if number == 0:
            task.note(passed)
        task.optimizer.zero_grad()
        task.loss(torch.tensor(lease.unit)).backward()
        task.optimizer.step()
        time.sleep(delay if number else 0.0)
        samples += len(lease.unit)
    worker.flush()
    pace = samples / (time.perf_counter() - began)
    if number:
        store.kv("pace", str(pace).encode())
        return None
    pace += float(store.kv("pace") or b"0")
    worker.pull()
    return task.outcome(pace)
