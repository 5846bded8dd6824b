"""What a worker of the asynchronous benchmarks does around its steps: join, wait for the others, take batches."""

import functools
import time
from collections.abc import Iterator, Sequence

from lightning_accel.async_sgd import Lease, ParameterStore, Settings, Worker
from lightning_accel.bench.async_task import Task


def joined(store: ParameterStore, task: Task, settings: Settings) -> tuple[Worker, int]:
    """Return a worker that trains the task's network from now on, and its number."""
    parameters, buffers = dict(task.net.named_parameters()), dict(task.net.named_buffers())
    worker = Worker(store, settings, parameters, buffers, [task.optimizer])
    number = worker.join(worker.opening).worker
    worker.attach()
    return worker, number


def wait_for(store: ParameterStore, number: int, workers: Sequence[int]) -> None:
    """Say that worker ``number`` is here, and wait until all ``workers`` are."""
    store.kv(f"here {number}", b"yes")
    for other in workers:
        store.kv(f"here {other}")


def leases_within(store: ParameterStore, worker: Worker, task: Task, window: float) -> Iterator[tuple[float, Lease]]:
    """Yield batches to train on, epoch after epoch, with the seconds passed since the first one was asked for.

    Args:
        store: Of the worker.
        worker: That is to count each of them for its next push.
        task: Whose batches they are.
        window: Seconds after which there are no more.
    """
    began, epoch = time.perf_counter(), 0
    while time.perf_counter() - began < window:
        block = store.lease(epoch, functools.partial(task.units, epoch))
        if not block:
            worker.flush()
            epoch += 1
        for lease in block:
            passed = time.perf_counter() - began
            if passed >= window:
                return
            worker.pending.append(lease.id)
            yield passed, lease
