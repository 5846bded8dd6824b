"""Virtual time: events in order, cores that several share, and servers and links that serve one after another."""

import functools
import heapq
import itertools
import math
import operator
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
    """Cores of one machine, which worker processes and the server share evenly, as an operating system has it.

    Who wakes up takes an idle core if there is one, and stays there. Who wakes the server still runs at that moment, so
    with all others busy there is none, although one is idle as soon as the caller waits: every other time the server
    then shares the core of somebody who computes.

    Args:
        clock: Of the simulation.
        count: How many there are; None: one for everybody.
    """

    def __init__(self, clock: Clock, count: int | None) -> None:
        self._clock, self._count = clock, count
        self._order = itertools.count()
        self._running: list[tuple[float, int, Then]] = []  # workers; progress at which each is done
        self._progress = 0.0  # seconds of computation that each of them got since the beginning
        self._serving: tuple[float, Then] | None = None  # seconds that are left to the server
        self._intruding = False  # the server shares a core although one is idle
        self._crowded = 0  # times that it woke up with no core idle
        self._since = 0.0
        self._plan = 0  # number of the latest plan; what an older one says is void

    def run(self, seconds: float, then: Then) -> None:
        """Compute for ``seconds`` of one core's time, then call ``then``."""
        if self._count is None or seconds <= 0.0:
            self._clock.after(seconds, then)
            return
        self._advance()
        heapq.heappush(self._running, (self._progress + seconds, next(self._order), then))
        self._look_ahead()

    def all_busy_beside(self) -> bool:
        """Whether those that compute and one more, who asks, leave no core idle."""
        return self._count is not None and len(self._running) + 1 >= self._count

    def serve(self, seconds: float, then: Then, *, crowded: bool = False) -> None:
        """Let the server compute for ``seconds``, then call ``then``; ``crowded``: no core was idle when it woke up."""
        if self._count is None or seconds <= 0.0:
            self._clock.after(seconds, then)
            return
        self._advance()
        self._crowded += crowded
        self._serving, self._intruding = (seconds, then), crowded and self._crowded % 2 == 1
        self._look_ahead()

    def _rates(self) -> tuple[float, float]:
        """Return how fast each worker and the server compute."""
        assert self._count is not None
        workers = len(self._running)
        fair = min(1.0, self._count / max(1, workers + (self._serving is not None)))
        if self._serving is not None and self._intruding and workers and fair == 1.0:
            return 1.0 - 0.5 / workers, 0.5  # one of them computes at half its speed
        return fair, fair

    def _advance(self) -> None:
        rate, served = self._rates()
        passed = self._clock.now - self._since
        self._progress += rate * passed
        if self._serving is not None:
            left, then = self._serving
            self._serving = left - served * passed, then
        self._since = self._clock.now

    def _look_ahead(self) -> None:
        self._plan += 1
        plan, (rate, served) = self._plan, self._rates()
        ends = []
        if self._running:
            ends.append(((self._running[0][0] - self._progress) / rate, self._end_first))
        if self._serving is not None:
            ends.append((self._serving[0] / served, self._end_service))
        if ends:
            left, end = min(ends, key=operator.itemgetter(0))
            # never zero: rounding must not call `then` in the middle of the caller's work
            self._clock.after(max(left, 1e-12 + math.ulp(self._clock.now)), lambda: self._end(plan, end))

    def _end(self, plan: int, end: Then) -> None:
        if plan == self._plan:
            self._advance()
            end()

    def _end_first(self) -> None:
        self._progress = max(self._progress, self._running[0][0])
        _, _, then = heapq.heappop(self._running)
        self._look_ahead()
        then()

    def _end_service(self) -> None:
        assert self._serving is not None
        _, then = self._serving
        self._serving = None
        self._look_ahead()
        then()


class Queue:
    """Whoever serves one after another, first come, first served: a server's thread, or one direction of a link.

    Args:
        clock: Of the simulation.
        cores: That it computes on, if it does.
    """

    def __init__(self, clock: Clock, cores: Cores | None = None) -> None:
        self._clock, self._cores = clock, cores
        self._jobs: deque[tuple[float, Then, bool]] = deque()
        self._busy = False
        self.seconds = 0.0  # that it was busy

    def serve(self, seconds: float, then: Then, *, crowded: bool = False) -> None:
        """Serve for ``seconds`` when it is this one's turn, then call ``then``; ``crowded``: see `Cores.serve`."""
        self._jobs.append((seconds, then, crowded))
        self._take_next()

    def _take_next(self) -> None:
        while self._jobs and not self._busy:
            seconds, then, crowded = self._jobs.popleft()
            self._busy = True
            if seconds > 0.0:
                done = functools.partial(self._done, self._clock.now, then)
                if self._cores is None:
                    self._clock.after(seconds, done)
                else:
                    self._cores.serve(seconds, done, crowded=crowded)
                return
            then()
            self._busy = False

    def _done(self, began: float, then: Then) -> None:
        self.seconds += self._clock.now - began
        then()
        self._busy = False
        self._take_next()
