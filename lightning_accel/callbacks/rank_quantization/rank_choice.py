"""Whether low-rank layers pay in this run: predicted from layer times, verified by whole training steps."""

import dataclasses
import functools
import glob
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_accel.callbacks.layer_exchange.layer_trial import Ranks, failure, other_loss, with_shapes_of
from lightning_accel.callbacks.layer_exchange.recorded_inputs import RecordedInputs
from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.callbacks.rank_quantization.rank_search import RankSearch
from lightning_accel.low_rank import (
    NUM_GROUPS,
    RankPlan,
    apply_decision,
    eligible_layers,
    freeze,
    frozen_parameters,
    low_rank_layers,
    mean_of_phases,
    theoretical_ranks,
    verify_plan,
)
from lightning_accel.measure import PairedRatio, compare_paired, time_interleaved

_log = logging.getLogger(__name__)

Problem = Callable[[StepTrial, Ranks], str | None]
GoOn = Callable[[Mapping[str, Sequence[float]]], bool]

_PAIRS = 8  # few, but enough for the exact test to say "faster" although one pair disagrees
_PEEK = 3  # pairs after which a trial that promises nothing ends
_STEPS_OF_TRIALS = 100.0  # dense ones; what both trials take
_GAIN_TO_GO_ON = 80.0  # dense steps to be saved: twice what the rest of both trials takes
_STEPS_TO_TRY = 2 * (_PAIRS + 2) + 2  # dense ones; two phases of low-rank layers take about as long as one of those


@dataclass(frozen=True)
class Choice:
    """A plan, its low-rank layers maybe none, and the reason with its numbers."""

    plan: RankPlan
    why: str

    @property
    def ranks(self) -> Ranks:
        """Layers that become low rank, with their ranks."""
        return {layer.name: layer.ranks for layer in self.plan.layers if layer.ranks is not None}


