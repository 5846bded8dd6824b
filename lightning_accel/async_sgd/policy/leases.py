"""Data leases: which worker holds which block of the epoch, so that every sample is seen once although workers die."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LeaseId = tuple[int, int]  # (epoch, position in the epoch's order)


@dataclass(frozen=True)
class Lease:
    """One unit of the epoch's order: usually the list of sample indices of one batch.

    Example:
        >>> from lightning_accel.async_sgd import Lease
        >>> Lease(epoch=0, position=3, unit=[6, 7]).id
        (0, 3)
    """

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

    The order of an epoch may become known piece by piece (`begin` with ``complete=False``, then `extend`), as an
    order without a length does.

    Args:
        block: Most units of one grant, >= 1. Towards the end of an epoch grants shrink (guided self-scheduling).

    Raises:
        ValueError: If ``block < 1``.

    Example:
        >>> from lightning_accel.async_sgd import LeaseBook
        >>> book = LeaseBook(block=2)
        >>> book.begin(0, [[0, 1], [2, 3], [4, 5]])
        >>> [lease.unit for lease in book.grant(worker=1, epoch=0)]  # grants shrink towards the end of an epoch
        [[0, 1]]
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
        self._growing: set[int] = set()  # epochs whose order is not yet known to its end
        self._latest = -1

    def has_order(self, epoch: int) -> bool:
        """Whether the order of ``epoch`` is, or was, known, at least its beginning."""
        return epoch <= self._latest

    def is_growing(self, epoch: int) -> bool:
        """Whether more units of the epoch may come by `extend`."""
        return epoch in self._growing

    def begin(self, epoch: int, units: Sequence[Any], *, done: Iterable[int] = (), complete: bool = True) -> None:
        """Set the order of an epoch; ``done`` are the positions that an earlier run has committed.

        With ``complete=False`` these are its first units only, and `extend` adds the others.

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
        if not complete:
            self._growing.add(epoch)

    def extend(self, epoch: int, units: Sequence[Any], *, complete: bool) -> None:
        """Add units to an order that is growing; ``complete`` says that these are its last.

        Raises:
            ValueError: If the order of this epoch is not growing.
        """
        if epoch not in self._growing:
            raise ValueError(f"the order of epoch {epoch} is complete or was never begun; ask `is_growing` first.")
        self._orders[epoch].extend(units)
        self._left[epoch] += len(units)
        if complete:
            self._growing.discard(epoch)
            self._forget_finished()

    def known(self, epoch: int) -> int:
        """How many units of an unfinished epoch are known; 0 for any other."""
        return len(self._orders.get(epoch, ()))

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
        return self._lease(worker, ids)

    def take_over(self, worker: int, epoch: int) -> list[Lease]:
        """Lease the unit to ``worker`` that another holds and is to train last, of this epoch or an earlier one.

        One at a time: the other goes on with what it has begun, and what it pushes for this unit will be refused.
        An empty list if nobody else holds any.
        """
        others = [lease for lease, holder in self._held.items() if holder != worker and lease[0] <= epoch]
        return self._lease(worker, [max(others)] if others else [])

    def _lease(self, worker: int, ids: Sequence[LeaseId]) -> list[Lease]:
        for lease in ids:
            self._held[lease] = worker
        return [Lease(e, i, self._orders[e][i]) for e, i in ids]

    def holds(self, worker: int, leases: Iterable[LeaseId]) -> bool:
        """Whether ``worker`` still holds every one of these leases."""
        return all(self._held.get(lease) == worker for lease in leases)

    def samples(self, leases: Iterable[LeaseId]) -> int:
        """Return how many samples are in these units, which somebody holds; a unit that has no length counts as one."""
        units = [self._orders[epoch][position] for epoch, position in leases]
        return sum(1 if isinstance(unit, str) or not hasattr(unit, "__len__") else len(unit) for unit in units)

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
        self._forget_finished()

    def _forget_finished(self) -> None:
        finished = [e for e, left in self._left.items() if left == 0 and e < self._latest]
        for epoch in finished:
            if epoch not in self._growing:
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

    def leave_out(self, before: int) -> int:
        """Give up every free unit of the epochs before this one, as if it was trained on; returns how many there were.

        For a worker alone whose loop has left an epoch before its end: a plain loop does not come back to it.
        """
        left_out = [lease for lease in self._returned if lease[0] < before]
        self._returned = deque(lease for lease in self._returned if lease[0] >= before)
        for epoch, _ in left_out:
            self._left[epoch] -= 1
        count = len(left_out)
        for epoch in [e for e in self._orders if e < before]:
            count += self.fresh(epoch)
            self._left[epoch] -= self.fresh(epoch)
            self._next[epoch] = len(self._orders[epoch])
            self._growing.discard(epoch)
        self._forget_finished()
        return count

    def held_by_others(self, worker: int, epoch: int) -> int:
        """How many units of ``epoch``, and of those before, workers other than this one hold."""
        return sum(1 for lease, holder in self._held.items() if holder != worker and lease[0] <= epoch)

    @property
    def has_returned(self) -> bool:
        """Whether units wait to be given out again."""
        return bool(self._returned)

    def remaining(self) -> int:
        """How many units of the known epochs are not yet committed."""
        return sum(self._left.values())

    def fresh(self, epoch: int) -> int:
        """How many units of the epoch were never given out."""
        return len(self._orders[epoch]) - self._next[epoch] if epoch in self._orders else 0

    def current_epoch(self) -> int:
        """The first epoch with units that are not committed, or the last one known; 0 before the first."""
        unfinished = (e for e, left in self._left.items() if left or e in self._growing)
        return min(unfinished, default=max(0, self._latest))

    def committed(self, epoch: int) -> int:
        """How many units of an epoch that is still known are committed."""
        return len(self._orders[epoch]) - self._left[epoch] if epoch in self._orders else 0

    def state(self) -> list[dict[str, Any]]:
        """Return the unfinished epochs as plain lists and numbers: order and committed positions of each.

        One whose order is still growing has ``complete`` False: a resumed run can not know the rest of it.
        """
        free = set(self._held) | set(self._returned)
        states = []
        for epoch, order in sorted(self._orders.items()):
            done = [i for i in range(self._next[epoch]) if (epoch, i) not in free]
            growing = {"complete": False} if epoch in self._growing else {}
            states.append({"epoch": epoch, "units": list(order) if growing else order, "done": done} | growing)
        return states
