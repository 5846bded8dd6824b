"""Whether low-rank layers pay in this run: predicted from layer times, verified by whole training steps."""

import dataclasses
import functools
import glob
import logging
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_accel.callbacks._inputs import RecordedInputs
from lightning_accel.callbacks._layer_trial import Ranks, failure, other_loss, with_shapes_of
from lightning_accel.callbacks._trial import StepTrial
from lightning_accel.low_rank import (
    NUM_GROUPS,
    RankPlan,
    apply_decision,
    eligible_layers,
    freeze,
    frozen_parameters,
    low_rank_layers,
    make_plan,
    mean_of_phases,
    theoretical_ranks,
    verify_plan,
)
from lightning_accel.low_rank.plan import UNMEASURED, Method, Weighting, factor_parameters
from lightning_accel.measure import PairedRatio, compare_paired, time_interleaved

_log = logging.getLogger(__name__)

_UNDER_FLOOR = ("retains less than", "no candidate keeps an energy of")  # reasons given here and by `make_plan`
_PAIRS = 8  # few, but enough for the exact test to say "faster" although one pair disagrees
_STEPS_TO_TRY = 2 * (_PAIRS + 2) + 2  # dense ones; two phases of low-rank layers take about as long as one of those
_STEPS_TO_PLAN = 250.0  # what `make_plan` takes where layers are quick
_SECONDS_A_LAYER = 3.0  # what it takes at most for one kind of layer


