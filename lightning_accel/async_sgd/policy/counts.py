"""What a server counts of a run, for `Statistics`."""

import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from lightning_accel.async_sgd.store import Statistics


@dataclass
class Counts:
    """Of one server.

    Attributes:
        outcomes: What became of pushes.
        pushes: Applied ones of each worker.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    pushes: Counter[int] = field(default_factory=Counter)
    _staleness: deque[int] = field(default_factory=lambda: deque(maxlen=1000))
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    _apply_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    _pull_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def applied(self, worker: int, staleness: int) -> None:
        """Take note of a push that was applied."""
        self.pushes[worker] += 1
        self._staleness.append(staleness)
        self._times.append(time.monotonic())

    def took(self, began: float) -> None:
        """Take note of a step that began at a time of `time.perf_counter` and ends now."""
        self._apply_seconds.append(time.perf_counter() - began)

    def pulled(self, seconds: float | None) -> None:
        """Take note of how long a worker's pull took, if it made one."""
        if seconds is not None:
            self._pull_seconds.append(seconds)

    def statistics(self, *, version: int, live_workers: int, restarts: int, taken_over: int) -> Statistics:
        """Return all of it, with what others count."""
        span = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
        ordered = sorted(self._staleness)
        return Statistics(
            version=version,
            staleness_mean=statistics.fmean(ordered) if ordered else 0.0,
            staleness_p95=float(ordered[int(0.95 * (len(ordered) - 1))]) if ordered else 0.0,
            updates_per_second=(len(self._times) - 1) / span if span > 0 else 0.0,
            live_workers=live_workers,
            dropped=self.outcomes["dropped"],
            taken_over=taken_over,
            refused=self.outcomes["refused"],
            restarts=restarts,
            apply_milliseconds=1e3 * statistics.median(self._apply_seconds or [0.0]),
            pull_milliseconds=1e3 * statistics.median(self._pull_seconds or [0.0]),
            worker_pushes=tuple(self.pushes[w] for w in range(max(self.pushes, default=-1) + 1)),
        )
