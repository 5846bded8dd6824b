"""Low-rank training and inference against dense, against unmeasured ranks and against a rule that counts operations.

Whole training steps with a real optimizer, one process, interleaved in shuffled order. Models are at their random
initialization: times do not depend on the values, and energies are then the lowest a layer of that shape can keep.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.bench.low_rank_peers import mac_guarded, weight_parameters
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.low_rank import decompose, freeze, low_rank_layers, make_plan
from lightning_accel.low_rank.freezing import mean_of_phases
from lightning_accel.low_rank.plan import RankPlan
from lightning_accel.low_rank.rank_search.gate import apply_decision, verify_plan
from lightning_accel.low_rank.rank_search.timing import Phase
from lightning_accel.measure import compare_paired, environment, time_interleaved
from lightning_accel.zoo.models.cnn import CNN
from lightning_accel.zoo.models.mlp import MLP
from lightning_accel.zoo.models.resnet import ResNet18
from lightning_accel.zoo.models.vit import ViT

_MIN_ENERGY = 0.3  # low, as random weights keep little
_RATIO = 2.0  # of the peers that take a compression ratio
_WEIGHTS = (2.0, 1.0)  # of the phases in which group 0 (the costlier one) and group 1 rest

_THEORY = f"theoretical rank, a = {_RATIO:g}"
_PAPER = f"largest drop in time, a = {_RATIO:g}"
_EQUAL = f"knapsack, a = {_RATIO:g}"
_COUNT = "operation count"  # Composer's Factorize rule
_MATCHED = "knapsack at the energy of the operation count"
_TURNS = ", sequential freezing"
_IN_TURNS = (_THEORY, _EQUAL, _MATCHED)


@dataclass(frozen=True)
class Case:
    """A model, its input, what is asked of the knapsack, and what whole steps shall reach, as ratios to dense.

    Attributes:
        name: For the table.
        make: Makes the model.
        shape: Of its input.
        speedup: Of the layers that can be factored, training in the phases of sequential freezing.
        inference_speedup: Of the same layers in the forward alone.
        train_target: Of the whole training step.
        inference_target: Of the whole forward.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    speedup: float
    inference_speedup: float
    train_target: float
    inference_target: float


