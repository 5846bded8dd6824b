"""The table of the fuzzer: accelerator to its neutral setting, its real one, and what must hold of a real fit."""

import atexit
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from random_modules import Moved, RandomModule
from torch import nn

from lightning_accel.callbacks import (
    IntraStreamScheduling,
    L1InfProjection,
    MultilevelProjection,
    RankQuantization,
    SequentialFreezing,
    enable_low_rank_loading,
)
from lightning_accel.low_rank import low_rank_layers, make_plan
from lightning_accel.strategies import AsyncSGDStrategy

FACTORS = ("factor_in", "core", "factor_out")
CACHE = tempfile.mkdtemp()
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


@dataclass(frozen=True)
class Entry:
    """One accelerator as the fuzzer sees it; callables get the seed.

    Attributes:
        neutral: Callbacks that must not change a fit.
        real: Callbacks that act.
        problems: Gets the plain and the real fit and returns what is wrong with the real one.
        acted: Says of the real module whether anything happened.
        workers: Of the neutral and of the real fit under the asynchronous strategy; None trains in this process.
        every: Of how many modules one is looked at, where that takes long.
        within: By how much a parameter may differ from plain training, gets the plain fit.
    """

    neutral: Callable[[int], list[Any]]
    real: Callable[[int], list[Any]]
    problems: Callable[["Fit", "Fit"], list[str]]
    acted: Callable[[Any], bool]
    workers: tuple[int, int] | None = None
    every: int = 1
    within: Callable[["Fit"], float] = lambda _: 0.0

    def settings(self, *, real: bool) -> dict[str, Any]:
        """Return what the Trainer of a fit gets."""
        if self.workers is None:
            return {}
        return {"strategy": AsyncSGDStrategy(), "devices": self.workers[real]}


@dataclass
class Fit:
    """A fit that is over."""

    seed: int
    module: Any
    trainer: Any
    moved: Moved


def tries_and_stays_dense(seed: int) -> list[Any]:
    """Steps are tried on copies and layers are timed, but no rank keeps all energy: training must not notice."""
    quantization = RankQuantization(
        min_energy=1.0, when=random.Random(seed).choice((0, 1)), max_overhead=1e9, cache_dir=CACHE
    )
    return [quantization, SequentialFreezing()]


def low_rank_in_turns(seed: int) -> list[Any]:
    """Layers become low rank, by a plan or after trials, and their factors take turns or not."""
    draw = random.Random(f"low rank {seed}")
    when = draw.choice((0, 1))
    if draw.random() < 0.5:
        plan = make_plan(RandomModule(seed), None, ratio=draw.choice((1.2, 1.6, 2.5)), method="fixed")
        quantization = RankQuantization(plan=plan, when=when)
    else:
        quantization = RankQuantization(
            1.5, method="snapped", on_loss="keep", when=when, min_energy=0.0, cache_dir=CACHE
        )
    freezing = [SequentialFreezing(period_steps=draw.choice((1, 2)))] if draw.random() < 0.6 else []
    return [quantization, *freezing]


def low_rank_problems(plain: Fit, real: Fit) -> list[str]:
    """Say which parameters do not train as they should, and whether what is saved is what runs."""
    found = []
    # what moves by rounding alone (a bias before a batch norm) may as well not move
    wanted = plain.moved.names(plain.module, by=1e-3)
    moved = real.moved.names(real.module)
    for name, p in real.module.named_parameters():
        dense = name.rpartition(".")[0] + ".weight" if name.rpartition(".")[2] in FACTORS else name
        if not torch.isfinite(p).all():
            found.append(f"`{name}` is not finite")
        if dense in wanted and name not in moved and not _may_rest(plain, real, name, dense, p):
            found.append(f"`{name}` did not move")
    found += [f"`{name}` is in no optimizer" for name in _held_by_none(real) - _held_by_none(plain)]
    fresh = enable_low_rank_loading(RandomModule(real.seed))
    fresh.load_state_dict(real.module.state_dict())
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        if not torch.allclose(real.module.eval()(x), fresh.eval()(x), atol=1e-5):
            found.append("what is saved is not what runs")
    return found


def _may_rest(plain: Fit, real: Fit, name: str, dense: str, parameter: torch.Tensor) -> bool:
    """Say whether a parameter rightly stands where it was.

    A factor trains in some steps only, where it takes turns, and a layer may be called in some steps only: plain
    training then has no gradient in the factor's steps either. And gradients that pass chains of rank one can be so
    small that what SGD, or Adadelta in its first steps, makes of them is lost in the rounding of 32-bit weights. What
    was frozen by the user before its first step as what it is now has no step to move in.
    """
    pairs = zip(plain.moved.gradients, real.moved.gradients, strict=False)
    steps = [(before.get(dense) or 0.0, now[name]) for before, now in pairs if name in now]
    rounding = 1e-6 * float(parameter.detach().abs().max())
    if not steps:
        return plain.module.away == "freeze later" and name.startswith("blocks.0.")
    used = [now for before, now in steps if before > 0.0]
    return not used or (all(now is not None and now < rounding for now in used) and max(used) > 0.0)


