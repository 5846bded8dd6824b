"""Learning-rate schedules and step counts of one worker, driven by what all workers do together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class SharedPace:
    """How many scheduler steps are due: as many as the server took optimizer steps, seen from one worker.

    A schedule advances by (steps of the server) / (steps of this worker) for each call, so that a schedule of one step
    a batch ends when it should although each worker makes only a part of the steps. Alone, that is exactly 1.

    Args:
        counts: Returns the server's and this worker's optimizer steps so far.
        limit: Most steps in all; a one-cycle schedule refuses to go further.
    """

    def __init__(self, counts: Callable[[], tuple[int, int]], limit: float = float("inf")) -> None:
        self._counts = counts
        self._last = counts()
        self._due = 0.0
        self._done = 0
        self._limit = limit

    def advance(self) -> int:
        """Return how often to step now."""
        server, own = self._counts()
        made_here = own - self._last[1]
        if made_here <= 0:
            return int(self._done < self._limit)
        self._due += (server - self._last[0]) / made_here
        self._last = (server, own)
        steps = int(min(max(1.0, self._due), self._limit - self._done))
        self._due = max(0.0, self._due - steps)
        self._done += steps
        return steps


def follow_pace(scheduler: Any, pace: SharedPace, is_per_epoch: Callable[[], bool]) -> None:
    """Make ``scheduler.step()`` take as many steps as are due; in place, and in no state dict.

    Args:
        scheduler: A learning-rate scheduler of torch.
        pace: Says how many.
        is_per_epoch: Whether a call right now is one of those that come once an epoch, and so counts once.
    """
    base = type(scheduler)

    def step(self: Any, *args: Any, **named: Any) -> None:
        for _ in range(1 if is_per_epoch() else pace.advance()):
            base.step(self, *args, **named)

    scheduler.__class__ = type(base.__name__, (base,), {"step": step, "__module__": base.__module__})


def catch_up(
    configs: Sequence[Any], states: Sequence[dict[str, Any]], *, epochs: range, steps_of: Mapping[int, int]
) -> None:
    """Bring the schedulers of a process that was started again to where the run is.

    Args:
        configs: Lightning's configurations of them; none that waits for a metric.
        states: Of the same schedulers in the coordinator, a moment ago.
        epochs: That have ended since.
        steps_of: Steps that the server has made since, by the identity of the optimizer.
    """
    for config, state in zip(configs, states, strict=False):
        scheduler = config.scheduler
        scheduler.load_state_dict(state)
        due = sum((epoch + 1) % config.frequency == 0 for epoch in epochs)
        if config.interval == "step":
            due = max(0, steps_of.get(id(scheduler.optimizer), 0)) // config.frequency
            total = getattr(scheduler, "total_steps", None)  # a one-cycle schedule refuses to go further
            due = due if total is None else min(due, total - 1 - scheduler.last_epoch)
        for _ in range(due):
            scheduler.step()


def step_to_show(shown: int, actual: int, periods: Sequence[int]) -> int:
    """Return the global step to show next, after ``shown``, when the truth is ``actual``.

    Callbacks that act on every n-th step test for exact multiples, and with several workers the count jumps. So where
    the jump passes a multiple of some period, that multiple is shown first; the rest follows with the next step.
    """
    passed = [multiple for n in periods if (multiple := (shown // n + 1) * n) <= actual]
    return min(passed, default=actual)
