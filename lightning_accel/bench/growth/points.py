"""One point of a curve out of interleaved times."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

from lightning_accel.evidence.growth.curves import GrowthRow, write_size
from lightning_accel.measure import compare_paired

ENOUGH = 6  # pairs, of which a verdict takes no fewer


def point(
    core: str,
    curve: str,
    axis: str,
    size: float,
    seconds: Mapping[str, list[float]],
    *,
    cost: bool = False,
    setup_seconds: float | None = None,
    note: str = "",
) -> GrowthRow:
    """Return the point of a curve.

    Args:
        core: That was measured.
        curve: What grows and what does not.
        axis: What the size counts.
        size: > 0.
        seconds: Of each variant, interleaved; the first is the baseline, the second the variant.
        cost: Whether the variant does more than the baseline: the ratio is then its time over that of the baseline.
        setup_seconds: Spent once.
        note: For the reader.
    """
    baseline, variant, *_ = seconds
    pair = seconds[baseline], seconds[variant]
    return GrowthRow(
        suite="growth",
        case=f"{core}: {curve}: {write_size(size)} {axis}",
        variant=variant,
        baseline=baseline,
        ratio=compare_paired(*(pair[::-1] if cost else pair)),
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        better="at most" if cost else "at least",
        note=note,
        core=core,
        curve=curve,
        axis=axis,
        size=size,
        setup_seconds=setup_seconds,
    )


def time_prepared(
    candidates: Mapping[str, Callable[[], object]], prepare: Callable[[], object], *, rounds: int, budget_seconds: float
) -> dict[str, list[float]]:
    """Time callables in turns, in shuffled order, on a CPU; ``prepare`` runs before each call and is not timed.

    The first two rounds start up and are not counted.
    """
    order, rng = list(candidates), random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for done in range(rounds + 2):
        if done >= ENOUGH + 2 and time.perf_counter() - start > budget_seconds:
            break
        rng.shuffle(order)
        for name in order:
            prepare()
            begin = time.perf_counter()
            candidates[name]()
            taken = time.perf_counter() - begin
            if done > 1:
                found[name].append(taken)
    return found
