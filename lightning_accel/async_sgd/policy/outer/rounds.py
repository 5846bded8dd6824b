"""When a round of local steps closes, and what each way in it weighs; knows nothing of processes."""

from collections import deque
from collections.abc import Collection, Sequence

from lightning_accel.async_sgd.settings import Settings

_ROUNDS_KNOWN = 1000  # for the staleness of those who come later than that, it is as if they came then


class Rounds:
    """The rounds of one run: workers push a way each, and all ways of a round count together when it closes.

    A round closes when nobody is left who could still push in it, or once `Settings.min_workers` have pushed and
    `Settings.round_grace` seconds have passed since. Those who come later are in the next one.

    Args:
        settings: Of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self._least, self._grace = settings.min_workers, settings.round_grace
        self._quorum_at: float | None = None
        self._closed: deque[int] = deque(maxlen=_ROUNDS_KNOWN)

    def is_due(self, pushed: Collection[int], able: Collection[int], now: float) -> bool:
        """Whether the round closes now.

        Args:
            pushed: Workers whose ways are there.
            able: Workers that take part and could push: they have batches, and do nothing else. Who has pushed may be
                among them.
            now: Seconds, of a clock that never goes back.
        """
        quorum = min(self._least, len({*pushed, *able}))  # of the dead, nobody waits for any
        if not pushed or len(pushed) < quorum:
            self._quorum_at = None
            return False
        if self._quorum_at is None:
            self._quorum_at = now
        return set(able) <= set(pushed) or now - self._quorum_at >= self._grace

    def closes_in(self, now: float) -> float | None:
        """Return the seconds until the grace of a round that has its quorum is over; None if it has none yet."""
        return None if self._quorum_at is None else max(0.0, self._quorum_at + self._grace - now)

    def closed(self, version: int) -> None:
        """Take note that a round has closed, and led to this version."""
        self._quorum_at = None
        self._closed.append(version)

    def staleness_of(self, base_version: int) -> int:
        """Return how many rounds have closed since a version was read."""
        return sum(version > base_version for version in self._closed)


def shares_of(sizes: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Return the share of each way in a round: its part of all samples, times the weight that staleness leaves it.

    Args:
        sizes: Samples behind each way, >= 0; if nobody knows of any, all count alike.
        weights: Each in [0, 1].
    """
    total = sum(sizes)
    parts = [size / total if total else 1.0 / len(sizes) for size in sizes]
    return [part * weight for part, weight in zip(parts, weights, strict=True)]
