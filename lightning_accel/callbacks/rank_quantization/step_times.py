"""Times of whole training steps on copies, dense against low rank, in the phases that training will have."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_accel.callbacks.layer_exchange.layer_trial import Ranks, with_shapes_of
from lightning_accel.callbacks.layer_exchange.step_trial import StepTrial
from lightning_accel.callbacks.rank_quantization.reasons import Comparison
from lightning_accel.low_rank import freeze, frozen_parameters, low_rank_layers
from lightning_accel.low_rank.freezing import NUM_GROUPS, mean_of_phases
from lightning_accel.measure import compare_paired, time_interleaved

GoOn = Callable[[Mapping[str, Sequence[float]]], bool]

PAIRS = 8  # few, but enough for the exact test to say "faster" although one pair disagrees
PEEK = 3  # pairs after which a trial that promises nothing ends


class TrialError(Exception):
    """A trial step on a copy failed; ``__cause__`` says how."""


@dataclass(frozen=True)
class StepTimes:
    """Times steps; rank 0's times count on all processes, which make the same steps.

    Args:
        trainer: Of the run.
        trial: Makes the steps.
        phase_weights: Shares of the steps in which either factor group rests; None where none does.

    Raises:
        TrialError: In all methods, where a step fails.
        torch.OutOfMemoryError: Where memory does not suffice.
    """

    trainer: "pl.Trainer"
    trial: StepTrial
    phase_weights: tuple[float, float] | None

    def dense_seconds(self) -> float:
        """Return the median seconds of a dense step; the trial has made one before."""
        return statistics.median(self._time({"dense": self.trial.step}, rounds=2, warmup=0)["dense"])

    def compare(self, ranks: Ranks, go_on: GoOn | None = None) -> Comparison:
        """Compare dense steps with those of ``ranks``.

        Args:
            ranks: Layers that are low rank, with their ranks.
            go_on: Gets the times of a few pairs and says whether more are worth it.
        """
        variants = {"dense": frozenset[str](), "low rank": frozenset(ranks)}
        seconds = self.variants(ranks, variants, go_on)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        return Comparison(medians["dense"], medians["low rank"], compare_paired(seconds["dense"], seconds["low rank"]))

    def variants(
        self, ranks: Ranks, variants: Mapping[str, frozenset[str]], go_on: GoOn | None = None
    ) -> Mapping[str, Sequence[float]]:
        """Return the seconds of steps with several sets of low-rank layers, by their names; equal indices are pairs."""
        steps: dict[str, Callable[[], object]] = {}
        for name, layers in variants.items():
            chosen = {layer: ranks[layer] for layer in ranks if layer in layers}
            changed = _tried(functools.partial(self.trial.changed, functools.partial(with_shapes_of, chosen)))
            for phase, rest in self._phases(name, changed.module).items():
                steps[phase] = functools.partial(_resting, rest, changed.step)

        def time_rounds(rounds: int, warmup: int) -> dict[str, list[float]]:
            seconds = self._time(steps, rounds=rounds, warmup=warmup)
            return {name: [*self._over_phases(name, seconds)] for name in variants}

        if go_on is None:
            return time_rounds(PAIRS, 2)
        found = time_rounds(PEEK, 1)
        if go_on(found):
            more = time_rounds(PAIRS - PEEK, 0)
            found = {name: [*found[name], *more[name]] for name in variants}
        return found

    def layers_alone(self, ranks: Ranks, run: Callable[[nn.Module], object]) -> tuple[float, float]:
        """Return the least seconds of ``run`` over single layers, dense and with ``ranks``."""
        changed = _tried(functools.partial(self.trial.changed, functools.partial(with_shapes_of, ranks))).module
        calls: dict[str, Callable[[], object]] = {"dense": functools.partial(run, self.trial.module)}
        for name, rest in self._phases("low rank", changed).items():
            calls[name] = functools.partial(_resting, rest, functools.partial(run, changed))
        found = self._time(calls, rounds=PEEK, warmup=1)
        self.trial.module.zero_grad()
        return min(found["dense"]), min(self._over_phases("low rank", found))

    def _time(self, calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int) -> Mapping[str, Any]:
        device = self.trainer.strategy.root_device
        timed = functools.partial(time_interleaved, calls, rounds=rounds, warmup=warmup, device=device)
        seconds: Mapping[str, Any] = self.trainer.strategy.broadcast(_tried(timed))
        return seconds

    def _phases(self, name: str, module: nn.Module) -> Mapping[str, Callable[[], object]]:
        """Return what brings each phase of sequential freezing about, by the name of its times."""
        if self.phase_weights is None or not low_rank_layers(module):
            return {name: lambda: None}
        mine = frozen_parameters(module)
        return {
            f"{name}/{group}": functools.partial(freeze, module, group, user_frozen=mine) for group in range(NUM_GROUPS)
        }

    def _over_phases(self, name: str, seconds: Mapping[str, Sequence[float]]) -> Sequence[float]:
        if name in seconds or self.phase_weights is None:
            return seconds[name]
        return mean_of_phases([seconds[f"{name}/{group}"] for group in range(NUM_GROUPS)], self.phase_weights)


def _tried(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # the model's own code runs here, and may not do with other layers
        raise TrialError from problem


def _resting(rest: Callable[[], object], step: Callable[[], object]) -> None:
    rest()
    step()
