"""Which is expected to win, lock-step or asynchrony, from measured step time, bytes and copy speed."""

import math
from dataclasses import dataclass

import torch

from lightning_accel.async_sgd.policy.rules import expected_gain
from lightning_accel.measure import time_interleaved

_BUSIEST = 0.8  # share of its time that a server may be busy without workers queueing
_OVERHEAD = 0.05  # most of a step that pushing and pulling should take


@dataclass(frozen=True)
class TrafficEstimate:
    """What asynchronous training of a model is expected to cost and to gain.

    Attributes:
        step_seconds: Of one worker's batch, forward and backward.
        traffic_seconds: Of one push and one pull.
        apply_seconds: Of one optimizer step on the server, all workers one after another.
        n_push: Smallest for which push and pull take at most 5 % of the steps between them.
        server_load: Fraction of its time that the server is busy with that ``n_push``; over 1 it holds workers up.
        shards: Servers that would have to share the parameters so that none is busy for more than 80 % of its time.
        async_throughput: Batches a second of all workers.
        lock_step_throughput: The same in lock-step at the pace of the slowest; communication, if its speed is given.

    Example:
        >>> from lightning_accel.async_sgd import estimate_traffic
        >>> estimate_traffic(step_seconds=1.0, parameter_bytes=4_000, workers=2).n_push
        1
    """

    step_seconds: float
    traffic_seconds: float
    apply_seconds: float
    n_push: int
    server_load: float
    shards: int
    async_throughput: float
    lock_step_throughput: float

    @property
    def advice(self) -> str:
        """``"async"`` if it is expected to win by more than 10 %, else ``"ddp"``."""
        return "async" if self.async_throughput > 1.1 * self.lock_step_throughput else "ddp"


def estimate_traffic(
    *,
    step_seconds: float,
    parameter_bytes: int,
    workers: int,
    slowdown: float = 1.0,
    copy_bytes_per_second: float | None = None,
    apply_seconds: float | None = None,
    link_bytes_per_second: float | None = None,
) -> TrafficEstimate:
    """Estimate throughput of asynchronous and of lock-step training.

    Args:
        step_seconds: Measured time of one batch on a healthy worker, > 0.
        parameter_bytes: Of all trainable parameters, > 0.
        workers: Number of workers, >= 1.
        slowdown: How many times slower the slowest worker is, >= 1.
        copy_bytes_per_second: Of memory; measured here if None.
        apply_seconds: Of one optimizer step; five copies of the parameters if None (gradient, momentum, parameter).
        link_bytes_per_second: Between two workers, for the all-reduce of lock-step, a ring of `2 (N - 1) / N` times
            the bytes that hides behind the backward pass, taken for half of the step; None leaves it out.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> from lightning_accel.async_sgd import estimate_traffic
        >>> found = estimate_traffic(step_seconds=0.1, parameter_bytes=40_000_000, workers=4, slowdown=3.0)
        >>> found.async_throughput > found.lock_step_throughput
        True
    """
    if step_seconds <= 0.0:
        raise ValueError(f"`step_seconds` must be > 0, got {step_seconds}.")
    if parameter_bytes <= 0:
        raise ValueError(f"`parameter_bytes` must be > 0, got {parameter_bytes}.")
    gain = expected_gain(workers, slowdown)  # checks the other two
    speed = copy_speed(parameter_bytes) if copy_bytes_per_second is None else copy_bytes_per_second
    if speed <= 0.0:
        raise ValueError(f"`copy_bytes_per_second` must be > 0, got {speed}.")
    if link_bytes_per_second is not None and link_bytes_per_second <= 0.0:
        raise ValueError(f"`link_bytes_per_second` must be > 0, got {link_bytes_per_second}.")
    link = math.inf if link_bytes_per_second is None else link_bytes_per_second
    reduce = 2.0 * (workers - 1) / workers * parameter_bytes / link
    traffic = 2.0 * parameter_bytes / speed
    apply = 5.0 * parameter_bytes / speed if apply_seconds is None else apply_seconds
    n_push = max(1, math.ceil(traffic / (_OVERHEAD * step_seconds)))
    slowest = workers / (slowdown * step_seconds)
    lock_step = workers / (slowdown * step_seconds + max(0.0, reduce - 0.5 * slowdown * step_seconds))
    wanted = gain * slowest * step_seconds / (step_seconds + traffic / n_push)
    busy = wanted / n_push * (apply + parameter_bytes / speed)  # apply, then publish
    return TrafficEstimate(
        step_seconds=step_seconds,
        traffic_seconds=traffic,
        apply_seconds=apply,
        n_push=n_push,
        server_load=busy,
        shards=max(1, math.ceil(busy / _BUSIEST)),
        async_throughput=wanted / max(1.0, busy),
        lock_step_throughput=lock_step,
    )


def copy_speed(nbytes: int) -> float:
    """Measure how many bytes a second one `copy_` of ``nbytes`` moves on this machine."""
    source = torch.zeros(max(1, nbytes), dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = time_interleaved({"copy": lambda: target.copy_(source)}, rounds=9, warmup=2)["copy"]
    return source.numel() / sorted(seconds)[len(seconds) // 2]
