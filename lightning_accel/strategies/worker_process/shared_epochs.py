"""The training data of one worker: which batches it leases, and which of them it has in hand."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from lightning_accel.async_sgd import Lease, ParameterStore, Worker
from lightning_accel.async_sgd.policy.leases import LeaseId

_PIECE = 64  # units of an order without a length that several workers share at once


class UnitsOfEpoch:
    """What the user's own (batch) sampler gives for one epoch, as a whole or, without a length, piece by piece.

    Args:
        order: The sampler.
    """

    def __init__(self, order: Iterable[Any]) -> None:
        self.order = order
        self._iterator: Iterator[Any] | None = None
        self._drawn = 0

    @property
    def has_length(self) -> bool:
        """Whether the order has a length; one without may have no end."""
        try:
            len(self.order)  # type: ignore[arg-type]  # that is the question
        except (TypeError, NotImplementedError):  # what torch's own samplers raise
            return False
        return True

    def first(self, limit: float) -> list[Any]:
        """Return all units, or the first so many."""
        return list(self.order) if limit == float("inf") else list(islice(self.order, int(limit)))

    def more(self, known: int, *, piece: int, limit: float) -> tuple[list[Any], bool]:
        """Return the units that follow the first ``known`` ones, ``piece`` at most, and whether they are the last.

        Nothing is drawn before it is asked for: a sampler may draw from the random state that training draws from.
        """
        if self._iterator is None or self._drawn != known:
            self._iterator, self._drawn = iter(self.order), known
            next(islice(self._iterator, known, known), None)  # what another process has drawn before
        wanted = int(min(piece, limit - known))
        units = list(islice(self._iterator, wanted))
        self._drawn += len(units)
        return units, len(units) < wanted or self._drawn >= limit


class SharedEpochs:
    """One worker's share of the batches of each epoch.

    Args:
        trainer: In this process.
        store: This worker's end of the run.
        workers: How many were asked for.
    """

    def __init__(self, trainer: Any, store: ParameterStore, workers: int) -> None:
        self.in_hand: list[LeaseId] = []  # of batches that are loaded but not yet trained on
        self._trainer = trainer
        self._store = store
        self._workers = workers
        self._worker: Worker | None = None  # once the run is joined
        self._thread = threading.get_ident()
        self._elsewhere = False  # whether another thread has asked for batches
        self._epoch = -1
        self._early: list[Any] = []  # units that were loaded before
        self._early_complete = False

    def take(self, units: UnitsOfEpoch) -> list[Lease] | None:
        """Lease the next block of the epoch; None where the loader is not leased."""
        trainer = self._trainer
        if not isinstance(trainer.train_dataloader, DataLoader):
            return None  # several loaders, and so one worker: leases know one order an epoch
        if self._worker is None:
            return self._take_early(units)
        if self._workers > 1 and threading.get_ident() != self._thread:
            self._elsewhere = True
            return []  # an error here would end that thread alone, and the loop would wait for it for ever
        epoch = trainer.current_epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self._worker.flush()  # batches that led to no push must not keep the last epoch open
        return self._lease(epoch, units)

    def check_asked(self, loader: str, asked: bool) -> None:
        """Refuse a loader whose batches nobody has asked for as workers share them out.

        Args:
            loader: Its type.
            asked: Whether it has asked its sampler for what it gives.

        Raises:
            ValueError: If several workers cannot share it out.
        """
        if self._workers == 1 or self._worker is None or (asked and not self._elsewhere):
            return
        how = (
            "draws its batches in a thread of its own"
            if self._elsewhere
            else "gives batches without asking its sampler"
        )
        raise ValueError(
            f"{loader} {how}, and several workers share the data out by what the sampler is asked for; use a plain "
            "DataLoader (with `num_workers` to load ahead), or `devices=1`."
        )

    def _lease(self, epoch: int, units: UnitsOfEpoch) -> list[Lease]:
        trainer, limit = self._trainer, self._limit
        final = trainer.max_epochs not in (None, -1) and epoch + 1 >= trainer.max_epochs
        if units.has_length:
            block = self._store.lease(epoch, lambda: units.first(limit), final=final)
        else:
            piece = 1 if self._workers == 1 else _PIECE
            block = self._store.lease(
                epoch, list, final=final, more=lambda known: units.more(known, piece=piece, limit=limit)
            )
        if not block:
            self.stop_with_the_run()  # without a batch there is no other moment to notice it
        return block

    def stop_with_the_run(self) -> None:
        """Let this worker's loop end if the run is over, whatever epochs and steps it was to make at least."""
        if self._store.stopped:
            self._trainer.should_stop = True
            self._trainer.fit_loop.min_epochs = 0
            self._trainer.fit_loop.epoch_loop.min_steps = None

    @property
    def _limit(self) -> float:
        return float(self._trainer.num_training_batches)

    def _take_early(self, units: UnitsOfEpoch) -> list[Lease] | None:
        """Give out batches before the run is joined: Lightning loads one ahead where there is no length."""
        if units.has_length:
            return None  # the loop does not ask; who else does reads the data as they are
        if self._workers > 1 or self._store.incarnation > 0:
            return []  # begins anew when the run is joined
        first = len(self._early)
        drawn, self._early_complete = units.more(first, piece=1, limit=self._limit)
        self._early += drawn
        return [Lease(self._trainer.current_epoch, first + i, unit) for i, unit in enumerate(drawn)]

    def join(self, worker: Worker) -> None:
        """Take part with the data, too: what was loaded early is leased now."""
        self._worker = worker
        early, leased = self._early, 0
        while leased < len(early):
            leased += len(
                self._store.lease(
                    self._trainer.current_epoch, list, more=lambda known: (early[known:], self._early_complete)
                )
            )

    def begin_anew(self, loading: Sequence[LeaseId]) -> None:
        """Give back what this worker has in hand and ``loading``: the loader begins anew, and will not yield it."""
        held = [*self.in_hand, *loading]
        self.in_hand.clear()
        if self._worker is not None:
            self._store.give_back(held)

    def begin_batch(self) -> LeaseId | None:
        """Return the lease of the batch that is trained on next; None if it has none."""
        return self.in_hand.pop(0) if self.in_hand else None

    def loading(self, busy: bool) -> None:
        """Let a batch that never comes be noticed."""
        if self._worker is None:
            return
        if busy:
            self._store.begin("load")
        else:
            self._store.rest()