_CASES = (
    Case("MLP 4x1024, batch 64", partial(MLP, in_features=1024), (64, 1024), 3.6, 2.3, 3.0, 1.8),
    Case("ViT d384, 6 layers, batch 16", ViT, (16, 3, 32, 32), 2.9, 2.1, 1.9, 1.6),
    Case("ResNet-18 for 32x32, batch 16", ResNet18, (16, 3, 32, 32), 2.4, 2.0, 1.8, 1.5),
)
_DEFAULTS = (
    ("MLP, 8x8 images", MLP, (32, 1, 8, 8)),
    ("CNN, 8x8 images", CNN, (32, 1, 8, 8)),
    ("ViT d384", ViT, (16, 3, 32, 32)),
    ("ResNet-18", ResNet18, (16, 3, 32, 32)),
)


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the rows of the suite: about six minutes on one core.

    Each kind of layer is measured once a run: all plans read one cache, which begins empty.

    Args:
        quick: Few pairs and only the MLP, for a look in about a minute.
        device: To run on.
    """
    cases, defaults = (_CASES[:1], _DEFAULTS[:1]) if quick else (_CASES, _DEFAULTS)
    with tempfile.TemporaryDirectory() as folder:
        suite = _Suite(quick=quick, device=device, cache=folder)
        for case in cases:
            if case is cases[-1]:
                yield from suite.planning(case)
            yield from suite.training(case)
            yield from suite.inference(case)
        for name, make, shape in defaults:
            yield from suite.defaults(name, make, shape)


@dataclass(frozen=True)
class _Suite:
    quick: bool
    device: str
    cache: str

    def planning(self, case: Case) -> Iterator[BenchRow]:
        """Time the plan with an empty cache and from it; the ratio is time over the time allowed."""
        model, x = self._model(case.make, case.shape)
        for variant, allowed in (("first time", 60.0), ("from the cache", 1.0)):
            begin = time.perf_counter()
            make_plan(model, _batch(x), ratio=_RATIO, cache_dir=self.cache)
            taken = time.perf_counter() - begin
            yield BenchRow(
                suite="low_rank",
                case=f"plan of {case.name}",
                variant=variant,
                baseline=f"{allowed:g} s",
                ratio=compare_paired([taken], [allowed]),
                seconds={variant: taken},
                target=1.0,
                better="at most",
                note="one run",
            )

    def training(self, case: Case) -> Iterator[BenchRow]:
        """Time training steps, with everything trainable and in the phases of sequential freezing."""
        model, x = self._model(case.make, case.shape)
        models, kept, (energy, matched) = self._variants(model, x, speedup=case.speedup, weights=_WEIGHTS)
        fast = f"knapsack, predicted x{case.speedup:g}"
        steps: dict[str, Callable[[], object]] = {}
        for name, candidate in models.items():
            steps[name] = adamw_step(candidate, x)
            if name in (*_IN_TURNS, fast):
                steps |= {f"{name}/{group}": adamw_step(_frozen(candidate, group), x) for group in range(len(_WEIGHTS))}
        seconds = self._timed(steps)
        for name in (*_IN_TURNS, fast):
            phases = [seconds.pop(f"{name}/{group}") for group in range(len(_WEIGHTS))]
            seconds[name + _TURNS] = mean_of_phases(phases, _WEIGHTS)
            kept[name + _TURNS] = f"{kept[name]}; phases {_WEIGHTS[0]:g}:{_WEIGHTS[1]:g}"
        note = f"{environment(self.device)['threads']} thread(s), AdamW, random weights; "
        title = f"{case.name}, training step"
        yield from _against_dense(title, seconds, kept, note, {fast + _TURNS: case.train_target})
        note += f"energy {matched:.2f} against {energy:.2f}; the peer is Composer's Factorize rule"
        yield _at_equal_energy(title, seconds, _MATCHED + _TURNS, note, target=1.2)

    def inference(self, case: Case) -> Iterator[BenchRow]:
        """Time forwards."""
        model, x = self._model(case.make, case.shape)
        model.eval()
        models, kept, (energy, matched) = self._variants(model, x, speedup=case.inference_speedup, weights=None)
        fast = f"knapsack, predicted x{case.inference_speedup:g}"
        seconds = self._timed({name: _forward(m.eval(), x) for name, m in models.items()})
        note = f"{environment(self.device)['threads']} thread(s), random weights; "
        title = f"{case.name}, inference"
        yield from _against_dense(title, seconds, kept, note, {fast: case.inference_target})
        note += f"energy {matched:.2f} against {energy:.2f}; the peer is Composer's Factorize rule"
        yield _at_equal_energy(title, seconds, _MATCHED, note, target=None)

    def defaults(self, name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Iterator[BenchRow]:
        """Plan with default settings, let whole steps decide, and time what is left against dense once more."""
        model, x = self._model(make, shape)
        plan = make_plan(model, _batch(x), ratio=_RATIO, cache_dir=self.cache)

        def time_variants(variants: Mapping[str, frozenset[str]]) -> dict[str, list[float]]:
            considered = {layer.name for layer in plan.layers}
            steps = {}
            for key, low in variants.items():
                candidate = copy.deepcopy(model)
                decompose(candidate, plan.dense(considered - low, "not in this variant"))
                steps[key] = adamw_step(candidate, x)
            return self._timed(steps, rounds=8)

        decision = verify_plan(plan, time_variants)
        changed = copy.deepcopy(model)
        kept = decompose(changed, apply_decision(plan, decision))
        variant = f"{len(kept)} layer{'s' if len(kept) > 1 else ''} low rank" if kept else "stays dense"
        seconds = self._timed({"dense": adamw_step(model, x), variant: adamw_step(changed, x)})
        yield BenchRow(
            suite="low_rank",
            case=f"{name}, batch {shape[0]}, default settings with the gate",
            variant=variant,
            baseline="dense",
            ratio=compare_paired(seconds["dense"], seconds[variant]),
            seconds={key: statistics.median(values) for key, values in seconds.items()},
            target=1.0 if kept else None,
            note=decision.reason if kept else f"{decision.reason}; both sides run the same model, the ratio is noise",
        )

    def _variants(
        self, model: nn.Module, x: Tensor, *, speedup: float, weights: tuple[float, float] | None
    ) -> tuple[dict[str, nn.Module], dict[str, str], tuple[float, float]]:
        """Return the models to compare, what each keeps, and the energies of operation count and its match."""
        phase: Phase = "train" if weights is not None else "inference"
        guarded, energy = mac_guarded(model)
        plan = partial(make_plan, model, _batch(x), phase=phase, min_energy=_MIN_ENERGY, cache_dir=self.cache)
        plans: dict[str, RankPlan] = {
            _THEORY: plan(ratio=_RATIO, method="fixed"),
            _PAPER: plan(ratio=_RATIO, method="paper"),
            _EQUAL: plan(ratio=_RATIO),
            f"knapsack, predicted x{speedup:g}": plan(speedup=speedup, phase_weights=weights),
            _MATCHED: plan(energy=energy, phase_weights=weights),
        }
        models = {"dense": model, _COUNT: guarded}
        share = weight_parameters(guarded) / weight_parameters(model)
        kept = {_COUNT: f"energy {energy:.2f}, parameters {share:.2f} (Composer's Factorize rule)"}
        for name, chosen in plans.items():
            models[name] = copy.deepcopy(model)
            decompose(models[name], chosen)
            share = weight_parameters(models[name]) / weight_parameters(model)
            kept[name] = f"energy {chosen.energy:.2f}, parameters {share:.2f}"
        return models, kept, (energy, plans[_MATCHED].energy)

    def _model(self, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make().to(self.device), torch.randn(shape, device=self.device)

    def _timed(self, steps: Mapping[str, Callable[[], object]], *, rounds: int = 20) -> dict[str, list[float]]:
        return time_interleaved(
            steps,
            rounds=8 if self.quick else rounds,
            warmup=2,
            device=self.device,
            budget_seconds=10.0 if self.quick else 45.0,
            min_rounds=6 if self.quick else 8,
        )


def _against_dense(
    case: str,
    seconds: Mapping[str, list[float]],
    kept: Mapping[str, str],
    note: str,
    targets: Mapping[str, float],
) -> Iterator[BenchRow]:
    for name in seconds:
        if name != "dense":
            yield BenchRow(
                suite="low_rank",
                case=case,
                variant=name,
                baseline="dense",
                ratio=compare_paired(seconds["dense"], seconds[name]),
                seconds={key: statistics.median(values) for key, values in seconds.items()},
                target=targets.get(name),
                note=note + kept[name],
            )


def _at_equal_energy(
    case: str, seconds: Mapping[str, list[float]], variant: str, note: str, *, target: float | None
) -> BenchRow:
    return BenchRow(
        suite="low_rank",
        case=f"{case} at equal energy",
        variant=variant,
        baseline=_COUNT,
        ratio=compare_paired(seconds[_COUNT], seconds[variant]),
        seconds={key: statistics.median(values) for key, values in seconds.items()},
        target=target,
        note=note,
    )


def _batch(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x)


def _frozen(model: nn.Module, group: int) -> nn.Module:
    frozen = copy.deepcopy(model)
    if low_rank_layers(frozen):  # a plan may keep everything dense
        freeze(frozen, group)
    return frozen


def adamw_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return one whole training step: forward, loss, backward, AdamW."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def _forward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.inference_mode():
            model(x)

    return forward
