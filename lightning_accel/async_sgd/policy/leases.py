"""Data leases: which worker holds which block of the epoch, so that every sample is seen once although workers die."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LeaseId = tuple[int, int]  # (epoch, position in the epoch's order)


@dataclass(frozen=True)
class Lease:
    """One unit of the epoch's order: usually the list of sample indices of one batch."""

    epoch: int
    position: int
    unit: Any

    @property
    def id(self) -> LeaseId:
        """Name of the lease, unique in a run."""
        return self.epoch, self.position


class LeaseBook:
    """Hand out the units of each epoch, take back those of the dead, and know when an epoch is complete.

    A unit is free, held by one worker, or committed. A worker holds a unit from `grant` to `commit`; `revoke` frees
    what it still holds. Returned units go out again before fresh ones, whatever epoch the next asker is in.

    Args:
        block: Most units of one grant, >= 1. Towards the end of an epoch grants shrink (guided self-scheduling).

    Raises:
        ValueError: If ``block < 1``.
    """

    def __init__(self, *, block: int = 4) -> None:
        if block < 1:
            raise ValueError(f"`block` must be >= 1, got {block}.")
        self._block = block
        self._orders: dict[int, list[Any]] = {}
        self._next: dict[int, int] = {}
        self._left: dict[int, int] = {}  # units that are not yet committed
        self._returned: deque[LeaseId] = deque()
        self._held: dict[LeaseId, int] = {}
        self._latest = -1

    def has_order(self, epoch: int) -> bool:
        """Whether the order of ``epoch`` is, or was, known."""
        return epoch <= self._latest

    def begin(self, epoch: int, units: Sequence[Any], *, done: Iterable[int] = ()) -> None:
        """Set the order of an epoch; ``done`` are the positions that an earlier run has committed.

        Raises:
            ValueError: If the order of this epoch is already known.
        """
        if self.has_order(epoch):
            raise ValueError(f"the order of epoch {epoch} is already known; ask `has_order` first.")
        self._latest = epoch
        self._orders[epoch] = list(units)
        skipped = set(done)
        self._left[epoch] = len(units) - len(skipped)
        if skipped:
            self._next[epoch] = len(units)
            self._returned.extend((epoch, i) for i in range(len(units)) if i not in skipped)
        else:
            self._next[epoch] = 0

    def grant(
        self, worker: int, epoch: int, *, workers: int = 1, reserve: int = 0, leftovers: bool = True
    ) -> list[Lease]:
        """Lease free units to a worker; an empty list if none is free.

        Args:
            worker: Who asks.
            epoch: The epoch it is in; units returned from earlier epochs come first.
            workers: Live workers, for the size of the grant.
            reserve: Units at the end of the epoch that are not given to this worker.
            leftovers: Whether it gets what was reserved in earlier epochs.
        """
        ids: list[LeaseId] = []
        if self._returned:
            ids = [self._returned.popleft()]
        else:
            earlier = [e for e in sorted(self._orders) if e < epoch and self.fresh(e)] if leftovers else []
            chosen = earlier[0] if earlier else epoch
            free = self.fresh(chosen) - (0 if earlier else reserve)
            if free > 0:
                start = self._next[chosen]
                count = max(1, min(self._block, free // (2 * max(1, workers))))
                self._next[chosen] = start + count
                ids = [(chosen, i) for i in range(start, start + count)]
        for lease in ids:
            self._held[lease] = worker
        return [Lease(e, i, self._orders[e][i]) for e, i in ids]

    def holds(self, worker: int, leases: Iterable[LeaseId]) -> bool:
        """Whether ``worker`` still holds every one of these leases."""
        return all(self._held.get(lease) == worker for lease in leases)

    def commit(self, worker: int, leases: Iterable[LeaseId]) -> None:
        """Mark leases as trained on, for ever.

        Raises:
            ValueError: If the worker does not hold one of them; nothing is committed then.
        """
        leases = list(leases)
        if not self.holds(worker, leases):
            raise ValueError(f"worker {worker} does not hold all of the leases {leases}; they were revoked.")
        for lease in leases:
            del self._held[lease]
            self._left[lease[0]] -= 1
        for epoch in [e for e, left in self._left.items() if left == 0 and e + 1 in self._orders]:
            del self._orders[epoch], self._next[epoch], self._left[epoch]

    def give_back(self, worker: int, leases: Iterable[LeaseId]) -> None:
        """Free leases whose gradient was not applied; they are given out again."""
        for lease in leases:
            if self._held.get(lease) == worker:
                del self._held[lease]
                self._returned.append(lease)

    def revoke(self, worker: int) -> int:
        """Free everything a worker holds, in order; returns how many units that were."""
        lost = sorted(lease for lease, holder in self._held.items() if holder == worker)
        self.give_back(worker, lost)
        return len(lost)

    def held_by_others(self, worker: int, epoch: int) -> int:
        """How many units of ``epoch``, and of those before, workers other than this one hold."""
        return sum(1 for lease, holder in self._held.items() if holder != worker and lease[0] <= epoch)

    def remaining(self) -> int:
        """How many units of the known epochs are not yet committed."""
        return sum(self._left.values())

    def fresh(self, epoch: int) -> int:
        """How many units of the epoch were never given out."""
        return len(self._orders[epoch]) - self._next[epoch] if epoch in self._orders else 0

    def current_epoch(self) -> int:
        """The first epoch with units that are not committed, or the last one known; 0 before the first."""
        return min((e for e, left in self._left.items() if left), default=max(0, self._latest))

    def committed(self, epoch: int) -> int:
        """How many units of an epoch that is still known are committed."""
        return len(self._orders[epoch]) - self._left[epoch] if epoch in self._orders else 0

    def state(self) -> list[dict[str, Any]]:
        """Return the unfinished epochs as plain lists and numbers: order and committed positions of each."""
        free = set(self._held) | set(self._returned)
        states = []
        for epoch, order in sorted(self._orders.items()):
            done = [i for i in range(self._next[epoch]) if (epoch, i) not in free]
            states.append({"epoch": epoch, "units": order, "done": done})
        return states