@dataclass(frozen=True)
class RankSearch:
    """What is asked of `make_plan`; the fields are explained there."""

    ratio: float | None
    energy: float | None
    speedup: float | None
    method: Method
    min_energy: float
    weighting: Weighting
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    cache_dir: Path | None
    phase_weights: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        # The core judges its own arguments, now and not at the first batch; a layer that is never called costs nothing.
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings |= {"include": ("*",), "exclude": (), "cache_dir": None}
        with torch.random.fork_rng(devices=()):  # a layer draws its weights
            make_plan(nn.Sequential(nn.Linear(2, 2)), lambda _: None, **settings)

    def plan(self, module: nn.Module, run_batch: Callable[[Any], object] | None) -> RankPlan:
        """Make the plan."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return make_plan(module, run_batch, **settings)

    def unmeasured_plan(self, module: nn.Module, run_batch: Callable[[Any], object] | None) -> RankPlan:
        """Make a plan of theoretical ranks on plateaus, for want of time to measure.

        Layers that would keep less than `min_energy` stay dense.
        """
        plan = dataclasses.replace(self, method="snapped").plan(module, run_batch)
        poor = {layer.name for layer in plan.layers if layer.ranks is not None and layer.energy < self.min_energy}
        return plan.dense(poor, f"{_UNDER_FLOOR[0]} {self.min_energy:.0%} of its energy")

    def lost_to_the_floor(self, plan: RankPlan) -> str:
        """Say how many layers `min_energy` kept dense, and what to do; nothing if it kept none."""
        lost = [layer for layer in plan.layers if any(words in layer.reason for words in _UNDER_FLOOR)]
        if not lost:
            return ""
        return (
            f" ({len(lost)} of {len(plan.layers)} layers stay dense because they would retain less than "
            f"min_energy={self.min_energy:g} of their energy: lower it, take a smaller ratio, or warm up for longer)"
        )

    def unmeasured_ranks(self, module: nn.Module) -> Ranks:
        """Return theoretical ranks, for a first look at what could be gained."""
        layers, _ = eligible_layers(module, include=self.include, exclude=self.exclude)
        ranks: dict[str, tuple[int, ...]] = {}
        for name, layer in layers.items():
            shape = tuple(layer.weight.shape)
            candidate = theoretical_ranks(shape, self.ratio or self.speedup or 2.0)
            if factor_parameters(shape, candidate) < layer.weight.numel():
                ranks[name] = candidate
        return ranks

    def planning_seconds(self, module: nn.Module, step_seconds: float) -> float:
        """Estimate, from above, what `plan` will take with nothing cached."""
        if self.method in UNMEASURED:
            return 0.0
        layers, _ = eligible_layers(module, include=self.include, exclude=self.exclude)
        kinds = {(type(layer), tuple(layer.weight.shape)) for layer in layers.values()}
        return min(_STEPS_TO_PLAN * step_seconds, _SECONDS_A_LAYER * len(kinds))


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
        if unfit := self._unfit(trial):
            return self._without(unfit, trial, inputs)
        run_batch = self._in_context(inputs)
        if not self.keep:
            dense = self._dense_seconds(trial)
            planning = self.search.planning_seconds(trial.module, dense)
            unpaid = (
                f"measuring ranks would take about {planning:.1f} s, "
                f"more than {self.remaining:.0f} remaining steps can be expected to give back"
            )
            if self.search.ratio is not None and planning > self.remaining * max(self.max_overhead, 0.5) * dense:
                # Not even steps that took no time at all could pay for it: the first trial is that of the final ranks.
                return self._unmeasured(trial, run_batch, started, unpaid)
            quick = self._compare(trial, self.search.unmeasured_ranks(trial.module))
            allowed = self.remaining * max(self.max_overhead * quick.dense, 0.5 * quick.saved if quick.faster else 0.0)
            if self._agree(time.perf_counter() - started) + planning > allowed:
                why = f"with unmeasured ranks {quick}; {unpaid}"
                if not quick.faster or self.search.ratio is None:
                    return self.dense(why)
                return self._unmeasured(trial, run_batch, started, why)
        return self._verified(Choice(self._plan(trial.module, run_batch), ""), trial, started)

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
            time_interleaved({"dense": copy.step}, rounds=3, warmup=1, device=device)
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

    def _unfit(self, trial: StepTrial) -> dict[str, str]:
        """Return the layers that the model does not let go, and how that shows.

        Some models ask for a layer's type or read its weight, and go another way if it is not the one they made: the
        step fails, or silently computes something else.
        """
        layers, _ = eligible_layers(trial.module, include=self.search.include, exclude=self.search.exclude)
        ranks = {name: theoretical_ranks(tuple(layer.weight.shape), 2.0) for name, layer in layers.items()}
        for problem in (failure, other_loss):
            together: str | None = self._agree(problem(trial, ranks) if ranks else None)
            if together is not None:
                alone = {name: problem(trial, {name: ranks[name]}) for name in ranks}
                found = {name: why for name, why in alone.items() if why is not None}
                return self._agree(found or dict.fromkeys(ranks, together))
        return {}

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

    def _compare(self, trial: StepTrial, ranks: Ranks) -> "Comparison":
        seconds = self._time_variants(trial, ranks, {"dense": frozenset(), "low rank": frozenset(ranks)})
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        return Comparison(medians["dense"], medians["low rank"], compare_paired(seconds["dense"], seconds["low rank"]))

    def _time_variants(
        self, trial: StepTrial, ranks: Ranks, variants: Mapping[str, frozenset[str]]
    ) -> Mapping[str, Sequence[float]]:
        steps: dict[str, Callable[[], object]] = {}
        for name, layers in variants.items():
            chosen = {layer: ranks[layer] for layer in ranks if layer in layers}
            changed = trial.changed(functools.partial(with_shapes_of, chosen))
            if self.search.phase_weights is None or not low_rank_layers(changed.module):
                steps[name] = changed.step
                continue
            mine = frozen_parameters(changed.module)
            for group in range(NUM_GROUPS):
                steps[f"{name}/{group}"] = functools.partial(_resting_step, changed, group, mine)
        device = self.trainer.strategy.root_device
        seconds: Mapping[str, Sequence[float]] = self._agree(
            time_interleaved(steps, rounds=_PAIRS, warmup=2, device=device)
        )
        return {name: self._over_phases(name, seconds) for name in variants}

    def _over_phases(self, name: str, seconds: Mapping[str, Sequence[float]]) -> Sequence[float]:
        if name in seconds or self.search.phase_weights is None:
            return seconds[name]
        return mean_of_phases([seconds[f"{name}/{group}"] for group in range(NUM_GROUPS)], self.search.phase_weights)

    def _in_context(self, inputs: RecordedInputs) -> Callable[[Any], object]:
        def run_batch(module: nn.Module) -> None:
            with self.trainer.precision_plugin.train_step_context():
                inputs.replay(module)

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


def _resting_step(trial: StepTrial, group: int, user_frozen: Collection[str]) -> None:
    freeze(trial.module, group, user_frozen=user_frozen)
    trial.step()


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
