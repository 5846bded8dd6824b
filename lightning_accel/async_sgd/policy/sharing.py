"""Who is given which batches next, and when nobody waits for a straggler any longer; knows nothing of processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_accel.async_sgd.policy.leases import Lease, LeaseBook
from lightning_accel.async_sgd.settings import Settings


class Member(Protocol):
    """What sharing knows of one worker.

    Attributes:
        worker: Its number.
        epoch: The last one it asked for; set here.
        leased_epoch: The last one of which it was given a batch; set here.
        idle: Whether it does something else for a while (validates).
    """

    worker: int
    epoch: int
    leased_epoch: int
    idle: bool

    @property
    def active(self) -> bool:
        """Whether it has neither left nor died."""
        ...


@dataclass(frozen=True)
class LeaseRequest:
    """What a worker asks for.

    Attributes:
        epoch: That it is in.
        final: Whether that is the last one of the run.
        units: What it was asked for before: units of the order, from ``known`` on; None if it was not asked.
        known: How many units were known when it was asked.
        complete: Whether ``units`` are the last of the epoch.
    """

    epoch: int
    final: bool = False
    units: Sequence[Any] | None = None
    known: int = 0
    complete: bool = True


@dataclass(frozen=True)
class LeaseAnswer:
    """Batches for a worker (none: the epoch is over for it), or the wish for more of the epoch's order.

    Attributes:
        leases: What it is to train on.
        known: How many units of the order are known, if it is to hand in those that follow; else None.
    """

    leases: list[Lease] = field(default_factory=list)
    known: int | None = None


@dataclass(frozen=True)
class Situation:
    """What an answer depends on beside the leases themselves.

    Attributes:
        now: Seconds, of a clock that never goes back.
        coordinator: Number of the worker that validates.
        live: Workers that take part.
        steps: Optimizer steps made in this run.
        stopped: Whether the run is over.
        frozen: Whether pushes of the others are not applied for the moment, so that nobody can be called late.
    """

    now: float
    coordinator: int
    live: int
    steps: int
    stopped: bool = False
    frozen: bool = False


class Sharing:
    """Share out the batches of a run.

    Args:
        book: Of the run.
        settings: Of the run.
        workers: How many there are at most. One alone takes its batches in the order of a plain loop: what it leaves
            of an epoch is left for good.
    """

    def __init__(self, book: LeaseBook, settings: Settings, workers: int) -> None:
        self.book = book
        self._settings = settings
        self._workers = workers
        self._asked: dict[int, tuple[int, float]] = {}  # epoch: who was asked for (more of) its order, and when
        self._waited_since: dict[int, float] = {}  # epoch: when the coordinator had nothing left to do but wait
        self.taken_over = 0  # units that were given to the coordinator while others held them

    def answer(
        self, member: Member, members: Sequence[Member], request: LeaseRequest, at: Situation
    ) -> LeaseAnswer | None:
        """Return what a worker is given, or None while it has to wait.

        The coordinator is the only one that waits at the end of an epoch, for at most ``straggler_grace`` seconds:
        then it takes over one batch after the other of those that others still hold. Who finds no batch but the
        coordinator's in an epoch that this has not begun waits for it: else it would run through all epochs ahead.
        """
        book, epoch = self.book, request.epoch
        member.epoch = max(member.epoch, epoch)
        if at.stopped:
            return LeaseAnswer()
        self._learn(member, request)
        coordinates = at.coordinator == member.worker
        if self._workers == 1:
            book.leave_out(before=epoch)
        if not coordinates and self._is_held_up(members, epoch, at):
            return None
        if self._needs_units(member, epoch, at):
            return self._ask_for_units(member, members, epoch, at.now)
        reserve = 0
        if not coordinates:
            # the coordinator trains a batch of every epoch: without one it would not validate at the epoch's end
            reserve = int(any(m.worker == at.coordinator and m.leased_epoch < epoch for m in members))
            reserve = max(reserve, self._settings.cooldown_steps if request.final else 0)
        leases = book.grant(member.worker, epoch, workers=at.live, reserve=reserve, leftovers=coordinates)
        if not leases and coordinates and book.held_by_others(member.worker, epoch):
            since = self._waited_since.setdefault(epoch, at.now)
            if at.frozen or at.now - since < self._settings.straggler_grace:
                return None
            leases = book.take_over(member.worker, epoch)
            self.taken_over += len(leases)
        if not leases and reserve and any(m.worker == at.coordinator and m.epoch < epoch for m in members):
            return None
        if leases:
            member.leased_epoch = max(member.leased_epoch, leases[-1].epoch)
        return LeaseAnswer(leases)

    def _is_held_up(self, members: Sequence[Member], epoch: int, at: Situation) -> bool:
        if at.steps < self._settings.warm_start_steps:
            return True
        chief = next((m for m in members if m.worker == at.coordinator), None)
        pause = self._settings.validate == "pause" and chief is not None
        return bool(pause and chief is not None and (chief.idle or chief.epoch < epoch))

    # --- the order of an epoch

    def _learn(self, member: Member, request: LeaseRequest) -> None:
        book, epoch = self.book, request.epoch
        if request.units is None or self._asked.get(epoch, (None, 0.0))[0] != member.worker:
            return  # another was asked meanwhile: two orders of one epoch do not fit together
        del self._asked[epoch]
        if not book.has_order(epoch):
            book.begin(epoch, request.units, complete=request.complete)
        elif book.is_growing(epoch) and book.known(epoch) == request.known:
            book.extend(epoch, request.units, complete=request.complete)
        if book.is_growing(epoch):
            self._asked[epoch] = member.worker, float("inf")  # goes on drawing from what it has begun

    def _needs_units(self, member: Member, epoch: int, at: Situation) -> bool:
        if not self.book.has_order(epoch):
            return True
        if not self.book.is_growing(epoch):
            return False
        draws = self._asked.get(epoch, (None, 0.0))[0] == member.worker
        if self.book.has_returned and not draws:
            return False
        ahead = 2 * self._settings.lease_batches * at.live if draws and self._workers > 1 else 1
        return self.book.fresh(epoch) < ahead

    def _ask_for_units(self, member: Member, members: Sequence[Member], epoch: int, now: float) -> LeaseAnswer | None:
        asked, when = self._asked.get(epoch, (member.worker, now))
        draws_on = when == float("inf")
        if asked != member.worker and any(m.worker == asked and m.active for m in members):
            if draws_on:
                when = now
                self._asked[epoch] = asked, when
            if now - when < self._settings.straggler_grace:
                return None
        self._asked[epoch] = member.worker, now
        return LeaseAnswer(known=self.book.known(epoch))