@dataclass(frozen=True)
class RankChooser:
    """Decides on all processes alike: rank 0 measures, the others make the same steps and hear the result.

    Args:
        trainer: Of the run.
        search: What to plan.
        remaining: Training batches left, infinite if unknown.
        keep: Choose low rank although it does not pay.
        max_overhead: Share of the remaining time that measuring may take without a proven gain.
    """

    trainer: "pl.Trainer"
    search: RankSearch
    remaining: float
    keep: bool
    max_overhead: float

    def too_short_to_try(self) -> str | None:
        """Say why nothing should even be tried, before anything is copied."""
        if self.keep or self.max_overhead * self.remaining >= _STEPS_TO_TRY:
            return None
        return (
            f"{self.remaining:.0f} steps remain, and finding out whether low rank pays takes {_STEPS_TO_TRY} or more: "
            f"over {self.max_overhead:.0%} of them. Train longer, pass `plan=`, or set on_loss='keep'"
        )

    def choose(self, trial: StepTrial, inputs: RecordedInputs) -> Choice:
        """Choose ranks by layer times, verify them by whole steps, and take back what does not pay."""
        started = time.perf_counter()
        first: Choice | str | None = None
        if not self.keep:
            try:
                first = self._first_look(trial, inputs, started)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the model's own code may not do with other layers; below is asked which
                if unfit := self._unfit(trial, failure):
                    return self._without(unfit, trial, inputs)
                raise
        if isinstance(first, Choice):
            return first
        for problem in (failure, other_loss):
            if unfit := self._unfit(trial, problem):
                return self._without(unfit, trial, inputs)
        run_batch = self._in_context(inputs)
        if first is not None:
            return self._unmeasured(trial, run_batch, started, first)
        return self._verified(Choice(self._plan(trial.module, run_batch), ""), trial, started)

    def _first_look(self, trial: StepTrial, inputs: RecordedInputs, started: float) -> Choice | str | None:
        """Try theoretical ranks; return a choice if that decides, or why ranks are not worth measuring, or None."""
        if hopeless := self._hopeless(trial, inputs):
            return self.dense(hopeless)
        dense = self._dense_seconds(trial)
        planning = self.search.planning_seconds(trial.module, dense)
        unpaid = (
            f"measuring ranks would take about {planning:.1f} s, "
            f"more than {self.remaining:.0f} remaining steps can be expected to give back"
        )
        if self.search.ratio is not None and planning > self.remaining * max(self.max_overhead, 0.5) * dense:
            # Not even steps that took no time at all could pay for it: the first trial is that of the final ranks.
            return unpaid
        quick = self._compare(trial, self.search.unmeasured_ranks(trial.module), go_on=self._promising)
        allowed = self.remaining * max(self.max_overhead * quick.dense, 0.5 * quick.saved if quick.faster else 0.0)
        if self._agree(time.perf_counter() - started) + planning <= allowed:
            return None
        why = f"with unmeasured ranks {quick}; {unpaid}"
        return why if quick.faster and self.search.ratio is not None else self.dense(why)

    def _hopeless(self, trial: StepTrial, inputs: RecordedInputs) -> str:
        """Say so where single layers hardly gain by theoretical ranks: a whole step then gains less; else nothing.

        It takes a few steps' time instead of the dozens of a trial, which a short run would not get back.
        """
        if self.max_overhead * self.remaining >= _STEPS_OF_TRIALS:
            return ""
        run = self._in_context(inputs, backward=True)
        ranks = self.search.unmeasured_ranks(trial.module)
        changed = trial.changed(functools.partial(with_shapes_of, ranks)).module
        calls: dict[str, Callable[[], object]] = {"dense": functools.partial(run, trial.module)}
        for name, rest in self._phases("low rank", changed).items():
            calls[name] = functools.partial(_resting, rest, functools.partial(run, changed))
        device = self.trainer.strategy.root_device
        found: Mapping[str, Sequence[float]] = self._agree(time_interleaved(calls, rounds=_PEEK, device=device))
        trial.module.zero_grad()
        dense, low_rank = min(found["dense"]), min(self._over_phases("low rank", found))
        if self.remaining * max(1.0 - low_rank / dense, 0.0) >= _GAIN_TO_GO_ON:
            return ""
        return (
            f"its layers alone take {1e3 * low_rank:.2f} ms with theoretical ranks and {1e3 * dense:.2f} ms dense, too "
            f"little gain for {self.remaining:.0f} steps to try whole ones"
        )

    def _phases(self, name: str, module: nn.Module) -> Mapping[str, Callable[[], object]]:
        """Return what brings each phase of sequential freezing about, by the name of its times."""
        if self.search.phase_weights is None or not low_rank_layers(module):
            return {name: lambda: None}
        mine = frozen_parameters(module)
        return {
            f"{name}/{group}": functools.partial(freeze, module, group, user_frozen=mine) for group in range(NUM_GROUPS)
        }

    def _promising(self, seconds: Mapping[str, Sequence[float]]) -> bool:
        """Say whether what a few pairs show is worth more pairs, and the second trial that a gain is followed by."""
        dense = statistics.median(seconds["dense"])
        share = 1.0 - statistics.median(seconds["low rank"]) / dense
        return self.remaining * max(share, 0.0) >= _GAIN_TO_GO_ON

    def _unmeasured(self, trial: StepTrial, run_batch: Callable[[Any], object], started: float, unpaid: str) -> Choice:
        """Take theoretical ranks if whole steps are faster with them."""
        plan = self._plan(trial.module, run_batch, unmeasured=True)
        choice = Choice(plan, "")
        why = f"{unpaid}, so theoretical ranks are taken{self.search.lost_to_the_floor(plan)}; "
        if not choice.ranks:
            return Choice(plan, f"{why}no layer is left to be low rank")
        tried = self._compare(trial, choice.ranks)
        if not tried.faster:
            return Choice(plan.dense(set(choice.ranks), str(tried)), f"low rank does not pay: {why}{tried}")
        setup = self._agree(time.perf_counter() - started)
        return self._paid_back(Choice(plan, f"{why}{tried}"), setup, self.remaining * tried.saved)

    def _dense_seconds(self, trial: StepTrial) -> float:
        """Return the median seconds of a dense step."""
        copy = trial.changed(functools.partial(with_shapes_of, {}))
        device = self.trainer.strategy.root_device
        seconds: Mapping[str, Sequence[float]] = self._agree(
            time_interleaved({"dense": copy.step}, rounds=2, warmup=1, device=device)
        )
        return statistics.median(seconds["dense"])

    def _verified(self, choice: Choice, trial: StepTrial, started: float) -> Choice:
        """Try whole steps of a plan; take back what does not pay."""
        plan = choice.plan
        if not choice.ranks:
            return Choice(plan, f"no layer gains by low rank{self.search.lost_to_the_floor(plan)}")
        verified = self._compare(trial, choice.ranks)
        if not self.keep and not verified.faster:
            decision = verify_plan(plan, functools.partial(self._time_variants, trial, choice.ranks))
            plan = apply_decision(plan, decision)
            if not decision.pays or not Choice(plan, "").ranks:
                return Choice(plan, f"low rank does not pay: {verified}; {decision.reason}")
            verified = self._compare(trial, Choice(plan, "").ranks)
            if not verified.faster:
                return Choice(plan.dense(set(choice.ranks), str(verified)), f"low rank does not pay: {verified}")
        setup = self._agree(time.perf_counter() - started)
        return self._paid_back(Choice(plan, str(verified)), setup, self.remaining * verified.saved)

    def choose_by_layers(self, module: nn.Module, inputs: RecordedInputs, step_seconds: float, why: str) -> Choice:
        """Choose by the times of single layers, where whole steps can not be tried."""
        started = time.perf_counter()
        step_seconds = self._agree(step_seconds)
        planning = self.search.planning_seconds(module, step_seconds)
        if not self.keep and planning > self.max_overhead * self.remaining * step_seconds:
            return self.dense(f"measuring ranks would take about {planning:.1f} s, {self.remaining:.0f} steps remain")
        plan = self._plan(module, self._in_context(inputs))
        timed = [layer for layer in plan.layers if layer.ranks is not None]
        saved = sum((layer.dense_ms or 0.0) - (layer.low_rank_ms or 0.0) for layer in timed) / 1000.0
        choice = Choice(plan, f"judged by single layers, {1000.0 * saved:.2f} ms a step, because {why}")
        if not choice.ranks:
            return Choice(plan, "no layer gains by low rank, by its own time")
        return self._paid_back(choice, self._agree(time.perf_counter() - started), self.remaining * saved)

    def dense(self, why: str) -> Choice:
        """Leave the model as it is, without a plan."""
        return Choice(no_plan(), why)

    def _unfit(self, trial: StepTrial, problem: Problem) -> dict[str, str]:
        """Return the layers that the model does not let go, and how that shows.

        Some models ask for a layer's type or read its weight, and go another way if it is not the one they made: the
        step fails, or silently computes something else.
        """
        layers, _ = eligible_layers(trial.module, include=self.search.include, exclude=self.search.exclude)
        ranks = {name: theoretical_ranks(tuple(layer.weight.shape), 2.0) for name, layer in layers.items()}
        together: str | None = self._agree(problem(trial, ranks) if ranks else None)
        if together is None:
            return {}
        alone = {name: problem(trial, {name: ranks[name]}) for name in ranks}
        found = {name: why for name, why in alone.items() if why is not None}
        return self._agree(found or dict.fromkeys(ranks, together))

    def _without(self, unfit: Mapping[str, str], trial: StepTrial, inputs: RecordedInputs) -> Choice:
        """Choose among the other layers."""
        if self.trainer.is_global_zero:
            for name, why in unfit.items():
                _log.warning("%s stays dense, because the training step %s", name, why)
        search = dataclasses.replace(self.search, exclude=(*self.search.exclude, *map(glob.escape, unfit)))
        if not eligible_layers(trial.module, include=search.include, exclude=search.exclude)[0]:
            return self.dense("the training step fails, or has another loss, with any of its layers low rank")
        return dataclasses.replace(self, search=search).choose(trial, inputs)

    def _paid_back(self, choice: Choice, setup: float, saved: float) -> Choice:
        why = f"{choice.why}; set-up took {setup:.2f} s, the {self.remaining:.0f} remaining steps save {saved:.2f} s"
        if self.keep or saved > setup:
            return Choice(choice.plan, why)
        return Choice(choice.plan.dense(set(choice.ranks), why), f"low rank does not pay back its set-up: {why}")

    def _plan(self, module: nn.Module, run_batch: Callable[[Any], object], *, unmeasured: bool = False) -> RankPlan:
        result: str | ValueError = ""
        make = self.search.unmeasured_plan if unmeasured else self.search.plan
        if self.trainer.is_global_zero:
            try:
                result = make(module, run_batch).to_json()
            except ValueError as problem:  # the other processes must hear of it, they wait for a plan
                result = problem
        result = self._agree(result)
        if isinstance(result, ValueError):
            raise result
        return RankPlan.from_json(result)

    def _compare(self, trial: StepTrial, ranks: Ranks, go_on: GoOn | None = None) -> "Comparison":
        variants = {"dense": frozenset[str](), "low rank": frozenset(ranks)}
        seconds = self._time_variants(trial, ranks, variants, go_on)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        return Comparison(medians["dense"], medians["low rank"], compare_paired(seconds["dense"], seconds["low rank"]))

    def _time_variants(
        self, trial: StepTrial, ranks: Ranks, variants: Mapping[str, frozenset[str]], go_on: GoOn | None = None
    ) -> Mapping[str, Sequence[float]]:
        steps: dict[str, Callable[[], object]] = {}
        for name, layers in variants.items():
            chosen = {layer: ranks[layer] for layer in ranks if layer in layers}
            changed = trial.changed(functools.partial(with_shapes_of, chosen))
            for phase, rest in self._phases(name, changed.module).items():
                steps[phase] = functools.partial(_resting, rest, changed.step)
        device = self.trainer.strategy.root_device

        def time_rounds(rounds: int, warmup: int) -> dict[str, list[float]]:
            found = time_interleaved(steps, rounds=rounds, warmup=warmup, device=device)
            seconds: Mapping[str, Sequence[float]] = self._agree(found)
            return {name: [*self._over_phases(name, seconds)] for name in variants}

        if go_on is None:
            return time_rounds(_PAIRS, 2)
        found = time_rounds(_PEEK, 1)
        if go_on(found):
            more = time_rounds(_PAIRS - _PEEK, 0)
            found = {name: [*found[name], *more[name]] for name in variants}
        return found

    def _over_phases(self, name: str, seconds: Mapping[str, Sequence[float]]) -> Sequence[float]:
        if name in seconds or self.search.phase_weights is None:
            return seconds[name]
        return mean_of_phases([seconds[f"{name}/{group}"] for group in range(NUM_GROUPS)], self.search.phase_weights)

    def _in_context(self, inputs: RecordedInputs, *, backward: bool = False) -> Callable[[Any], object]:
        def run_batch(module: nn.Module) -> None:
            with self.trainer.precision_plugin.train_step_context():
                inputs.replay(module, backward=backward)

        return run_batch

    def _agree(self, value: Any) -> Any:
        return self.trainer.strategy.broadcast(value)


