"""Applying phases of sequential freezing to a module, and taking them back."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import lightning.pytorch as pl
from torch import nn

from lightning_accel.callbacks.layer_exchange.structure import rewrap_ddp
from lightning_accel.low_rank import AdaptiveFreezing, FreezingSchedule, freeze, low_rank_layers
from lightning_accel.low_rank.freezing import factor_parameter_names

_log = logging.getLogger(__name__)

Phase = int | frozenset[str] | None
"""Group that rests, parameters that are settled (adaptive mode), or None where nothing rests."""


@dataclass
class FactorTurns:
    """Which phase a module is in.

    Attributes:
        schedule: Of the phases.
        adaptive: Decides in ``mode="adaptive"``, where the schedule does not.
        frozen: Full names of what was frozen here, never of what the user froze.
        left: Full names of the factors that were left to train.
        applied: The present phase in a tuple; None before the first one.
        total: Epochs (or steps, the schedule's unit) that the run lasts; None if nobody asks.
        began: Whether any phase was applied in this fit.
    """

    schedule: FreezingSchedule
    adaptive: AdaptiveFreezing
    frozen: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    applied: tuple[Phase] | None = None
    total: int | None = None
    began: bool = False

    def begin(self) -> None:
        """Forget an earlier fit, its statistics included."""
        old = self.adaptive
        self.adaptive = AdaptiveFreezing(
            threshold=old.threshold, window_steps=old.window_steps, max_events=old.max_events
        )
        self.frozen, self.left, self.applied, self.total, self.began = set(), set(), None, None, False

    def phase(self, trainer: "pl.Trainer") -> Phase:
        """Return the phase that the run should be in: a pure function of its progress, but for the adaptive mode."""
        if self.schedule.mode == "adaptive":
            return frozenset(self.adaptive.frozen)
        return self.schedule.frozen_group(
            epoch=trainer.current_epoch, step=steps_of(trainer, self.schedule), total=self.total
        )

    def follow(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
        """Bring the module into the phase that the run should be in, and wrap DDP anew if anything changed.

        Returns:
            Whether this is the first phase of the fit.
        """
        phase = self.phase(trainer)
        if self.applied == (phase,) or not low_rank_layers(pl_module):  # none is left where all were written into
            return False
        before = _trainable(pl_module)
        by_user = {name for name, trains in before.items() if not trains} - (self.frozen - self._meant_by_user(before))
        if self.schedule.mode == "adaptive":
            now = set(self.adaptive.apply(pl_module, user_frozen=by_user))
        else:
            now = set(freeze(pl_module, phase if isinstance(phase, int) else None, user_frozen=by_user))
        self.frozen, self.applied = now - by_user, (phase,)
        after = _trainable(pl_module)
        self.left = {name for name in factor_parameter_names(pl_module) if after[name]}
        if before != after:
            rewrap_ddp(trainer)
        if trainer.is_global_zero:
            _log.info(
                "epoch %d, step %d: %s; %d of %d factors are frozen.",
                trainer.current_epoch,
                steps_of(trainer, self.schedule),
                f"group {phase} rests" if isinstance(phase, int) else "no group takes turns",
                len(self.frozen),
                len(factor_parameter_names(pl_module)),
            )
        first, self.began = not self.began, True
        return first

    def thaw(self, module: nn.Module) -> None:
        """Make everything trainable again that was frozen here."""
        ours = self.frozen - self._meant_by_user(_trainable(module))
        for name, parameter in module.named_parameters():
            if name in ours:
                parameter.requires_grad_(True)
        self.frozen, self.left, self.applied = set(), set(), None

    def _meant_by_user(self, now: Mapping[str, bool]) -> set[str]:
        """Return the factors at rest whose layers were frozen meanwhile: nothing of these trains that did before."""
        train = {_layer(name) for name in self.left if now.get(name, True)}
        frozen = {_layer(name) for name in self.left} - train
        return {name for name in self.frozen if _layer(name) in frozen}

    def values(self, module: nn.Module) -> dict[str, float]:
        """Return the phase in numbers, to be logged."""
        phase = self.applied[0] if self.applied is not None else None
        count = sum(parameter.numel() for name, parameter in module.named_parameters() if name in self.frozen)
        return {"group": float(phase) if isinstance(phase, int) else -1.0, "frozen_parameters": float(count)}


def steps_of(trainer: "pl.Trainer", schedule: FreezingSchedule) -> int:
    """Return how many optimizer steps were made; batches, where those do not tell one batch from the next.

    Under manual optimization a batch may make several steps, more than a phase has, and the factors that rest change
    between batches only: the same ones would rest for good. And where a module steps the raw optimizer
    (``optimizers(use_pl_optimizer=False)``), the Trainer counts no step at all.
    """
    steps, batches = trainer.global_step, trainer.fit_loop.total_batch_idx
    if trainer.lightning_module.automatic_optimization or batches <= 0:
        return steps
    return batches if steps == 0 or (schedule.period_steps or 1) * batches < steps else steps


def _layer(factor: str) -> str:
    return factor.rpartition(".")[0]


def _trainable(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}
