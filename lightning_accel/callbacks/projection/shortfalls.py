"""What a fit did not reach of what was asked for: one warning, with the numbers."""

import logging

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_accel.callbacks.projection.timing import Timing
from lightning_accel.lightning_private import callbacks_of
from lightning_accel.projection.sharded import gather
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector

_log = logging.getLogger("lightning_accel.callbacks.projection")


class Shortfalls:
    """Compares what a fit can reach, and has reached, with what was asked for.

    Args:
        callback: Name of the callback's class, for messages.
        timing: When it projects.
        ball: Onto what.
    """

    def __init__(self, callback: str, timing: Timing, ball: Ball) -> None:
        self.callback, self.timing, self.ball = callback, timing, ball
        self.forget()

    def forget(self) -> None:
        """Begin a run."""
        self._said = False
        self._parts: dict[
            str, float
        ] = {}  # of the way to the full projection, by the checkpoint that was written there

    def look_ahead(self, trainer: "pl.Trainer") -> None:
        """Say what the fit that begins is too short for."""
        complaint = self.timing.complaint(trainer)
        if complaint is not None:
            self._say(trainer, complaint)

    def note_checkpoint(self, trainer: "pl.Trainer", part: float) -> None:
        """Note how far the projection is in the checkpoint that is being written."""
        for callback in callbacks_of(trainer):
            if isinstance(callback, ModelCheckpoint):
                if callback.best_model_path:
                    self._parts.setdefault(callback.best_model_path, part)
                if callback.last_model_path:
                    self._parts[callback.last_model_path] = part

    def look_back(
        self, trainer: "pl.Trainer", projector: Projector, position: int, *, masked: bool, late: bool
    ) -> None:
        """Say what the fit that has ended did not reach.

        Args:
            trainer: Of the fit.
            projector: Knows the targets.
            position: The last one on the ramp.
            masked: Whether retraining has begun.
            late: Whether the last projection came after the last checkpoint.
        """
        part = self.timing.ramp.at(position)
        if self._said or not projector.targets:
            return
        if self.timing.mode == "project_then_retrain" and not masked:
            self._say(
                trainer, f"the fit ended before `retrain_epoch`={self.timing.retrain_epoch}: nothing is projected."
            )
        elif self.timing.mode == "project" and part < 1.0:
            self._say(
                trainer,
                f"the fit ended at {part:.0%} of the way to the full projection{self._sparsity(projector)}. Train "
                "longer, or let the projection rise earlier by `end_step`.",
            )
        else:
            self._look_at_sparsity(trainer, projector)
            self._look_at_checkpoints(trainer, late=late)

    def _look_at_sparsity(self, trainer: "pl.Trainer", projector: Projector) -> None:
        asked = self.ball.target_sparsity
        if asked is None:
            return
        counted = {t.name: (_zero_groups(projector, i), t.num_groups) for i, t in enumerate(projector.targets)}
        if self.ball.scope == "global":
            counted = {"all": (sum(z for z, _ in counted.values()), sum(n for _, n in counted.values()))}
        off = {k: (zero, n) for k, (zero, n) in counted.items() if abs(zero - round(asked * n)) > 1}
        if off:
            found = ", ".join(f"{name} {zero} of {n} groups zero" for name, (zero, n) in list(off.items())[:6])
            self._say(
                trainer,
                f"asked for a sparsity of {asked:g}, the fit ended with {found} (groups that a floor of "
                f"min_groups={self.ball.min_groups} keeps, that were frozen, or that training itself left at zero).",
            )

    def _look_at_checkpoints(self, trainer: "pl.Trainer", *, late: bool) -> None:
        if self.timing.mode != "project":
            return
        kept = {
            path
            for callback in callbacks_of(trainer)
            if isinstance(callback, ModelCheckpoint)
            for path in (callback.best_model_path, callback.last_model_path if late else "")
        }
        early = {path: part for path, part in self._parts.items() if part < 1.0 and path in kept}
        if early:
            files = ", ".join(f"{path} ({part:.0%} of the way)" for path, part in early.items())
            hint = "with `at_end=True` only the last one holds projected weights" if self.timing.at_end else "see there"
            self._say(
                trainer,
                f"kept checkpoint written before the projection was full: {files}; {hint}. "
                "`trainer.save_checkpoint` after the fit writes the projected weights.",
            )

    def _sparsity(self, projector: Projector) -> str:
        if self.ball.target_sparsity is None:
            return ""
        zero = sum(_zero_groups(projector, i) for i in range(len(projector.targets)))
        groups = sum(target.num_groups for target in projector.targets)
        return f", with {zero} of {groups} groups zero instead of {round(self.ball.target_sparsity * groups)}"

    def _say(self, trainer: "pl.Trainer", text: str) -> None:
        self._said = True
        if trainer.is_global_zero:
            _log.warning("%s: %s", self.callback, text)


def _zero_groups(projector: Projector, index: int) -> int:
    target = projector.targets[index]
    weight = gather(target.view())
    zero = (weight == 0.0).all(target.rest_dims) if target.rest_dims else weight == 0.0
    return int(zero.sum())