@dataclass(frozen=True)
class Comparison:
    """Median seconds of a whole step, dense and low rank, and their paired ratio."""

    dense: float
    low_rank: float
    ratio: PairedRatio

    @property
    def saved(self) -> float:
        """Seconds a step, by the medians."""
        return self.dense - self.low_rank

    @property
    def faster(self) -> bool:
        """Whether low rank is faster beyond the noise."""
        return self.ratio.verdict == "faster"

    def __str__(self) -> str:
        """Return the numbers for a log line."""
        interval = f"x{self.ratio.median:.2f} [{self.ratio.low:.2f}, {self.ratio.high:.2f}]"
        return f"a whole step takes {1e3 * self.low_rank:.2f} ms instead of {1e3 * self.dense:.2f} ms, {interval}"


def _resting(rest: Callable[[], object], step: Callable[[], object]) -> None:
    rest()
    step()


def remaining_batches(trainer: "pl.Trainer", batch_idx: int) -> float:
    """Return how many training batches are still to come, this one included; infinite if nothing limits them."""
    epochs = float("inf") if trainer.max_epochs in (None, -1) else trainer.max_epochs - trainer.current_epoch
    by_epochs = epochs * trainer.num_training_batches - batch_idx
    if trainer.max_steps == -1:
        return by_epochs
    return min(by_epochs, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)


def no_plan() -> RankPlan:
    """Return the plan of a model that was not looked at."""
    return RankPlan(layers=(), method="fixed", target="ratio", value=1.0)
