"""How much of a fit is still to come, as far as anything tells."""

import math
import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lightning_accel.lightning_private import every_callback

_TIMED_BATCHES = 5  # whose mean says how long a batch takes, where training ends by the clock


@dataclass(frozen=True)
class Remaining:
    """Training batches that are still to come, the present one included.

    Attributes:
        batches: As many as can be counted on.
        at_most: As many as any limit leaves, infinite without one. Where that is more, waiting tells more.
    """

    batches: float
    at_most: float


class Progress:
    """Counts batches while nothing is decided.

    Limits of epochs and steps (``limit_train_batches``, ``overfit_batches`` and accumulation included) and of time
    (``max_time``, any `Timer`) all count. Where one is not known yet, because the data have no length or no batch has
    been timed, and where there is none at all, training is taken to go on for as long as it has so far: what is then
    spent on finding out is bounded by what was already trained.

    Attributes:
        batches: That began so far.
        epoch: Of the last one; None before the first.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.epoch: int | None = None
        self._index = 0
        self._epoch_length: float = math.inf
        self._timed_from = 0.0
        self._timers: list[Any] = []
        self._schedulers: list[Any] = []  # of accumulation

    @property
    def by_time(self) -> bool:
        """Whether a limit of time counts."""
        return bool(self._timers)

    def note_batch(self, trainer: "pl.Trainer") -> bool:
        """Take note that a training batch begins; return whether it is the first of an epoch (or of the fit)."""
        epoch, index = trainer.current_epoch, batch_index(trainer)
        begins = epoch != self.epoch
        if begins:
            self._timers = [timer for timer in _callbacks_named("Timer", trainer) if timer.time_remaining() is not None]
            self._schedulers = _callbacks_named("GradientAccumulationScheduler", trainer)
        if self.epoch is not None and epoch > self.epoch:
            self._epoch_length = self._index + 1
        self.epoch, self._index = epoch, index
        if self.batches == 1:  # the first batch took what warm-up takes
            self._timed_from = time.monotonic()
        self.batches += 1
        return begins

    def remaining(self, trainer: "pl.Trainer") -> Remaining:
        """Return what remains; the same on all processes."""
        limits = {"epochs": self._by_epochs(trainer), "steps": self._by_steps(trainer), "time": self._by_time(trainer)}
        known = [limit for limit in limits.values() if limit is not None]
        at_most = min(known)
        if None not in limits.values() and math.isfinite(at_most):
            return Remaining(at_most, at_most)
        return Remaining(min(at_most, self.batches - 1), at_most)

    def _by_epochs(self, trainer: "pl.Trainer") -> float | None:
        if trainer.max_epochs in (None, -1):
            return math.inf
        length = trainer.num_training_batches
        if math.isinf(length):
            length = self._epoch_length
        if math.isinf(length):
            return None
        return max(0.0, (trainer.max_epochs - trainer.current_epoch) * length - self._index)

    def _by_steps(self, trainer: "pl.Trainer") -> float:
        """Return the batches until ``max_steps``; every optimizer of a manual optimization counts its own steps."""
        if trainer.max_steps == -1:
            return math.inf
        steps = max(0, trainer.max_steps - trainer.global_step)
        if not trainer.lightning_module.automatic_optimization:
            return steps / max(1, len(trainer.optimizers))
        window, length = self._least_accumulation(trainer), trainer.num_training_batches
        if math.isinf(length):
            return steps * window - self._index % window
        steps_of_epoch = math.ceil(length / window)  # the last batch of an epoch ends a window, however short
        steps_here = steps_of_epoch - self._index // window
        if steps <= steps_here:
            return min(steps * window - self._index % window, length - self._index)
        epochs, rest = divmod(steps - steps_here, steps_of_epoch)
        return length - self._index + epochs * length + min(rest * window, length)

    def _by_time(self, trainer: "pl.Trainer") -> float | None:
        if not self._timers:
            return math.inf
        # the strictest counts; `Trainer(max_time=...)` makes one
        seconds = min(timer.time_remaining() for timer in self._timers)
        if self.batches <= _TIMED_BATCHES:
            return None
        batch_seconds = (time.monotonic() - self._timed_from) / (self.batches - 2)
        remaining: float = trainer.strategy.broadcast(max(0.0, seconds / max(batch_seconds, 1e-9)))
        return remaining

    def _least_accumulation(self, trainer: "pl.Trainer") -> int:
        """Return the fewest batches a step that are still to come, where a scheduler changes them."""
        present: int = trainer.accumulate_grad_batches
        planned = [
            factor
            for scheduler in self._schedulers
            for epoch, factor in scheduler.scheduling.items()
            if epoch >= trainer.current_epoch
        ]
        return min([present, *planned])


def batch_index(trainer: Any) -> int:
    """Return the index of the batch that begins; hooks get another one where steps draw their batches themselves."""
    index: int = trainer.fit_loop.epoch_loop.batch_idx
    return index


def _callbacks_named(name: str, trainer: "pl.Trainer") -> list[Any]:
    """Return the callbacks of a class of Lightning, from either distribution."""
    return [c for c in every_callback(trainer) if name in {kind.__name__ for kind in type(c).__mro__}]
