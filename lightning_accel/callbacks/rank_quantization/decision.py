"""From the first batch of a fit to the verdict: wait until the time has come, then decide by steps or by layers."""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_accel.arguments import check_choice, check_number
from lightning_accel.callbacks.layer_exchange.holders import why_not_exchanged
from lightning_accel.callbacks.layer_exchange.recorded_inputs import RecordedInputs
from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.callbacks.layer_exchange.structure import RestsFactors
from lightning_accel.callbacks.rank_quantization import reasons
from lightning_accel.callbacks.rank_quantization.decide import (
    STEPS_TO_TRY,
    Terms,
    decide_by_layers,
    decide_by_steps,
    too_short,
)
from lightning_accel.callbacks.rank_quantization.fitness import find_unfit_by_hand
from lightning_accel.callbacks.rank_quantization.moment import When, check_when, first_epoch
from lightning_accel.callbacks.rank_quantization.progress import Progress, batch_index
from lightning_accel.callbacks.rank_quantization.reasons import Reason
from lightning_accel.callbacks.rank_quantization.request import RankRequest
from lightning_accel.callbacks.rank_quantization.verdict import Verdict, dense
from lightning_accel.lightning_private import every_callback, pruned_layers
from lightning_accel.low_rank import RankPlan, SharedVectors, eligible_layers


