"""What the parts of a step cost, and how uneven the workers are: all that a simulation knows of machines."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

from lightning_accel.arguments import check_choice, check_integer, check_number

Speeds = Literal["equal", "one_slow", "half_slow", "lognormal"]


@dataclass(frozen=True)
class Costs:
    """How long the parts of a training step take, in seconds.

    Args:
        compute: Of a batch on a worker's processor, forward and backward, >= 0.
        wait: Of a batch that leaves the worker's core free (an accelerator computes), >= 0.
        push: A worker's own time to hand a push over, >= 0.
        pull: A worker's own time to take new parameters in, >= 0.
        apply: The server's time for a push: the optimizer's step, and publishing, >= 0.
        update: A worker's time for an optimizer step of its own (``local_steps``, lock-step), >= 0.
        message: From the moment that one process calls another until that one runs, >= 0; a network's latency.
        ask: The server's time to give out batches, >= 0.
        push_bytes: Of one push, >= 0.
        pull_bytes: Of one pull, >= 0.
        link: Bytes a second, each way, of every worker's link and of each server's, > 0; infinite: shared memory,
            whose copies are in ``push``, ``pull`` and ``apply``.
        cores: That the server and all workers share, >= 1; None: everybody has one.
        shards: Servers that share the parameters evenly, each on a machine of its own, >= 1. All are alike, so one of
            them is simulated.

    Raises:
        TypeError: If a value is no number.
        ValueError: If a value is out of its range.

    Example:
        >>> from lightning_accel.async_sgd.simulation.costs import Costs
        >>> Costs(compute=0.1, apply=0.002, push_bytes=4_000_000, link=1e9).shards
        1
    """

    compute: float
    wait: float = 0.0
    push: float = 0.0
    pull: float = 0.0
    apply: float = 0.0
    update: float = 0.0
    message: float = 0.0
    ask: float = 0.0
    push_bytes: int = 0
    pull_bytes: int = 0
    link: float = math.inf
    cores: int | None = None
    shards: int = 1

    def __post_init__(self) -> None:
        for name in ("compute", "wait", "push", "pull", "apply", "update", "message", "ask"):
            check_number(name, getattr(self, name), at_least=0.0)
        for name in ("push_bytes", "pull_bytes"):
            check_integer(name, getattr(self, name), at_least=0)
        check_number("link", self.link, above=0.0, infinite=True)
        check_integer("cores", self.cores, at_least=1, optional=True)
        check_integer("shards", self.shards, at_least=1)
        if self.compute + self.wait <= 0.0:
            raise ValueError("a step must take some time: `compute` or `wait` must be > 0.")

    @property
    def step(self) -> float:
        """Seconds of one batch on a healthy worker, without pushing and pulling."""
        return self.compute + self.wait


def draw_slowness(speeds: Speeds, workers: int, slowdown: float) -> list[float]:
    """Return how many times slower than a healthy one each worker is, the fastest first.

    Args:
        speeds: ``equal``; ``one_slow``: the last worker is ``slowdown`` times slower; ``half_slow``: half of them are;
            ``lognormal``: evenly spread quantiles of a log-normal distribution with median 1, whose 95th percentile is
            ``slowdown``.
        workers: How many, >= 1.
        slowdown: >= 1.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> from lightning_accel.async_sgd.simulation.costs import draw_slowness
        >>> draw_slowness("half_slow", 4, 3.0)
        [1.0, 1.0, 3.0, 3.0]
    """
    check_choice("speeds", speeds, get_args(Speeds))
    check_integer("workers", workers, at_least=1)
    check_number("slowdown", slowdown, at_least=1.0)
    if speeds == "one_slow":
        return [1.0] * (workers - 1) + [slowdown]
    if speeds == "half_slow":
        return [1.0] * (workers - workers // 2) + [slowdown] * (workers // 2)
    if speeds == "lognormal" and slowdown > 1.0:
        normal = NormalDist(sigma=math.log(slowdown) / NormalDist().inv_cdf(0.95))
        return [math.exp(normal.inv_cdf((i + 0.5) / workers)) for i in range(workers)]
    return [1.0] * workers
