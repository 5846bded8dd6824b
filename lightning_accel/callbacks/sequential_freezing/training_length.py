"""How long a training lasts, as far as anybody knows when it begins."""

import itertools
import math

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_accel.lightning_private import every_callback


def length_of_training(trainer: "pl.Trainer", *, in_steps: bool) -> int:
    """Return the epochs, or the optimizer steps, that a fit lasts: what the first of its limits allows.

    Args:
        trainer: When ``fit`` starts; its training data are made if their length counts.
        in_steps: Whether to count optimizer steps rather than epochs.

    Raises:
        MisconfigurationException: If nobody knows, with the reason and what to set.
    """
    timers = [callback for callback in every_callback(trainer) if hasattr(callback, "time_remaining")]
    if any(timer.time_remaining() is not None for timer in timers):
        rank_zero_warn(
            "`final_trainable` of SequentialFreezing counts from the last epoch or step, and a limit of time may end "
            "training before its phase begins."
        )
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    known, other = (steps, epochs) if in_steps else (epochs, steps)
    if math.isinf(other):
        if math.isinf(known):
            raise _unknown("there is neither max_epochs nor max_steps", in_steps)
        return int(known)
    uncounted = _why_steps_are_unknown(trainer)
    if uncounted is not None:
        if math.isinf(known):
            raise _unknown(uncounted, in_steps)
        return int(known)
    if in_steps:
        return int(min(steps, sum(_steps_of(trainer, epoch) for epoch in range(int(epochs)))))
    made = 0
    for epoch in itertools.count():
        if epoch >= epochs or made >= steps:
            return epoch
        made += _steps_of(trainer, epoch)
    raise AssertionError("an endless count ends by its limits")


def _why_steps_are_unknown(trainer: "pl.Trainer") -> str | None:
    if not trainer.lightning_module.automatic_optimization:
        return "the steps of a manual optimization can not be counted beforehand"
    trainer.fit_loop.setup_data()
    if math.isinf(trainer.num_training_batches):
        return "the training data have no length, so the number of batches of an epoch is unknown"
    if trainer.num_training_batches == 0:
        return "there are no training batches"
    return None


def _steps_of(trainer: "pl.Trainer", epoch: int) -> int:
    """Return the optimizer steps of an epoch, with what schedulers make of the accumulation."""
    factor: int = trainer.accumulate_grad_batches
    for callback in every_callback(trainer):
        if "GradientAccumulationScheduler" in {kind.__name__ for kind in type(callback).__mro__}:
            factor = callback.get_accumulate_grad_batches(epoch)
    return math.ceil(trainer.num_training_batches / factor)


def _unknown(why: str, in_steps: bool) -> MisconfigurationException:
    fix = "max_steps" if in_steps else "max_epochs, or use `period_steps` with max_steps"
    return MisconfigurationException(
        f"`final_trainable` counts from the end of training, which is unknown: {why}. Set the Trainer's {fix}, or "
        "leave `final_trainable` at 0."
    )