@dataclass
class Decision:
    """Finds the verdict of one fit; the fields without a default are arguments of `RankQuantization`.

    Attributes:
        switch_epoch: Epoch at whose first batch to decide; None before the weights were looked at.
        inputs: What the layers got in the step that was looked at; None before.
        shared: What planning found out for the decomposition; None before.
    """

    request: RankRequest
    given: RankPlan | None
    when: When
    on_loss: Literal["revert", "keep"]
    max_overhead: float
    switch_epoch: int | None = None
    inputs: RecordedInputs | None = None
    shared: SharedVectors | None = None
    _progress: Progress = field(default_factory=Progress, compare=False)
    _untriable: Reason | None = None
    _unfit: set[str] = field(default_factory=set)  # layers with which a step of manual optimization fails
    _watched_from: float | None = None
    _wait_until: float = 0.0  # batches; before, only a new epoch can tell anything new

    def __post_init__(self) -> None:
        check_when(self.when)
        check_choice("on_loss", self.on_loss, ("revert", "keep"))
        check_number("max_overhead", self.max_overhead, at_least=0.0)

    def begin(self) -> None:
        """Forget an earlier fit."""
        self.stop()
        self.forget()
        self.switch_epoch, self._untriable, self._unfit, self._progress = None, None, set(), Progress()
        self._wait_until = 0.0

    def forget(self) -> None:
        """Drop what was only kept for the decomposition."""
        self.inputs, self.shared = None, None

    def at_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> Verdict | None:
        """Return the verdict; None while the time has not come or a step has to be watched first."""
        if self._progress.note_batch(trainer):
            self._wait_until = 0.0
        if self._progress.batches < self._wait_until:
            return None
        index, window = batch_index(trainer), trainer.accumulate_grad_batches
        if self._untriable is not None and (index + 1) % window == 0:
            self._watch(pl_module)
        if self._untriable is not None or index % window:  # gradients of the dense weights are under way
            return None
        if self.switch_epoch is None:
            if self.when == "auto" and self.given is None:  # weights are looked at where there is time for it
                left = self._progress.remaining(trainer)
                if short := self._too_short(left.at_most):
                    return dense(short)
                if self._too_short(left.batches):
                    self._wait()
                    return None
            self.switch_epoch = first_epoch(self.when, self.given, trainer, pl_module)
        if trainer.current_epoch < self.switch_epoch:
            self._wait_until = math.inf
            return None
        if self.given is not None:
            if self.given.weighting != "activation":
                return Verdict(self.given, reasons.AS_PLANNED)
            if why := self._why_not_exchanged(trainer, pl_module):
                return dense(why)
            self._expect(reasons.AS_PLANNED, pl_module, index, window)
            return None
        left = self._progress.remaining(trainer)
        if short := self._too_short(left.at_most):
            return dense(short)
        if self._too_short(left.batches):  # nobody knows yet
            self._wait()
            return None
        if why := self._why_not_exchanged(trainer, pl_module):
            return dense(why)
        with isolate_rng():
            return self._decide(self._terms(trainer, pl_module), pl_module, batch, batch_idx)

    def at_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Verdict | None:
        """Return the verdict if the step that ended was watched for it."""
        if self._watched_from is None or self._untriable is None or self.inputs is None:
            return None
        seconds = time.perf_counter() - self._watched_from
        because, self._untriable = self._untriable, None
        self.stop()
        if self.given is not None:
            return Verdict(self.given, reasons.AS_PLANNED)
        with isolate_rng():
            terms = self._terms(trainer, pl_module)
            terms = dataclasses.replace(terms, request=terms.request.without(self._unfit))
            return decide_by_layers(terms, pl_module, self.inputs, seconds, because)

    def unreached(self) -> Verdict:
        """Return the verdict of a fit that ended before there was one."""
        if self._untriable is not None:
            return dense(self._untriable)
        epoch = self._progress.epoch
        if epoch is None or epoch < (self.switch_epoch or 0):
            return dense(reasons.NeverReached(self.switch_epoch))
        return dense(reasons.LengthUnknown(self._progress.batches, STEPS_TO_TRY, self.max_overhead))

    def unmeasured_plan(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> RankPlan:
        """Return a plan that needs no running step, for strategies that can not switch layers later.

        Raises:
            MisconfigurationException: If there is none.
        """
        unmeasured = self.request.unmeasured and self.on_loss == "keep"
        if isinstance(self.when, int) or (self.given is None and not unmeasured):
            raise MisconfigurationException(
                f"RankQuantization can not switch layers while {type(trainer.strategy).__name__} trains, and measures "
                "nothing before. Pass `plan=` (see `lightning-accel plan`), or method='snapped' with on_loss='keep', "
                "and leave `when` at 'setup'."
            )
        self.shared = SharedVectors()
        return self.given or self.request.plan(pl_module, None, shared=self.shared)

    def stop(self) -> None:
        """Stop watching a step."""
        if self._watched_from is not None and self.inputs is not None:
            self.inputs.__exit__()
        self._watched_from = None

    def _decide(self, terms: Terms, pl_module: "pl.LightningModule", batch: Any, batch_idx: int) -> Verdict | None:
        trainer = terms.trainer
        index, window = batch_index(trainer), trainer.accumulate_grad_batches
        if not pl_module.automatic_optimization:
            asked = terms.request
            layers, _ = eligible_layers(pl_module, include=asked.include, exclude=asked.exclude)
            self._unfit = find_unfit_by_hand(trainer, pl_module, layers, batch, batch_idx)
            if self._unfit and self._unfit == layers.keys():
                return dense(reasons.ALL_UNFIT)
            self._expect(reasons.MANUAL, pl_module, index, window)
            return None
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            self._expect(reasons.OWN_ITERATOR, pl_module, index, window)
            return None
        try:
            trial = StepTrial(trainer, pl_module, batch, batch_idx)
            inputs = trial.recorded_inputs()
            trial.step()
        except Exception as problem:  # user code may refuse to be copied or called twice, for any reason
            self._expect(reasons.not_copied(problem), pl_module, index, window)
            return None
        self.inputs = inputs
        return decide_by_steps(terms, trial, inputs)

    def _terms(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Terms:
        request = dataclasses.replace(self.request, phase_weights=phase_weights(trainer))
        if pruned := pruned_layers(trainer, pl_module):
            request = request.without(pruned)
        remaining = self._progress.remaining(trainer).batches
        terms = Terms(trainer, request, remaining, self.on_loss == "keep", self.max_overhead)
        self.shared = terms.shared
        return terms

    def _wait(self) -> None:
        """Look again in the next epoch, or when training has gone on for long enough to count on as much again."""
        if not self._progress.by_time:
            self._wait_until = STEPS_TO_TRY / self.max_overhead if self.max_overhead > 0.0 else math.inf

    def _why_not_exchanged(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Reason | None:
        """Say what forbids to exchange any layer, before time is spent on finding out which."""
        layers, _ = eligible_layers(pl_module, include=self.request.include, exclude=self.request.exclude)
        why = why_not_exchanged(trainer, pl_module, list(layers))
        return None if why is None else reasons.NotExchanged(why)

    def _too_short(self, remaining: float) -> Reason | None:
        return too_short(remaining, keep=self.on_loss == "keep", max_overhead=self.max_overhead)

    def _expect(self, why: Reason, pl_module: "pl.LightningModule", index: int, window: int) -> None:
        """Watch a step that ends with an update of the weights: this one, or the one that does."""
        self._untriable = why
        if (index + 1) % window == 0:
            self._watch(pl_module)

    def _watch(self, pl_module: "pl.LightningModule") -> None:
        self.inputs, self._watched_from = RecordedInputs(pl_module), time.perf_counter()
        self.inputs.__enter__()


def phase_weights(trainer: "pl.Trainer") -> tuple[float, float] | None:
    """Return the shares of the phases in which other callbacks let factors rest; None where none do."""
    resting = [callback for callback in every_callback(trainer) if isinstance(callback, RestsFactors)]
    return resting[0].phase_weights() if resting else None
