"""Say aloud that gradients are dropped, without a line for each of them."""

from collections import Counter


class DropNotes:
    """Count the dropped pushes of each worker and say when that is worth a line: the 1st, 10th, 100th, ...

    Args:
        drop_beyond: Staleness beyond which the rule ``drop`` refuses.
    """

    def __init__(self, drop_beyond: int) -> None:
        self._drop_beyond = drop_beyond
        self._bad: Counter[int] = Counter()
        self._bad_in_a_row: Counter[int] = Counter()
        self._stale: Counter[int] = Counter()

    def take(self, worker: int, outcome: str, *, finite: bool) -> str | None:
        """Take note of what became of a push that carried gradients; returns what to say, if anything."""
        if finite:
            if outcome in ("applied", "dropped"):
                self._bad_in_a_row[worker] = 0
            if outcome != "dropped":
                return None
            self._stale[worker] += 1
            if not _is_worth_a_line(self._stale[worker]):
                return None
            return (
                f"a gradient of worker {worker} was dropped, since it was more than `drop_beyond={self._drop_beyond}` "
                f"steps old; its batch is given out again ({self._stale[worker]} so far)."
            )
        self._bad[worker] += 1
        self._bad_in_a_row[worker] += 1
        in_a_row = self._bad_in_a_row[worker]
        if in_a_row > 1 and _is_worth_a_line(in_a_row):
            return (
                f"the last {in_a_row} gradients of worker {worker} all had NaN or Inf and were dropped: it adds "
                "nothing to the training; look at its device and its data."
            )
        if not _is_worth_a_line(self._bad[worker]):
            return None
        return (
            f"a gradient of worker {worker} had NaN or Inf: it was dropped, and its batch counts as seen "
            f"({self._bad[worker]} so far)."
        )

    def summary(self) -> str | None:
        """Return what to say when the run is over; None if nothing was dropped for NaN or Inf."""
        if not self._bad:
            return None
        by_worker = ", ".join(f"{count} of worker {worker}" for worker, count in sorted(self._bad.items()))
        return (
            f"{self._bad.total()} gradients had NaN or Inf and were dropped ({by_worker}); "
            "the model was not trained on their batches."
        )


def _is_worth_a_line(count: int) -> bool:
    return count > 0 and str(count).strip("0") == "1"
