"""Whether low-rank layers pay in this run: look, plan, try, and count what it took.

`decide_by_steps` goes through four stages, each of which may end it with the model dense:

1. *look*: theoretical ranks, on the layers by themselves, then in whole steps; are measured ranks worth their time?
2. *plan*: ranks by measured times of the layers, of those that the model lets go;
3. *try*: whole steps with these ranks; what does not pay is taken back;
4. *count*: do the steps that remain give back what the first three took?

`decide_by_layers` does without whole steps, where none can be tried.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_accel.callbacks.layer_exchange.recorded_inputs import RecordedInputs
from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.callbacks.rank_quantization import reasons
from lightning_accel.callbacks.rank_quantization.fitness import PROBLEMS, Problem, find_unfit
from lightning_accel.callbacks.rank_quantization.reasons import Comparison, MeasuringTooLong, Reason
from lightning_accel.callbacks.rank_quantization.request import RankRequest
from lightning_accel.callbacks.rank_quantization.step_times import PAIRS, StepTimes, TrialError
from lightning_accel.callbacks.rank_quantization.verdict import Verdict, dense, ranks_of
from lightning_accel.low_rank import RankPlan, SharedVectors, eligible_layers
from lightning_accel.low_rank.optimizers.kinds import makers_by_layer
from lightning_accel.low_rank.rank_search.gate import apply_decision, verify_plan

_STEPS_OF_TRIALS = 100.0  # dense ones; what both trials take
_GAIN_TO_GO_ON = 80.0  # dense steps to be saved: twice what the rest of both trials takes
_SHARE_FOR_MEASURING = 0.5  # of what is saved by theoretical ranks, for finding better ones
STEPS_TO_TRY = 2 * (PAIRS + 2) + 2  # dense ones; two phases of low-rank layers take about as long as one of those


def too_short(remaining: float, *, keep: bool, max_overhead: float) -> Reason | None:
    """Return why nothing should even be tried, before anything is copied; None if there is time for it."""
    if keep or max_overhead * remaining >= STEPS_TO_TRY:
        return None
    return reasons.TooShort(remaining, STEPS_TO_TRY, max_overhead)


@dataclass(frozen=True)
class Terms:
    """On which terms a run decides; all processes alike.

    Args:
        trainer: Of the run.
        request: Which ranks are asked for.
        remaining: Training batches that can be counted on.
        keep: Choose low rank although it does not pay.
        max_overhead: Share of the remaining time that measuring may take without a proven gain.
        started: When deciding began, by ``time.perf_counter``.
        shared: What planning finds out for the decomposition.
    """

    trainer: "pl.Trainer"
    request: RankRequest
    remaining: float
    keep: bool
    max_overhead: float
    started: float = field(default_factory=time.perf_counter)
    shared: SharedVectors = field(default_factory=SharedVectors)

    def seconds(self) -> float:
        """Return how long deciding has taken so far."""
        return self.agree(time.perf_counter() - self.started)

    def agree(self, value: Any) -> Any:
        """Return rank 0's value on all processes."""
        return self.trainer.strategy.broadcast(value)

    def in_context(self, inputs: RecordedInputs, *, backward: bool = False) -> Callable[[nn.Module], None]:
        """Return what runs a module's layers on recorded inputs, in the run's precision."""

        def run_batch(module: nn.Module) -> None:
            with self.trainer.precision_plugin.train_step_context():
                inputs.replay(module, backward=backward)

        return run_batch

    def nothing_to_factor(self, module: nn.Module) -> Reason | None:
        """Return why no layer is left that could be low rank; None if one is."""
        layers, skipped = eligible_layers(module, include=self.request.include, exclude=self.request.exclude)
        if layers:
            return None
        found = "; ".join(f"`{name}`: {why}" for name, why in skipped.items())
        return reasons.NothingToFactor(found or "no layer that is asked for and free")

    def plan(self, module: nn.Module, run_batch: Callable[[nn.Module], object], *, measured: bool = True) -> RankPlan:
        """Make the plan on rank 0 and hand it to all.

        Raises:
            TrialError: If a layer can not be run by itself.
            ValueError: If a plan can not be made, see `make_plan`.
        """
        result: str | ValueError | TrialError = ""
        make = self.request.plan if measured else self.request.unmeasured_plan
        if self.trainer.is_global_zero:
            try:
                layers, _ = eligible_layers(self.trainer.lightning_module)
                makers = makers_by_layer(layers, self.trainer.optimizers)
                result = make(module, run_batch, makers, self.shared).to_json()
            except ValueError as problem:  # the other processes must hear of it, they wait for a plan
                result = problem
            except Exception as problem:  # layers of others' classes run here, out of their model
                result = TrialError(repr(problem))
        result = self.agree(result)
        if isinstance(result, Exception):
            raise result
        return RankPlan.from_json(result)

    def count(self, plan: RankPlan, reason: Reason, saved_a_step: float, measured: Comparison | None = None) -> Verdict:
        """Keep a plan if the steps that remain give back what deciding took."""
        seconds, saved = self.seconds(), self.remaining * saved_a_step
        kept = self.keep or saved > seconds
        why = reasons.SetUp(reason, seconds, self.remaining, saved, kept)
        return Verdict(plan if kept else plan.dense(set(ranks_of(plan)), str(why)), why, measured)


