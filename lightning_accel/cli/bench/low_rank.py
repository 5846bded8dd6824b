"""Low-rank training and inference against dense, against unmeasured ranks and against a rule that counts operations.

Whole training steps with a real optimizer, one process, interleaved in shuffled order. Models are at their random
initialization: times do not depend on the values, and energies are then the lowest a layer of that shape can keep.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.cli.bench._low_rank_peers import mac_guarded, theoretical, weight_parameters
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.low_rank import decompose, freeze, low_rank_layers, make_plan, verify_plan
from lightning_accel.low_rank.gate import apply_decision
from lightning_accel.low_rank.plan import RankPlan
from lightning_accel.measure import compare_paired, environment, time_interleaved
from lightning_accel.zoo.cnn import CNN
from lightning_accel.zoo.mlp import MLP
from lightning_accel.zoo.resnet import ResNet18
from lightning_accel.zoo.vit import ViT

_MIN_ENERGY = 0.3
_RATIO = 2.0  # of the peers that take a compression ratio
_WEIGHTS = (2.0, 1.0)  # of the phases in which group 0 (the costlier one) and group 1 rest
_SEQUENTIAL = (" / group 0 rests", " / group 1 rests")


@dataclass(frozen=True)
class Case:
    """A model, its input and what is asked of the knapsack; targets are ratios to the dense model."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    speedup: float
    train_target: float
    inference_target: float