def infinite_radius(seed: int) -> list[Any]:
    """A ball that holds everything: training must not notice."""
    draw = random.Random(f"infinite {seed}")
    if draw.random() < 0.5:
        return [L1InfProjection(radius=math.inf, method=draw.choice(("bilevel", "exact")))]
    return [MultilevelProjection(radius=math.inf, norms=draw.choice((("l1", "linf"), ("l1", "l2"), ("linf", "l1"))))]


def sparse(seed: int) -> list[Any]:
    """Projections as they come, and to a share of the groups in several ways."""
    draw = random.Random(f"sparse {seed}")
    share, way = draw.choice((0.2, 0.5)), draw.randrange(5)
    if way < 2:
        return [(L1InfProjection, MultilevelProjection)[way]()]
    if way == 2:
        method, groups = draw.choice(("bilevel", "exact")), draw.choice(("rows", "columns"))
        return [L1InfProjection(target_sparsity=share, method=method, groups=groups)]
    if way == 3:
        return [MultilevelProjection(target_sparsity=share, freeze_zero_groups=draw.random() < 0.5)]
    return [L1InfProjection(target_sparsity=share, scope="global")]


def schedules(_seed: int) -> list[Any]:
    """Recurrent layers by schedules, which compute what the loop does."""
    return [IntraStreamScheduling()]


def training_problems(plain: Fit, real: Fit) -> list[str]:
    """Say which parameters do not train as they do without, are not finite or cleared whole, or not what is saved."""
    # a bias in front of a batch norm has no gradient but rounding
    parameters, first = dict(plain.module.named_parameters()), plain.moved.first
    wanted = {n for n, p in parameters.items() if n in first and bool(((p - first[n]).abs() > 1e-6).any())}
    found = [f"`{name}` did not move" for name in sorted(wanted - real.moved.names(real.module))]
    for name, p in real.module.named_parameters():
        if not torch.isfinite(p).all():
            found.append(f"`{name}` is not finite")
        if name in wanted and p.dim() > 1 and not bool(p.any()):
            found.append(f"`{name}` is cleared whole")
    fresh = RandomModule(real.seed)
    fresh.load_state_dict(real.module.state_dict())
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        if not torch.allclose(real.module.eval()(x), fresh.eval()(x), atol=1e-5):
            found.append("what is saved is not what runs")
    return found


def no_callbacks(_seed: int) -> list[Any]:
    """The strategy alone."""
    return []


def products_in_half_precision(plain: Fit) -> float:
    """Bound what a server's steps may differ by.

    Under manual optimization in mixed precision a plain Trainer calls the optimizer inside of autocast, so that
    products of matrices in its step, as Adafactor has them, are of half precision. The server is in no autocast.
    """
    inside = plain.trainer.precision == "bf16-mixed" and not plain.module.automatic_optimization
    return 1e-3 if inside and plain.module.optimizer == "adafactor" else 0.0


def trained_by_others_problems(plain: Fit, real: Fit) -> list[str]:
    """Say which parameters several workers do not train, or make infinite; what each did was seen by none but it."""
    torch.manual_seed(0)
    fresh = dict(RandomModule(real.seed).named_parameters())
    found, wanted = [], plain.moved.names(plain.module, by=1e-3)
    for name, p in real.module.named_parameters():
        if not torch.isfinite(p).all():
            found.append(f"`{name}` is not finite")
        if name in wanted and torch.equal(p, fresh[name]):
            found.append(f"`{name}` did not move")
    return found


def has_zero_groups(module: Any) -> bool:
    """Whether a weight has a row or a column of zeros."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    return any(bool((p.transpose(0, dim) == 0).flatten(1).all(1).any()) for p in weights for dim in (0, 1))


def is_recurrent(module: Any) -> bool:
    """Whether there is a layer to schedule."""
    return any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in module.modules())


def _held_by_none(fit: Fit) -> set[str]:
    held = {id(p) for optimizer in fit.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in fit.module.named_parameters() if p.requires_grad and id(p) not in held}


TABLE = {
    "low_rank": Entry(
        tries_and_stays_dense, low_rank_in_turns, low_rank_problems, lambda module: bool(low_rank_layers(module))
    ),
    "projection": Entry(infinite_radius, sparse, training_problems, has_zero_groups),
    "scheduling": Entry(schedules, schedules, training_problems, is_recurrent),
    "async_sgd": Entry(
        no_callbacks,
        no_callbacks,
        trained_by_others_problems,
        lambda _: True,
        workers=(1, 2),
        every=20,
        within=products_in_half_precision,
    ),
}
