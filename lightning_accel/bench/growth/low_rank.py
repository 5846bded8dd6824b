"""Training steps of dense and of low-rank MLPs against their width and their depth."""

import copy
import time
from collections.abc import Iterator

import torch

from lightning_accel.bench.growth.points import ENOUGH, point
from lightning_accel.bench.suites.low_rank import adamw_step
from lightning_accel.evidence.growth.curves import GrowthRow
from lightning_accel.low_rank import decompose, make_plan
from lightning_accel.measure import time_interleaved
from lightning_accel.zoo.models.mlp import MLP

_BATCH, _RATIO = 64, 2.0
_WIDTHS, _DEPTH = (64, 128, 256, 512, 1024, 2048, 4096), 2
_DEPTHS, _WIDTH = (2, 4, 8, 16, 32), 512
_SECONDS = 5.0  # of a point, for as long as there are enough pairs


def rows(*, quick: bool, device: str) -> Iterator[GrowthRow]:
    """Yield the points: about two minutes on one core, most of them singular value decompositions.

    Args:
        quick: Two small sizes a curve.
        device: To run on.
    """
    for width in (32, 64) if quick else _WIDTHS:
        curve = f"width, MLP of {_DEPTH} hidden layers, batch {_BATCH}, training step"
        yield _point(curve, "units a layer", width, width=width, depth=_DEPTH, device=device)
    width = 32 if quick else _WIDTH
    for depth in (2, 4) if quick else _DEPTHS:
        curve = f"depth, MLP of width {width}, batch {_BATCH}, training step"
        yield _point(curve, "hidden layers", depth, width=width, depth=depth, device=device)


def _point(curve: str, axis: str, size: int, *, width: int, depth: int, device: str) -> GrowthRow:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = MLP(in_features=width, width=width, depth=depth).to(device)
        x = torch.randn(_BATCH, width, device=device)
    low = copy.deepcopy(dense)
    begin = time.perf_counter()
    plan = make_plan(low, None, ratio=_RATIO, method="snapped")
    names = decompose(low, plan)
    setup = time.perf_counter() - begin
    steps = {"dense": adamw_step(dense, x), f"low rank, ratio {_RATIO:g}": adamw_step(low, x)}
    del dense, low
    seconds = time_interleaved(steps, rounds=40, warmup=3, device=device, budget_seconds=_SECONDS, min_rounds=ENOUGH)
    ranks = sorted({layer.ranks[0] for layer in plan.layers if layer.ranks is not None})
    note = f"{len(names)} layers of rank {', '.join(map(str, ranks))}" if names else "no layer is factored"
    return point("low_rank", curve, axis, size, seconds, setup_seconds=setup, note=note)