_CASES = (
    Case("MLP 4x1024, batch 64", partial(MLP, in_features=1024), (64, 1024), 2.4, 3.0, 1.8),
    Case("ViT d384, 6 layers, batch 16", ViT, (16, 3, 32, 32), 2.3, 1.9, 1.6),
    Case("ResNet-18 for 32x32, batch 16", ResNet18, (16, 3, 32, 32), 2.0, 1.8, 1.5),
)
_DEFAULTS = (
    ("MLP, 8x8 images", MLP, (32, 1, 8, 8)),
    ("CNN, 8x8 images", CNN, (32, 1, 8, 8)),
    ("ViT d384", ViT, (8, 3, 32, 32)),
    ("ResNet-18", ResNet18, (8, 3, 32, 32)),
)


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the rows of the suite.

    Args:
        quick: Few pairs and only the MLP, for a look in about a minute.
        device: To run on.
    """
    for case in _CASES[:1] if quick else _CASES:
        yield from _training(case, quick=quick, device=device)
        yield from _inference(case, quick=quick, device=device)
    yield from _planning(_CASES[0] if quick else _CASES[2], device=device)
    for name, make, shape in _DEFAULTS[:1] if quick else _DEFAULTS:
        yield from _defaults(name, make, shape, quick=quick, device=device)


def _training(case: Case, *, quick: bool, device: str) -> Iterator[BenchRow]:
    model, x = _model(case.make, case.shape, device)
    guarded, energy = mac_guarded(model)
    fast, fast_plan = _planned(model, x, speedup=case.speedup)
    equal, equal_plan = _planned(model, x, ratio=_RATIO)
    matched, matched_plan = _planned(model, x, energy=energy, phase_weights=_WEIGHTS)
    paper, paper_plan = _planned(model, x, ratio=_RATIO, method="paper")
    models = {
        "dense": model,
        f"theoretical rank, a = {_RATIO:g}": theoretical(model, _RATIO),
        f"largest drop in time, a = {_RATIO:g}": paper,
        f"knapsack, a = {_RATIO:g}": equal,
        f"knapsack, predicted x{case.speedup:g}": fast,
        "operation count": guarded,
        "knapsack at the energy of the operation count": matched,
    }
    sequential = ("theoretical", "knapsack")
    steps = {}
    for name, candidate in models.items():
        steps[name] = _step(candidate, x)
        if name.startswith(sequential):
            for group, suffix in enumerate(_SEQUENTIAL):
                frozen = copy.deepcopy(candidate)
                if low_rank_layers(frozen):  # a plan may keep everything dense
                    freeze(frozen, group)
                steps[name + suffix] = _step(frozen, x)
    seconds = _timed(steps, quick=quick, device=device)
    for name in models:
        if name.startswith(sequential):
            phases = [seconds.pop(name + suffix) for suffix in _SEQUENTIAL]
            seconds[f"{name}, sequential freezing"] = [
                sum(w * t for w, t in zip(_WEIGHTS, pair, strict=True)) / sum(_WEIGHTS)
                for pair in zip(*phases, strict=True)
            ]
    plans = {
        f"largest drop in time, a = {_RATIO:g}": paper_plan,
        f"knapsack, a = {_RATIO:g}": equal_plan,
        f"knapsack, predicted x{case.speedup:g}": fast_plan,
        "knapsack at the energy of the operation count": matched_plan,
    }
    target = f"knapsack, predicted x{case.speedup:g}, sequential freezing"
    matched_name = "knapsack at the energy of the operation count, sequential freezing"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    note = f"{environment(device)['threads']} thread(s), AdamW, random weights"
    for name in seconds:
        if name == "dense":
            continue
        plan = plans.get(name.removesuffix(", sequential freezing"))
        kept = f"; energy {plan.energy:.2f}, parameters {_share(plan):.2f}" if plan is not None else ""
        if name.endswith("sequential freezing"):
            kept += f"; phases {_WEIGHTS[0]:g}:{_WEIGHTS[1]:g}"
        if name == "operation count":
            kept = f"; energy {energy:.2f}, parameters {weight_parameters(guarded) / weight_parameters(model):.2f}"
        yield BenchRow(
            suite="low_rank",
            case=f"{case.name}, training step",
            variant=name,
            baseline="dense",
            ratio=compare_paired(seconds["dense"], seconds[name]),
            seconds=medians,
            target=case.train_target if name == target else None,
            note=note + kept,
        )
    yield BenchRow(
        suite="low_rank",
        case=f"{case.name}, training step at equal energy",
        variant=matched_name,
        baseline="operation count",
        ratio=compare_paired(seconds["operation count"], seconds[matched_name]),
        seconds=medians,
        target=1.2,
        note=f"{note}; energy {matched_plan.energy:.2f} against {energy:.2f}; the peer is Composer's Factorize rule",
    )


def _inference(case: Case, *, quick: bool, device: str) -> Iterator[BenchRow]:
    model, x = _model(case.make, case.shape, device)
    model.eval()
    wanted = case.inference_target + 0.5
    fast, plan = _planned(model, x, speedup=wanted, phase="inference")
    guarded, _ = mac_guarded(model)
    models = {
        "dense": model,
        "theoretical rank": theoretical(model, _RATIO),
        "knapsack": fast,
        "operation count": guarded,
    }
    seconds = _timed({name: _forward(m.eval(), x) for name, m in models.items()}, quick=quick, device=device)
    for name in list(models)[1:]:
        kept = f"; energy {plan.energy:.2f}, parameters {_share(plan):.2f}" if name == "knapsack" else ""
        yield BenchRow(
            suite="low_rank",
            case=f"{case.name}, inference",
            variant=name if name != "theoretical rank" else f"theoretical rank, a = {_RATIO:g}",
            baseline="dense",
            ratio=compare_paired(seconds["dense"], seconds[name]),
            seconds={key: statistics.median(values) for key, values in seconds.items()},
            target=case.inference_target if name == "knapsack" else None,
            note=f"{environment(device)['threads']} thread(s), random weights{kept}",
        )


def _planning(case: Case, *, device: str) -> Iterator[BenchRow]:
    """Time the plan with an empty cache and from it; the ratio is time over the time allowed."""
    model, x = _model(case.make, case.shape, device)
    with tempfile.TemporaryDirectory() as folder:
        for variant, allowed in (("first time", 60.0), ("from the cache", 1.0)):
            begin = time.perf_counter()
            make_plan(model, _batch(x), ratio=_RATIO, cache_dir=folder)
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


def _defaults(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], *, quick: bool, device: str
) -> Iterator[BenchRow]:
    """Plan with default settings, let whole steps decide, and time what is left against dense once more."""
    model, x = _model(make, shape, device)
    plan = make_plan(model, _batch(x), ratio=_RATIO)

    def time_variants(variants: dict[str, frozenset[str]]) -> dict[str, list[float]]:
        considered = {layer.name for layer in plan.layers}
        steps = {}
        for key, low in variants.items():
            candidate = copy.deepcopy(model)
            decompose(candidate, plan.dense(considered - low, "not in this variant"))
            steps[key] = _step(candidate, x)
        return _timed(steps, quick=quick, device=device)

    decision = verify_plan(plan, time_variants)  # type: ignore[arg-type]
    changed = copy.deepcopy(model)
    kept = decompose(changed, apply_decision(plan, decision))
    seconds = _timed({"dense": _step(model, x), "default": _step(changed, x)}, quick=quick, device=device)
    yield BenchRow(
        suite="low_rank",
        case=f"{name}, batch {shape[0]}, default settings with the gate",
        variant=f"{len(kept)} layers low rank" if kept else "stays dense",
        baseline="dense",
        ratio=compare_paired(seconds["dense"], seconds["default"]),
        seconds={key: statistics.median(values) for key, values in seconds.items()},
        target=1.0,
        note=decision.reason if kept else f"{decision.reason}; both sides run the same model, the ratio is noise",
    )


def _model(make: Callable[[], nn.Module], shape: tuple[int, ...], device: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(device), torch.randn(shape, device=device)


def _planned(
    model: nn.Module,
    x: Tensor,
    *,
    ratio: float | None = None,
    energy: float | None = None,
    speedup: float | None = None,
    method: str = "knapsack",
    phase: str = "train",
    phase_weights: tuple[float, float] | None = None,
) -> tuple[nn.Module, RankPlan]:
    """Return a factorized copy and its plan; the floor is low, as random weights keep little energy."""
    changed = copy.deepcopy(model)
    plan = make_plan(
        changed,
        _batch(x),
        ratio=ratio,
        energy=energy,
        speedup=speedup,
        method=method,  # type: ignore[arg-type]
        phase=phase,  # type: ignore[arg-type]
        phase_weights=phase_weights,
        min_energy=_MIN_ENERGY,
    )
    decompose(changed, plan)
    return changed, plan


def _batch(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x)


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return one whole training step: forward, loss, backward, AdamW."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
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


def _timed(steps: dict[str, Callable[[], None]], *, quick: bool, device: str) -> dict[str, list[float]]:
    return time_interleaved(
        steps,
        rounds=8 if quick else 25,
        warmup=2,
        device=device,
        budget_seconds=10.0 if quick else 60.0,
        min_rounds=6 if quick else 8,
    )


def _share(plan: RankPlan) -> float:
    return plan.parameters_after / plan.parameters_before
