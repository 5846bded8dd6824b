"""What a simulation is asked for: how far one server reaches, how often to push, and how many shards to have."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.simulation.costs import Costs
from lightning_accel.async_sgd.simulation.run import SimulatedRun, simulate_times

_ENOUGH = 0.9  # of what the workers could do if pushes and pulls took no time
_ROUNDS = 10  # pushes of each worker that are simulated, at most
_LEAST_ROUNDS = 3
_LEAST_BATCHES, _MOST_BATCHES = 400, 30_000  # a run; its first and last pushes of each worker are not counted
_BUSY = 0.8  # part of its time from which on a server, or its link, holds workers up
_INTERVALS = (1, 2, 4, 8, 16)
_SHARDS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Advice:
    """What to set for so many workers.

    Attributes:
        n_push: Steps between two pushes, which every worker should pull after as well.
        shards: Servers that share the parameters.
        throughput: Batches a second that it makes.
        ideal: Batches a second if pushes and pulls took no time.
    """

    n_push: int
    shards: int
    throughput: float
    ideal: float


def throughput(costs: Costs, slowness: Sequence[float], settings: Settings, *, jitter: float = 0.1) -> SimulatedRun:
    """Return how a run goes in the long run with these workers, nothing trained."""
    period = settings.local_steps or settings.n_push
    each = period * len(slowness)
    rounds = max(_LEAST_ROUNDS, min(_ROUNDS, _MOST_BATCHES // each))
    batches = max(_LEAST_BATCHES, rounds * each)
    steps = [costs.step * slow for slow in slowness]
    return simulate_times(batches, settings=settings, step_seconds=steps, jitter=jitter, costs=costs)


def ideal_throughput(costs: Costs, slowness: Sequence[float]) -> float:
    """Return the batches a second of all workers if only computing took time.

    Example:
        >>> from lightning_accel.async_sgd.simulation.costs import Costs
        >>> ideal_throughput(Costs(compute=0.1), [1.0, 2.0])
        15.0
    """
    free = sum(1.0 / (costs.step * slow) for slow in slowness)
    bound = costs.cores / costs.compute if costs.cores is not None and costs.compute else float("inf")
    return min(free, bound)


def advise(costs: Costs, slowness: Sequence[float], settings: Settings, *, jitter: float = 0.1) -> Advice:
    """Return the smallest number of shards, then the shortest interval of pushes, that lose at most a tenth.

    Pushes of several steps are larger batches, which learn less from a sample; shards are machines. With no choice that
    is good enough, the best one is returned.

    Args:
        costs: With one shard.
        slowness: Of each worker, see `draw_slowness`.
        settings: Of the run; its own ``n_push`` and ``n_fetch`` are replaced.
        jitter: Of the steps.
    """
    ideal = ideal_throughput(costs, slowness)
    best = Advice(1, 1, 0.0, ideal)
    service = _service(costs)
    for shards in _SHARDS:
        for n_push in _INTERVALS:
            if n_push * shards < _ENOUGH * ideal * service and (n_push, shards) != (_INTERVALS[-1], _SHARDS[-1]):
                continue  # so many servers could not take so many pushes
            tried = replace(settings, n_push=n_push, n_fetch=n_push, local_steps=0)
            made = throughput(replace(costs, shards=shards), slowness, tried, jitter=jitter).throughput
            if made >= _ENOUGH * ideal:
                return Advice(n_push, shards, made, ideal)
            if made > 1.02 * best.throughput:
                best = Advice(n_push, shards, made, ideal)
    return best


def reach_of_one_server(costs: Costs, step_seconds: float, *, n_push: int = 1) -> float:
    """Return for how many workers one server, or its link, is busy for 80 % of its time.

    Args:
        costs: With one shard.
        step_seconds: Mean time of a worker's step (harmonic, where they are uneven).
        n_push: Steps between two pushes and pulls.

    Example:
        >>> from lightning_accel.async_sgd.simulation.costs import Costs
        >>> round(reach_of_one_server(Costs(compute=0.1, apply=0.001), 0.1))
        80
    """
    service = _service(costs)
    if service <= 0.0:
        return float("inf")
    travel = costs.push + costs.pull + costs.apply + (costs.push_bytes + costs.pull_bytes) / costs.link
    return _BUSY * (n_push * step_seconds + travel + 3.0 * costs.message) / service


def _service(costs: Costs) -> float:
    """Return the seconds of one server, or its link, that a push and a pull take."""
    return max(costs.apply, costs.push_bytes / costs.link, costs.pull_bytes / costs.link)
