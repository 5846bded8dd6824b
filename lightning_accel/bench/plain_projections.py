"""Bi-level projections against plain torch on shapes of well-known layers: rows of the suite ``projection``."""

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired
from lightning_accel.projection import project_l1inf, radius_for_sparsity

# Shapes were written down before anything was tuned on them.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "MLP 784 x 300, rows": ((784, 300), (0,)),
    "MLP 784 x 300, columns": ((784, 300), (1,)),
    "encoder 100 x 1000, columns": ((100, 1_000), (1,)),
    "small layer 10 x 64, rows": ((10, 64), (0,)),
    "convolution stem 64 x 3 x 7 x 7, out-channels": ((64, 3, 7, 7), (0,)),
    "convolution stem 64 x 3 x 7 x 7, in-channels": ((64, 3, 7, 7), (1,)),
    "fused attention 3 x 12 x 64 x 768, heads": ((3, 12, 64, 768), (1,)),
    "convolution 512 x 512 x 3 x 3, kernel positions": ((512, 512, 3, 3), (2, 3)),
    "embedding 30522 x 768, rows": ((30_522, 768), (0,)),
    "embedding 30522 x 768, columns": ((30_522, 768), (1,)),
}
_SMALL = 1 << 18  # entries; of more, fewer pairs do


def against_plain_torch(*, quick: bool, clock: Callable[[], float]) -> Iterator[BenchRow]:
    """Yield for each shape how many times as fast an in-place projection is as the same in plain torch.

    Args:
        quick: A few pairs, and no tensor beyond 4 MiB.
        clock: Returns seconds.
    """
    for case, (shape, dims) in SHAPES.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if quick and x.numel() > 1 << 20:
            continue
        yield _row(case, x, dims, pairs=5 if quick else 201 if x.numel() < _SMALL else 21, clock=clock)


def _row(case: str, x: Tensor, dims: tuple[int, ...], *, pairs: int, clock: Callable[[], float]) -> BenchRow:
    radius, fresh = radius_for_sparsity(x, 0.5, dims), x.clone()
    ways = {
        "plain torch": lambda: plain_projection(x, radius, dims),
        "project_l1inf in place": lambda: project_l1inf(x, radius, dims, out=x, compile=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(pairs + 2):  # the first two start up and are not counted
        for name, run in ways.items():
            x.copy_(fresh)
            begin = clock()
            run()
            if pair > 1:
                seconds[name].append(clock() - begin)
    plain, ours = ways
    return BenchRow(
        suite="projection",
        case=case,
        variant=ours,
        baseline=plain,
        ratio=compare_paired(seconds[plain], seconds[ours]),
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        target=1.0,
        better="at least",
        note="plain torch: amax, sort, cumsum, clamp in place; clears half of the groups",
    )


def plain_projection(x: Tensor, radius: float, dims: tuple[int, ...]) -> Tensor:
    """Do what `project_l1inf` does, as few lines of torch would: without its promises on rounding, NaN and layouts."""
    rest = [d for d in range(x.ndim) if d not in dims]
    norms = x.abs().amax(rest, keepdim=True)
    ranked = norms.flatten().sort(descending=True).values
    tau = ((ranked.cumsum(0) - radius) / torch.arange(1, len(ranked) + 1)).amax().clamp_min(0.0)
    bounds = (norms - tau).clamp_min(0.0)
    return torch.clamp(x, -bounds, bounds, out=x)
