"""A projection against the size of a tensor, and a callback's step against the size and the number of tensors."""

import statistics
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import TensorDataset
from typing_extensions import override

from lightning_accel.bench.growth.points import point, time_prepared
from lightning_accel.bench.overhead_row import step_seconds
from lightning_accel.callbacks.projection.l1inf_projection import L1InfProjection
from lightning_accel.evidence.growth.curves import GrowthRow
from lightning_accel.projection import project_l1inf, radius_for_sparsity
from lightning_accel.projection.kernels.compiled import compiling, largest
from lightning_accel.zoo.models.mlp import MLP

if TYPE_CHECKING:
    import lightning.pytorch as pl

_SIDES = (32, 100, 316, 1000, 3162, 5477)  # of square matrices: a thousand to thirty million entries
_WIDTHS = (32, 100, 316, 1000, 2000)
_COUNTS, _WIDTH = (1, 4, 16, 64, 256), 64
_ROUNDS, _SECONDS = 300, 4.0  # of a matrix; large ones get fewer rounds
_BATCH = 32
_CALLBACK = "L1InfProjection(radius_fraction=0.1), training step of the Trainer"


class TimedL1InfProjection(L1InfProjection):
    """Notes how long it takes to find what to project."""

    setup_seconds = 0.0

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        begin = time.perf_counter()
        super().on_fit_start(trainer, pl_module)
        self.setup_seconds += time.perf_counter() - begin


def rows(*, quick: bool, device: str) -> Iterator[GrowthRow]:
    """Yield the points: about a minute and a quarter on one core.

    Args:
        quick: Two small sizes a curve.
        device: Of the callback's steps; single tensors are the CPU's.
    """
    compiled = _compile()
    for side in _SIDES[:2] if quick else _SIDES:
        yield _matrix(side, f"; {compiled}" if side == _SIDES[0] else "")
    turns = 1 if quick else 6
    for width in _WIDTHS[:2] if quick else _WIDTHS:
        curve = (
            f"entries of one weight, L1InfProjection(radius_fraction=0.1), training step of the Trainer, batch {_BATCH}"
        )
        yield _callback(curve, "entries", width * width, width=width, depth=1, turns=turns, device=device)
    for count in _COUNTS[:2] if quick else _COUNTS:
        curve = f"weights of {_WIDTH} x {_WIDTH}, {_CALLBACK}, batch {_BATCH}"
        yield _callback(curve, "weights", count, width=_WIDTH, depth=count, turns=turns, device=device)


def _compile() -> str:
    """Compile, as the default does once 1 GiB has passed; return what to say of that."""
    begin = time.perf_counter()
    with warnings.catch_warnings(), compiling(True):
        warnings.simplefilter("ignore", RuntimeWarning)  # said in the note
        is_compiled = largest(torch.randn(1, 50, 1_000)) is not None
    if not is_compiled:
        return "nothing is compiled, here or below: there is no compiler that answers"
    return f"compiling took {time.perf_counter() - begin:.2g} s, once a process"


def _matrix(side: int, compiled: str) -> GrowthRow:
    fresh = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    x, other = fresh.clone(), torch.empty_like(fresh)
    begin = time.perf_counter()
    radius = radius_for_sparsity(x, 0.5, (0,))
    setup = time.perf_counter() - begin
    bound = float(fresh.abs().amax()) / 2.0
    candidates = {
        "copy_": lambda: other.copy_(x),
        "project_l1inf in place": lambda: project_l1inf(x, radius, out=x),
        "clamp_": lambda: x.clamp_(-bound, bound),
    }
    seconds = time_prepared(candidates, lambda: x.copy_(fresh), rounds=_ROUNDS, budget_seconds=_SECONDS)
    curve = "entries of a square matrix, float32, rows are the groups"
    each = 1e9 * statistics.median(seconds["project_l1inf in place"]) / x.numel()
    note = f"{each:.3g} ns an entry{compiled}"
    return point("projection", curve, "entries", x.numel(), seconds, cost=True, setup_seconds=setup, note=note)


def _callback(curve: str, axis: str, size: int, *, width: int, depth: int, turns: int, device: str) -> GrowthRow:
    torch.manual_seed(0)
    projection = TimedL1InfProjection(radius_fraction=0.1)

    def data(samples: int) -> TensorDataset:
        return TensorDataset(torch.randn(samples, width), torch.randint(0, 10, (samples,)))

    seconds = step_seconds(
        MLP(in_features=width, width=width, depth=depth),
        data,
        projection,
        batch_size=_BATCH,
        turns=turns,
        device=device,
        clock=time.perf_counter,
    )
    times = {"step without it": seconds["plain"], "step with it": seconds["projected"]}
    added = 1e6 * (statistics.median(times["step with it"]) - statistics.median(times["step without it"]))
    note = f"{added:.0f} µs a step, {added / depth:.0f} a weight"
    return point("projection", curve, axis, size, times, cost=True, setup_seconds=projection.setup_seconds, note=note)
