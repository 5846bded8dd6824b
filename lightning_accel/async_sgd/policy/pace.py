"""How long one worker's steps and loads take, and so how long it may be silent in one before it counts as hung."""

import time
from collections.abc import Callable

UNKNOWN = 0.0
"""The limit of what was never measured; others may know better."""

_TIMES = 20  # the longest so far
_LEAST_SECONDS = {"load": 300.0, "step": 30.0}  # storage may be slow for a while, and a load holds nobody up


class Pace:
    """Measure what a worker does, by name, and say how long the next may take.

    Args:
        stall_seconds: The limit; None for twenty times the longest so far, and at least 30 s for a step, 300 s for a
            load. Before the first step was measured it is `UNKNOWN`, and before the
            first load there is none.
        tell: Told the limit (inf: none, `UNKNOWN`) whenever something begins or ends.
        clock: Seconds.
    """

    def __init__(
        self,
        stall_seconds: float | None,
        tell: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stall_seconds = stall_seconds
        self._tell = tell
        self._clock = clock
        self._longest: dict[str, float] = {}
        self._doing: str | None = None
        self._began = 0.0

    def limit(self, what: str) -> float:
        """Return the seconds that ``what`` may take; `UNKNOWN` before the first step, inf before the first load."""
        if self._stall_seconds is not None:
            return self._stall_seconds
        if what not in self._longest:
            return UNKNOWN if what == "step" else float("inf")
        return max(_LEAST_SECONDS.get(what, 0.0), _TIMES * self._longest[what])

    def begin(self, what: str) -> None:
        """Begin ``what``; ends what was begun before."""
        self.end()
        self._doing, self._began = what, self._clock()
        self._tell(self.limit(what))

    def end(self) -> None:
        """End what was begun, if anything."""
        if self._doing is None:
            return
        took = self._clock() - self._began
        self._longest[self._doing] = max(took, self._longest.get(self._doing, 0.0))
        self._doing = None
        self._tell(float("inf"))

    def wait(self, wait: Callable[[], None]) -> None:
        """Call what waits for others, whose time does not count."""
        if self._doing is None:
            wait()
            return
        self._tell(float("inf"))
        began = self._clock()
        wait()
        self._began += self._clock() - began
        self._tell(self.limit(self._doing))
