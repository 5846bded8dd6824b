"""Virtual time: events in order, cores that several share, and servers and links that serve one after another."""

import functools
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable

Then = Callable[[], None]


class Clock:
    """Call what is due, in order of time; of two at one time, what was asked for first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Then]] = []
        self._count = itertools.count()

    def after(self, seconds: float, then: Then) -> None:
        """Call ``then`` when ``seconds`` have passed; at once if that is none."""
        if seconds <= 0.0:
            then()
            return
        heapq.heappush(self._events, (self.now + seconds, next(self._count), then))

    def run(self, over: Callable[[], bool]) -> None:
        """Go on until ``over`` says so, or nothing is left to happen."""
        while self._events and not over():
            self.now, _, then = heapq.heappop(self._events)
            then()


class Cores:
    """Cores of one machine: worker processes share what the server leaves evenly, as an operating system does.

    The server sleeps most of the time and works in short pieces, so whenever it wakes up it is given a core at once:
    an idle one if there is one. It stays there. Who wakes it still runs at that moment, so with all others busy there
    is none, although one is idle as soon as the caller waits: each core is then as likely as any other.

    Args:
        clock: Of the simulation.
        count: How many there are; None: one for everybody.
    """

    def __init__(self, clock: Clock, count: int | None) -> None:
        self._clock, self._count = clock, count
        self._order = itertools.count()
        self._running: list[tuple[float, int, Then]] = []  # progress at which each is done
        self._progress = 0.0  # seconds of computation that each of the running got since the beginning
        self._since = 0.0
        self._served = self._intruded = False
        self._plan = 0  # number of the latest plan; what an older one says is void

    def run(self, seconds: float, then: Then) -> None:
        """Compute for ``seconds`` of one core's time, then call ``then``."""
        if self._count is None or seconds <= 0.0:
            self._clock.after(seconds, then)
            return
        self._advance()
        heapq.heappush(self._running, (self._progress + seconds, next(self._order), then))
        self._look_ahead()

    def all_busy_beside(self, caller: int = 1) -> bool:
        """Whether those that compute and so many more leave no core idle."""
        return self._count is not None and len(self._running) + caller >= self._count

    def serve(self, busy: bool, *, intruding: bool = False) -> None:
        """Take note that the server takes a core, or gives it back.

        Args:
            busy: It takes one.
            intruding: None was idle when it woke up.
        """
        if self._count is not None:
            self._advance()
            self._served, self._intruded = busy, busy and intruding
            self._look_ahead()

    @property
    def _rate(self) -> float:
        assert self._count is not None
        left = (self._count - self._served) / max(1, len(self._running))
        return min(1.0 - 1.0 / self._count if self._intruded else 1.0, left)

    def _advance(self) -> None:
        self._progress += self._rate * (self._clock.now - self._since)
        self._since = self._clock.now

    def _look_ahead(self) -> None:
        self._plan += 1
        if self._running and self._rate > 0.0:
            plan, left = self._plan, max(0.0, self._running[0][0] - self._progress)
            # never zero: rounding must not call `then` in the middle of the caller's work
            self._clock.after(max(left / self._rate, 1e-12 + math.ulp(self._clock.now)), lambda: self._end_first(plan))

    def _end_first(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._advance()
        self._progress = max(self._progress, self._running[0][0])
        _, _, then = heapq.heappop(self._running)
        self._look_ahead()
        then()


class Queue:
    """Whoever serves one after another, first come, first served: a server's thread, or one direction of a link.

    Args:
        clock: Of the simulation.
        cores: Told when it is busy, if it takes a core.
    """

    def __init__(self, clock: Clock, cores: Cores | None = None) -> None:
        self._clock, self._cores = clock, cores
        self._jobs: deque[tuple[float, Then, bool]] = deque()
        self._busy = False
        self.seconds = 0.0  # that it was busy

    def serve(self, seconds: float, then: Then, *, intruding: bool = False) -> None:
        """Serve for ``seconds`` when it is this one's turn, then call ``then``; ``intruding``: see `Cores.serve`."""
        self._jobs.append((seconds, then, intruding))
        self._take_next()

    def _take_next(self) -> None:
        while self._jobs and not self._busy:
            seconds, then, intruding = self._jobs.popleft()
            self._busy = True
            if seconds > 0.0:
                if self._cores is not None:
                    self._cores.serve(True, intruding=intruding)
                self._clock.after(seconds, functools.partial(self._done, seconds, then))
                return
            then()
            self._busy = False

    def _done(self, seconds: float, then: Then) -> None:
        self.seconds += seconds
        if self._cores is not None:
            self._cores.serve(False)
        then()
        self._busy = False
        self._take_next()
