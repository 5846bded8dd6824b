"""When a projection callback acts, and what of that a fit is too short for."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from lightning_accel.lightning_private import callbacks_of
from lightning_accel.projection.training.ramp import Curve, Ramp

Mode = Literal["project", "project_then_retrain"]

_WHOLE_FIT = 10_000  # positions of a ramp over the whole fit, whatever its length
_LEARN_FIRST, _RECOVER_FROM = 0.1, 0.6  # parts of the fit: before, nothing is projected; after, nothing more is cleared
_UNKNOWN = 100, 1_000  # optimizer steps of such a ramp where the length of the fit is not known


@dataclass(frozen=True)
class Timing:
    """When to project; see `MultilevelProjection`.

    Attributes:
        every_n_steps: See there, as all but the last two.
        every_n_epochs: See there.
        at_end: See there.
        mode: See there.
        retrain_epoch: See there.
        rewind: See there.
        ramp: How much at which position: an optimizer step, or a ten-thousandth of the fit.
        over_fit: Whether positions are parts of the fit.

    Raises:
        ValueError: If a value is out of range, or values exclude each other.
    """

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    at_end: bool = False
    mode: Mode = "project"
    retrain_epoch: int | None = None
    rewind: str = "none"
    ramp: Ramp = field(default_factory=Ramp)
    over_fit: bool = False

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "every_n_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        given = [bool(self.every_n_steps), bool(self.every_n_epochs), self.at_end]
        if sum(given) > 1:
            raise ValueError("give at most one of `every_n_steps`, `every_n_epochs` and `at_end`.")
        if self.mode not in get_args(Mode):
            raise ValueError(f"`mode` must be of {get_args(Mode)}, got {self.mode!r}.")
        retrains = self.mode == "project_then_retrain"
        if retrains and (any(given) or self.ramp != Ramp()):
            raise ValueError(
                "mode 'project_then_retrain' projects once, at `retrain_epoch`; give no other time or schedule."
            )
        if retrains != (self.retrain_epoch is not None):
            raise ValueError("`retrain_epoch` must be given for mode 'project_then_retrain', and only for it.")
        if self.retrain_epoch is not None and self.retrain_epoch < 0:
            raise ValueError(f"`retrain_epoch` must be >= 0, got {self.retrain_epoch}.")
        if not retrains and self.rewind != "none":
            raise ValueError("`rewind` needs mode 'project_then_retrain'.")

    @functools.cached_property
    def period(self) -> int:
        """Optimizer steps from one projection to the next; 0: none follows a step."""
        if self.mode != "project" or self.at_end or self.every_n_epochs is not None:
            return 0
        return self.every_n_steps or 1

    def position(self, trainer: "pl.Trainer", step: int) -> int:
        """Return where on the ramp the optimizer step is that is being taken, ``step`` of this optimizer (from 1)."""
        if not self.over_fit:
            return step
        part = part_of_fit(trainer)
        if part is None:
            first, last = _UNKNOWN
            part = _LEARN_FIRST + (_RECOVER_FROM - _LEARN_FIRST) * (step - first) / (last - first)
        return round(_WHOLE_FIT * min(max(part, 0.0), 1.0))

    def complaint(self, trainer: "pl.Trainer") -> str | None:
        """Say what this fit is too short for, with the numbers; ``None`` where nothing is, or its length is unknown."""
        if self.over_fit and part_of_fit(trainer) is None:
            return (
                f"how long this fit will be is not known beforehand, so the projection rises over optimizer steps "
                f"{_UNKNOWN[0]} to {_UNKNOWN[1]}. Pass `start_step` and `end_step`, or the Trainer `max_steps`."
            )
        steps = trainer.estimated_stepping_batches if trainer.lightning_module.automatic_optimization else math.inf
        steps = math.inf if steps < 0 else steps  # no limit of steps, and data without a length
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
        if math.isfinite(steps) and math.isfinite(trainer.num_training_batches):
            in_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            epochs = min(epochs, math.ceil(steps / max(in_epoch, 1)))
        fit = f"this fit of {steps:g} optimizer steps"
        end, start = self.ramp.end_step, self.ramp.start_step
        if not self.over_fit and start >= steps:
            return f"`start_step`={start} is not before the end of {fit}, so nothing is projected. Lower it."
        if not self.over_fit and end is not None and end > steps:
            return (
                f"`end_step`={end} lies beyond {fit}, which ends at {self.ramp.at(int(steps)):.0%} of the way to the "
                "full projection. Lower it, or train longer."
            )
        if self.retrain_epoch is not None and self.retrain_epoch >= epochs:
            return (
                f"`retrain_epoch`={self.retrain_epoch} never begins in this fit of {epochs:g} epochs (from 0), so "
                "nothing is projected. Lower it."
            )
        if self.every_n_steps is not None and self.every_n_steps > steps:
            return f"`every_n_steps`={self.every_n_steps} is more than {fit}, so it only projects at its end. Lower it."
        if self.every_n_epochs is not None and self.every_n_epochs > epochs:
            return (
                f"`every_n_epochs`={self.every_n_epochs} is more than this fit of {epochs:g} epochs, so it only "
                "projects at its end. Lower it."
            )
        return None


def ramp_of(
    schedule: Curve | None, start_step: int, end_step: int | None, *, sparse: bool, once: bool
) -> tuple[Ramp, bool]:
    """Return the ramp, and whether it goes over the whole fit instead of optimizer steps.

    Args:
        schedule: As a user gives it; by default the whole fit where groups are to be cleared step by step.
        start_step: As a user gives it.
        end_step: As a user gives it.
        sparse: Whether a fraction of groups is to be cleared.
        once: Whether there is only one projection.

    Raises:
        ValueError: As `Ramp`.
    """
    if schedule is None and end_step is None and start_step == 0 and sparse and not once:
        return Ramp("cubic", round(_LEARN_FIRST * _WHOLE_FIT), round(_RECOVER_FROM * _WHOLE_FIT)), True
    if schedule is None:
        schedule = "constant" if end_step is None else "cubic"
    return Ramp(schedule, start_step, end_step), False


def part_of_fit(trainer: "pl.Trainer") -> float | None:
    """Return how much of the fit is over with the optimizer step that is being taken, in [0, 1] or a little above.

    The furthest of steps, batches and time counts; ``None`` where the fit has no end that can be foreseen.
    """
    loop, parts = trainer.fit_loop, list[float]()
    if trainer.max_steps > 0:
        parts.append((trainer.global_step + 1) / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches: Any = trainer.num_training_batches
        if math.isfinite(batches):
            done = trainer.current_epoch * batches + max(loop.batch_idx, 0) + 1
            parts.append(done / max(trainer.max_epochs * batches, 1))
        elif trainer.max_epochs > 1:  # an epoch of unknown length counts when it is over
            parts.append(trainer.current_epoch / (trainer.max_epochs - 1))
    if trainer.world_size == 1:  # clocks of several processes differ, and so would their weights
        for timer in (c for c in callbacks_of(trainer) if isinstance(c, Timer)):
            left, spent = timer.time_remaining(), timer.time_elapsed()
            if left is not None:
                parts.append(spent / max(spent + left, 1e-9))
    return max(parts) if parts else None


def ends_now(trainer: "pl.Trainer") -> bool:
    """Say, when a batch, a validation or an epoch ends, whether the fit ends with it as far as can be told."""
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    if trainer.should_stop:
        return trainer.current_epoch + 1 >= (trainer.min_epochs or 0) and trainer.global_step >= (
            trainer.min_steps or 0
        )
    epochs = trainer.max_epochs
    return trainer.is_last_batch and epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