def decide_by_layers(
    terms: Terms, module: nn.Module, inputs: RecordedInputs, step_seconds: float, because: Reason
) -> Verdict:
    """Decide by the times of single layers, where whole steps can not be tried.

    Args:
        terms: Of the run.
        module: Of the run itself; only read.
        inputs: What its layers got in a step.
        step_seconds: What that step took.
        because: Why no step can be tried.
    """
    try:
        return _decide_by_layers(terms, module, inputs, step_seconds, because)
    except TrialError as problem:
        return dense(reasons.trial_failed(problem.__cause__ or problem))


def _decide_by_layers(
    terms: Terms, module: nn.Module, inputs: RecordedInputs, step_seconds: float, because: Reason
) -> Verdict:
    if nothing := terms.nothing_to_factor(module):
        return dense(nothing)
    step_seconds = terms.agree(step_seconds)
    planning = terms.request.planning_seconds(module, step_seconds)
    if not terms.keep and planning > terms.max_overhead * terms.remaining * step_seconds:
        return dense(MeasuringTooLong(planning, terms.remaining))
    plan = terms.plan(module, terms.in_context(inputs))
    if not ranks_of(plan):
        return Verdict(plan, reasons.NO_LAYER_GAINS_ALONE)
    timed = [layer for layer in plan.layers if layer.ranks is not None]
    saved = sum((layer.dense_ms or 0.0) - (layer.low_rank_ms or 0.0) for layer in timed) / 1000.0
    return terms.count(plan, reasons.JudgedByLayers(saved, because), saved)


def decide_by_steps(terms: Terms, trial: StepTrial, inputs: RecordedInputs) -> Verdict:
    """Decide by whole steps on copies: look, plan, try, count.

    Args:
        terms: Of the run.
        trial: Makes the steps.
        inputs: What the layers got in a step.

    Raises:
        ValueError: If a plan can not be made, see `make_plan`.
    """
    try:
        return _ByWholeSteps(terms, trial, inputs).decide()
    except torch.OutOfMemoryError:
        return dense(reasons.NO_MEMORY)
    except TrialError as problem:
        return dense(reasons.trial_failed(problem.__cause__ or problem))


