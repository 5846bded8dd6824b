"""Asynchronous SGD against one process and against lock-step, with and without a worker that is three times slower.

Every variant is real processes on the digits; a round runs each once, in shuffled order, and counts samples within a
window that opens when all processes are there. Starting processes is not counted.
"""

import functools
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from lightning_accel.async_sgd import ParameterStore, Settings, Worker, run_workers
from lightning_accel.async_sgd.memory import Mailbox, ParameterPage, TensorSpec
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired, time_interleaved
from lightning_accel.zoo.cnn import CNN
from lightning_accel.zoo.digits import Digits

_BATCH = 64
_WORKERS = 2
_SLOWDOWN = 3.0
_ACCURACY = 0.97
_STOP_EVERY = 5  # steps between two agreements of the lock-step ranks on whether the window is over
_TRANSFER_BYTES = 40_000_000
_SETTINGS = Settings(lease_batches=1)


@dataclass(frozen=True)
class Outcome:
    """What one variant did in its window.

    Attributes:
        seconds_per_sample: Wall time by samples of all workers.
        seconds_to_accuracy: Until the parameters classified 97 % of the held-out digits; infinite if never.
        accuracy: Of the last parameters.
    """

    seconds_per_sample: float
    seconds_to_accuracy: float
    accuracy: float


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield throughput, time to accuracy, and the cost of a push and a pull."""
    yield _transfer(rounds=15 if quick else 60)
    rounds, window = (2, 1.0) if quick else (7, 8.0)
    slow = (_SLOWDOWN - 1.0) * _Task(device).step_seconds  # one delay for all, or the variants would not compare
    variants: dict[str, Callable[[], Outcome]] = {
        "one process": functools.partial(_one_process, window, device),
        "async, 2 workers": functools.partial(_asynchronous, window, 0.0, device),
        "DDP, 2 ranks": functools.partial(_lock_step, window, 0.0, device),
        "async, one 3x slower": functools.partial(_asynchronous, window, slow, device),
        "DDP, one 3x slower": functools.partial(_lock_step, window, slow, device),
    }
    found: dict[str, list[Outcome]] = {name: [] for name in variants}
    order, generator = list(variants), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            found[name].append(variants[name]())
    yield _throughput(found, "async, 2 workers", "one process", target=1.8)
    yield _throughput(found, "DDP, 2 ranks", "one process", target=None)
    yield _throughput(found, "async, 2 workers", "DDP, 2 ranks", target=None)
    yield _throughput(found, "async, one 3x slower", "DDP, one 3x slower", target=2.0)
    ours, theirs = "async, one 3x slower", "DDP, one 3x slower"
    times = {name: [outcome.seconds_to_accuracy for outcome in found[name]] for name in (ours, theirs)}
    yield BenchRow(
        suite="async_sgd",
        case=f"digits CNN, seconds to {_ACCURACY:.0%}",
        variant=ours,
        baseline=theirs,
        ratio=compare_paired(times[theirs], times[ours]),
        seconds={name: statistics.median(values) for name, values in times.items()},
        target=1.8,
        note=_accuracies(found, "one process", ours, theirs),
    )


def _throughput(found: dict[str, list[Outcome]], variant: str, baseline: str, *, target: float | None) -> BenchRow:
    times = {name: [outcome.seconds_per_sample for outcome in found[name]] for name in (variant, baseline)}
    return BenchRow(
        suite="async_sgd",
        case=f"digits CNN, batch {_BATCH}, samples a second",
        variant=variant,
        baseline=baseline,
        ratio=compare_paired(times[baseline], times[variant]),
        seconds={name: statistics.median(values) * _BATCH for name, values in times.items()},
        target=target,
        note=f"seconds are of {_BATCH} samples, all workers together; " + _accuracies(found, variant, baseline),
    )


def _accuracies(found: dict[str, list[Outcome]], *names: str) -> str:
    medians = (f"{name} {statistics.median(o.accuracy for o in found[name]):.3f}" for name in names)
    return "accuracy: " + ", ".join(medians)


def _transfer(rounds: int) -> BenchRow:
    """One push and one pull of 40 MB within one process, against copying the same bytes twice."""
    tensor = torch.randn(_TRANSFER_BYTES // 4)
    spec = TensorSpec.of("parameters", tensor)
    page, mailbox, target = ParameterPage([spec], 1), Mailbox([spec.nbytes], 4096), torch.empty_like(tensor)
    page.publish([tensor], 0, [0])
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

    seconds = time_interleaved({"copy_": copy_twice, "push + pull": push_and_pull}, rounds=rounds, warmup=3)
    page.segment.close()
    mailbox.segment.close()
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


class _Task:
    """The digits and a CNN that learns them; what every variant trains."""

    def __init__(self, device: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.device = device
        data = Digits(batch_size=_BATCH)
        data.prepare_data()
        data.setup("fit")
        self.x, self.y = (torch.cat(t).to(device) for t in zip(*data.train_dataloader(), strict=True))
        self.held_x, self.held_y = (torch.cat(t).to(device) for t in zip(*data.val_dataloader(), strict=True))
        self.net = CNN().to(device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9)
        self.snapshots: list[tuple[float, list[Tensor]]] = []
        self.loss(torch.arange(_BATCH)).backward()  # the first step is slower than all others
        seconds = time_interleaved(
            {"step": lambda: self.loss(torch.arange(_BATCH)).backward()}, rounds=9, device=device
        )
        self.step_seconds = statistics.median(seconds["step"])
        self.optimizer.zero_grad()

    def loss(self, rows: Tensor, net: nn.Module | None = None) -> Tensor:
        output: Tensor = (self.net if net is None else net)(self.x[rows])
        return functional.cross_entropy(output, self.y[rows])

    def units(self, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.x), generator=generator).tolist()
        return [order[i : i + _BATCH] for i in range(0, len(order) - _BATCH + 1, _BATCH)]

    def note(self, seconds: float) -> None:
        """Keep a copy of the parameters ten times a second, to be judged after the window."""
        if not self.snapshots or seconds - self.snapshots[-1][0] >= 0.1:
            self.snapshots.append((seconds, [t.detach().clone() for t in self.net.state_dict().values()]))

    def outcome(self, samples_per_second: float) -> Outcome:
        self.note(math.inf)
        self.net.eval()
        judged = []
        for when, state in self.snapshots:
            self.net.load_state_dict(dict(zip(self.net.state_dict(), state, strict=True)))
            with torch.no_grad():
                right = self.net(self.held_x).argmax(1) == self.held_y
            judged.append((when, right.double().mean().item()))
        reached = next((when for when, accuracy in judged if accuracy >= _ACCURACY), math.inf)
        return Outcome(1.0 / samples_per_second, reached, judged[-1][1])


def _asynchronous(window: float, delay: float, device: str) -> Outcome:
    outcome: Outcome
    outcome, _ = run_workers(_async_worker, (window, delay, device), workers=_WORKERS, settings=_SETTINGS)
    return outcome


def _async_worker(store: ParameterStore, window: float, delay: float, device: str) -> Outcome | None:
    task = _Task(device)
    buffers = dict(task.net.named_buffers())
    worker = Worker(store, _SETTINGS, dict(task.net.named_parameters()), buffers, [task.optimizer])
    number = worker.join(worker.opening).worker
    worker.attach()
    for other in (number, 1 - number):
        store.kv(f"here {other}", b"yes" if other == number else None)
    samples, epoch = 0, 0
    began = time.perf_counter()
    while (seconds := time.perf_counter() - began) < window:
        block = store.lease(epoch, functools.partial(task.units, epoch))
        epoch += not block
        for lease in block:
            if number == 0:
                task.note(time.perf_counter() - began)
            worker.pending.append(lease.id)
            task.optimizer.zero_grad()
            task.loss(torch.tensor(lease.unit)).backward()
            task.optimizer.step()
            time.sleep(delay if number else 0.0)
            samples += len(lease.unit)
    pace = samples / seconds
    if number:
        store.kv("pace", str(pace).encode())
        return None
    return task.outcome(pace + float(store.kv("pace") or b"0"))


def _one_process(window: float, device: str) -> Outcome:
    return _spawned(_lone, 1, (window, device))


def _lock_step(window: float, delay: float, device: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return _spawned(_rank, _WORKERS, (window, delay, device, str(Path(folder) / "rendezvous")))


def _spawned(function: Callable[..., None], ranks: int, args: tuple[object, ...]) -> Outcome:
    context = multiprocessing.get_context("spawn")
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
    task, samples, epoch = _Task(device), 0, rank
    began = time.perf_counter()
    while time.perf_counter() - began < window:
        for unit in task.units(epoch):
            task.note(time.perf_counter() - began)
            task.optimizer.zero_grad()
            task.loss(torch.tensor(unit)).backward()
            task.optimizer.step()
            samples += len(unit)
        epoch += 1
    sender.send(task.outcome(samples / (time.perf_counter() - began)))


def _rank(  # noqa: PLR0917  # a process is started with a flat list of arguments
    rank: int,
    sender: "multiprocessing.connection.Connection",
    window: float,
    delay: float,
    device: str,
    rendezvous: str,
) -> None:
    task = _Task(device)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=_WORKERS)
    net = nn.parallel.DistributedDataParallel(task.net)
    samples, steps, over = 0, 0, torch.zeros(1)
    distributed.barrier()
    began = time.perf_counter()
    for epoch in range(1_000_000):
        for unit in task.units(epoch)[rank::_WORKERS]:
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
        sender.send(task.outcome(samples * _WORKERS / (time.perf_counter() - began)))
    distributed.destroy_process_group()
