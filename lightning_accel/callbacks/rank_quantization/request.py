"""What ranks are asked for, what finding them costs, and the plan that answers."""

import dataclasses
import glob
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from lightning_accel.arguments import check_choice, check_number
from lightning_accel.callbacks.layer_exchange.layer_trial import Ranks
from lightning_accel.callbacks.rank_quantization.reasons import LostToTheFloor
from lightning_accel.low_rank import RankPlan, SharedVectors, eligible_layers, make_plan, theoretical_ranks
from lightning_accel.low_rank.optimizers.kinds import MakeOptimizer
from lightning_accel.low_rank.plan import UNMEASURED, Method, Weighting, factor_parameters

_STEPS_TO_PLAN = 250.0  # what `make_plan` takes where layers are quick
_SECONDS_A_LAYER = 3.0  # what it takes at most for one kind of layer


@dataclass(frozen=True)
class RankRequest:
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

    def check(self) -> None:
        """Check the fields.

        Raises:
            TypeError: If a value is of another kind.
            ValueError: If a value is out of range or more than one target is given.
        """
        for name in ("ratio", "speedup"):
            check_number(name, getattr(self, name), above=1.0, optional=True)
        check_number("energy", self.energy, above=0.0, at_most=1.0, optional=True)
        check_number("min_energy", self.min_energy, at_least=0.0, at_most=1.0)
        check_choice("method", self.method, get_args(Method))
        check_choice("weighting", self.weighting, get_args(Weighting))
        # The core judges what excludes each other, now and not at the first batch; a layer nobody calls costs nothing.
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings |= {"include": ("*",), "exclude": (), "cache_dir": None}
        with torch.random.fork_rng(devices=()):  # a layer draws its weights
            make_plan(nn.Sequential(nn.Linear(2, 2)), lambda _: None, **settings)

    def plan(
        self,
        module: nn.Module,
        run_batch: Callable[[Any], object] | None,
        optimizers: Mapping[str, MakeOptimizer] | None = None,
        shared: SharedVectors | None = None,
    ) -> RankPlan:
        """Make the plan; ``optimizers`` make what updates each layer, by name, ``shared`` is for its decomposition."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return make_plan(module, run_batch, **settings, make_optimizer=optimizers or {}, shared=shared)

    def without(self, names: Iterable[str]) -> "RankRequest":
        """Return the request with layers excluded."""
        return dataclasses.replace(self, exclude=(*self.exclude, *map(glob.escape, sorted(names))))

    def unmeasured_plan(
        self,
        module: nn.Module,
        run_batch: Callable[[Any], object] | None,
        optimizers: Mapping[str, MakeOptimizer] | None = None,
        shared: SharedVectors | None = None,
    ) -> RankPlan:
        """Make a plan of theoretical ranks on plateaus, for want of time to measure.

        Layers that would keep less than `min_energy` stay dense.
        """
        plan = dataclasses.replace(self, method="snapped").plan(module, run_batch, optimizers, shared)
        poor = {layer.name for layer in plan.layers if layer.ranks is not None and layer.energy < self.min_energy}
        return plan.dense(poor, f"retains less than {self.min_energy:.0%} of its energy")

    def lost_to_the_floor(self, plan: RankPlan) -> LostToTheFloor | None:
        """Return how many layers `min_energy` kept dense; None if it kept none."""
        lost = [
            layer
            for layer in plan.layers
            if layer.ranks is None and layer.candidates and max(c.energy for c in layer.candidates) < self.min_energy
        ]
        return LostToTheFloor(len(lost), len(plan.layers), self.min_energy) if lost else None

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

    @property
    def unmeasured(self) -> bool:
        """Whether ranks are chosen by theory, which takes no time."""
        return self.method in UNMEASURED

    def planning_seconds(self, module: nn.Module, step_seconds: float) -> float:
        """Estimate, from above, what `plan` will take with nothing cached."""
        if self.unmeasured:
            return 0.0
        layers, _ = eligible_layers(module, include=self.include, exclude=self.exclude)
        kinds = {(type(layer), tuple(layer.weight.shape)) for layer in layers.values()}
        return min(_STEPS_TO_PLAN * step_seconds, _SECONDS_A_LAYER * len(kinds))