@dataclass(frozen=True)
class _ByWholeSteps:
    terms: Terms
    trial: StepTrial
    inputs: RecordedInputs

    @property
    def times(self) -> StepTimes:
        return StepTimes(self.terms.trainer, self.trial, self.terms.request.phase_weights)

    def decide(self) -> Verdict:
        if nothing := self.terms.nothing_to_factor(self.trial.module):
            return dense(nothing)
        unpaid: MeasuringTooLong | None = None
        if not self.terms.keep:
            try:
                found = self._look()
            except TrialError:  # the model's own code may not do with other layers; which?
                if unfit := self._unfit(PROBLEMS[0]):
                    return self._without(unfit)
                raise
            if isinstance(found, Verdict):
                return found
            unpaid = found
        for problem in PROBLEMS:
            if unfit := self._unfit(problem):
                return self._without(unfit)
        self.trial.take_parameters(self.terms.trainer.lightning_module)  # the weights that would be decomposed
        run_batch = self.terms.in_context(self.inputs)
        if unpaid is not None:
            return self._try_theoretical(self.terms.plan(self.trial.module, run_batch, measured=False), unpaid)
        return self._try(self.terms.plan(self.trial.module, run_batch))

    def _look(self) -> Verdict | MeasuringTooLong | None:
        """Try theoretical ranks; return a verdict if that decides, or why ranks are not worth measuring, or None."""
        terms = self.terms
        if hopeless := self._look_at_layers():
            return dense(hopeless)
        if terms.request.unmeasured:
            return None  # the trial of the plan is that of the same ranks
        step = self.times.dense_seconds()
        planning = terms.request.planning_seconds(self.trial.module, step)
        if (ratio := terms.request.ratio) is not None:
            # Where not even steps that gained as much as their entries could pay for it, the first trial is that of the
            # final ranks.
            most = max(terms.max_overhead, _SHARE_FOR_MEASURING * (1.0 - 1.0 / ratio))
            if planning > terms.remaining * most * step:
                return MeasuringTooLong(planning, terms.remaining)
        quick = self.times.compare(terms.request.unmeasured_ranks(self.trial.module), go_on=self._promising)
        gained = _SHARE_FOR_MEASURING * quick.saved if quick.faster else 0.0
        allowed = terms.remaining * max(terms.max_overhead * quick.dense, gained)
        if terms.seconds() + planning <= allowed:
            return None
        unpaid = MeasuringTooLong(planning, terms.remaining, quick)
        return unpaid if quick.faster and terms.request.ratio is not None else dense(unpaid, quick)

    def _look_at_layers(self) -> Reason | None:
        """Return the times of single layers where they hardly gain by theoretical ranks: a whole step then gains less.

        It takes a few steps' time instead of the dozens of a trial, which a short run would not get back.
        """
        remaining = self.terms.remaining
        if self.terms.max_overhead * remaining >= _STEPS_OF_TRIALS:
            return None
        ranks = self.terms.request.unmeasured_ranks(self.trial.module)
        before, after = self.times.layers_alone(ranks, self.terms.in_context(self.inputs, backward=True))
        if remaining * max(1.0 - after / before, 0.0) >= _GAIN_TO_GO_ON:
            return None
        return reasons.LayersGainTooLittle(after, before, remaining)

    def _promising(self, seconds: Mapping[str, Sequence[float]]) -> bool:
        """Say whether what a few pairs show is worth more pairs, and the second trial that a gain is followed by."""
        return self.terms.remaining * max(_share_saved(seconds), 0.0) >= _GAIN_TO_GO_ON

    def _try_theoretical(self, plan: RankPlan, unpaid: MeasuringTooLong) -> Verdict:
        """Take theoretical ranks if whole steps are faster with them."""
        explain = functools.partial(reasons.TheoreticalRanks, unpaid, self.terms.request.lost_to_the_floor(plan))
        ranks = ranks_of(plan)
        if not ranks:
            return Verdict(plan, explain(None))
        tried = self.times.compare(ranks, go_on=lambda seconds: _share_saved(seconds) > 0.0)
        if not tried.faster:
            return Verdict(plan.dense(set(ranks), str(tried)), reasons.DoesNotPay(explain(tried)), tried)
        return self.terms.count(plan, explain(tried), tried.saved, tried)

    def _try(self, plan: RankPlan) -> Verdict:
        """Try whole steps with measured ranks; take back what does not pay."""
        ranks = ranks_of(plan)
        if not ranks:
            return Verdict(plan, reasons.NoLayerGains(self.terms.request.lost_to_the_floor(plan)))
        tried = self.times.compare(ranks)
        if not self.terms.keep and not tried.faster:
            decision = verify_plan(plan, functools.partial(self.times.variants, ranks))
            plan = apply_decision(plan, decision)
            if not decision.pays or not ranks_of(plan):
                return Verdict(plan, reasons.DoesNotPay(tried, decision.reason), tried)
            tried = self.times.compare(ranks_of(plan))
            if not tried.faster:
                return Verdict(plan.dense(set(ranks), str(tried)), reasons.DoesNotPay(tried), tried)
        return self.terms.count(plan, tried, tried.saved, tried)

    def _unfit(self, problem: Problem) -> set[str]:
        request = self.terms.request
        layers, _ = eligible_layers(self.trial.module, include=request.include, exclude=request.exclude)
        return find_unfit(self.terms.trainer, self.trial, layers, problem)

    def _without(self, unfit: set[str]) -> Verdict:
        """Decide about the other layers."""
        request = self.terms.request.without(unfit)
        if not eligible_layers(self.trial.module, include=request.include, exclude=request.exclude)[0]:
            return dense(reasons.ALL_UNFIT)
        return dataclasses.replace(self, terms=dataclasses.replace(self.terms, request=request)).decide()


def _share_saved(seconds: Mapping[str, Sequence[float]]) -> float:
    return 1.0 - statistics.median(seconds["low rank"]) / statistics.median(seconds["dense"])
