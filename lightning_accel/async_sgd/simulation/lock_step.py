"""Lock-step training (DDP) on the same virtual machines, for comparison."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_accel.async_sgd.simulation.costs import Costs
from lightning_accel.async_sgd.simulation.run import SimulatedRun
from lightning_accel.async_sgd.simulation.training import Nothing, Training

_HIDDEN = 0.5  # of a step during which gradients travel without anybody waiting: the backward pass


def simulate_lock_step(
    training: Training | Nothing,
    *,
    step_seconds: Sequence[float],
    costs: Costs,
    jitter: float = 0.1,
    seed: int = 0,
    observe: Callable[[float, int, Sequence[Tensor]], None] | None = None,
) -> SimulatedRun:
    """Train in lock-step: every worker one batch, a ring all-reduce of the gradients, one step on their mean.

    A round takes as long as its slowest worker. The ring moves ``2 (N - 1) / N`` times the parameters' bytes over each
    link, which hides behind the backward pass, taken for half of the step, and has a latency for each of its hops.

    Args:
        training: What is trained; batches that fill no round are left out.
        step_seconds: Of each worker, each > 0.
        costs: Of everything else; ``pull_bytes`` are the gradients'.
        jitter: Each step takes ``1 - jitter`` to ``1 + jitter`` of its time.
        seed: Of the jitter.
        observe: As in `simulate`.
    """
    workers, rng = len(step_seconds), random.Random(seed)
    values, optimizer = training.own_copy()
    share = costs.compute / costs.step
    reduce = 2.0 * (workers - 1) / workers * costs.pull_bytes / costs.link + 2.0 * (workers - 1) * costs.message
    seconds, rounds = 0.0, max(1, len(training.batches) // workers)
    for number in range(rounds):
        steps = [s * rng.uniform(1.0 - jitter, 1.0 + jitter) for s in step_seconds]
        slowest = max(steps)
        if costs.cores is not None:
            slowest = max(slowest, sum(steps) * share / costs.cores)
        seconds += slowest + max(0.0, reduce - _HIDDEN * slowest) + costs.update
        batches = [
            training.batches[i] for i in range(number * workers, min(len(training.batches), (number + 1) * workers))
        ]
        found = [training.gradients(values, batch) for batch in batches]
        for value, *gradients in zip(values, *found, strict=True):
            some = [g for g in gradients if g is not None]
            value.grad = torch.stack(some).mean(0) if some else None
        optimizer.step()
        if observe is not None:
            observe(seconds, (number + 1) * workers, values)
    training.load(values)
    return SimulatedRun(
        seconds=seconds,
        staleness_mean=0.0,
        worker_pushes=(rounds,) * workers,
        dropped=0,
        throughput=rounds * workers / seconds,
    )
