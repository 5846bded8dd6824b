"""When and by which evidence rank quantization decides."""

import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_accel.arguments import check_choice, check_number
from lightning_accel.callbacks.layer_exchange.recorded_inputs import RecordedInputs
from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.callbacks.layer_exchange.structure import RestsFactors
from lightning_accel.callbacks.rank_quantization.rank_choice import Choice, RankChooser, remaining_batches
from lightning_accel.callbacks.rank_quantization.rank_search import RankSearch
from lightning_accel.lightning_private import callbacks_of
from lightning_accel.low_rank import RankPlan
from lightning_accel.low_rank.rank_plan.plan import UNMEASURED
from lightning_accel.low_rank.spectrum import looks_untrained

_log = logging.getLogger(__name__)

When = int | Literal["auto", "setup"]


@dataclass
class Decision:
    """Finds the plan of one run; the fields are arguments of `RankQuantization`.

    Attributes:
        inputs: What the layers got in the step that was looked at; None before.
    """

    search: RankSearch
    given: RankPlan | None
    when: When
    on_loss: Literal["revert", "keep"]
    max_overhead: float
    inputs: RecordedInputs | None = None
    _untriable: str = ""
    _watching: bool = False
    _seconds: float = 0.0

    def __post_init__(self) -> None:
        words = self.when in ("auto", "setup")
        if not words and (isinstance(self.when, bool) or not isinstance(self.when, int) or self.when < 0):
            raise ValueError(f"`when` must be 'auto', 'setup' or an epoch >= 0, got {self.when!r}.")
        check_choice("on_loss", self.on_loss, ("revert", "keep"))
        check_number("max_overhead", self.max_overhead, at_least=0.0)

    def first_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> int:
        """Return the epoch at whose first batch to decide; warn where untrained weights are to be decomposed."""
        if isinstance(self.when, int):
            return self.when
        untrained = looks_untrained(pl_module)
        if self.when == "setup" or self.given is not None:
            if untrained and (self.given is None or Choice(self.given, "").ranks):
                rank_zero_warn(
                    "RankQuantization decomposes weights that look untrained: most of what they could learn is cut "
                    "off. Load trained weights first, or set `when` to the epochs of a dense warm-up."
                )
            return 0
        first = max(1, round(0.1 * (trainer.max_epochs or 1))) if untrained else 0
        if untrained and trainer.is_global_zero:
            _log.info("the weights look untrained: dense warm-up until epoch %s.", first)
        return first

    def too_short(self, trainer: "pl.Trainer", index: int) -> Choice | None:
        """Return the choice to stay dense where too few steps remain already, so that no weight need be looked at."""
        if self.when != "auto" or self.given is not None:
            return None
        chooser = self._chooser(trainer, index)
        why = chooser.too_short_to_try()
        return None if why is None else chooser.dense(why)

    def unmeasured_plan(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> RankPlan:
        """Return a plan that needs no running step, for strategies that can not switch layers later.

        Raises:
            MisconfigurationException: If there is none.
        """
        unmeasured = self.search.method in UNMEASURED and self.on_loss == "keep"
        if isinstance(self.when, int) or (self.given is None and not unmeasured):
            raise MisconfigurationException(
                f"RankQuantization can not switch layers while {type(trainer.strategy).__name__} trains, and measures "
                "nothing before. Pass `plan=` (see `lightning-accel plan`), or method='snapped' with on_loss='keep', "
                "and leave `when` at 'setup'."
            )
        return self.given or self.search.plan(pl_module, None)

    def choose(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, index: int) -> Choice | None:
        """Return the choice, or None if one more step has to be watched first."""
        if self.given is not None:
            if self.given.weighting == "activation" and self.inputs is None:
                self._watch(pl_module, "")
                return None
            return Choice(self.given, "as the given plan says")
        chooser = self._chooser(trainer, index)
        if self.inputs is not None:
            return chooser.choose_by_layers(pl_module, self.inputs, self._seconds, self._untriable)
        if (why := chooser.too_short_to_try()) is not None:
            return chooser.dense(why)
        if not pl_module.automatic_optimization:
            self._watch(pl_module, "steps of manual optimization can not be tried")
            return None
        try:
            trial = StepTrial(trainer, pl_module, batch, index)
            inputs = trial.recorded_inputs()
            trial.step()
        except Exception as problem:  # user code may refuse to be copied or called twice, for any reason
            self._watch(pl_module, f"a copy of the module can not make its training step ({problem!r})")
            return None
        self.inputs = inputs
        try:
            return chooser.choose(trial, inputs)
        except torch.OutOfMemoryError:
            return chooser.dense(
                "memory does not suffice for a second copy of module and optimizers. Make a plan beforehand "
                "(`lightning-accel plan`) and pass `plan=`, or try with a smaller batch"
            )

    def step_ended(self) -> None:
        """Stop watching."""
        if self.inputs is not None and self._watching:
            self.inputs.__exit__()
            self._watching = False
            self._seconds = time.perf_counter() - self._seconds

    def _chooser(self, trainer: "pl.Trainer", index: int) -> RankChooser:
        search = dataclasses.replace(self.search, phase_weights=phase_weights(trainer))
        remaining = remaining_batches(trainer, index)
        return RankChooser(trainer, search, remaining, self.on_loss == "keep", self.max_overhead)

    def _watch(self, pl_module: "pl.LightningModule", why: str) -> None:
        self._untriable = why
        self.inputs, self._watching, self._seconds = RecordedInputs(pl_module), True, time.perf_counter()
        self.inputs.__enter__()


def phase_weights(trainer: "pl.Trainer") -> tuple[float, float] | None:
    """Return the shares of the phases in which other callbacks let factors rest; None where none do."""
    resting = [callback for callback in callbacks_of(trainer) if isinstance(callback, RestsFactors)]
    return resting[0].phase_weights() if resting else None
