"""Curves of cost against size, length, depth and number of workers, what is spent once beside each gain.

Every point is interleaved as in the other suites. Where a curve bends is marked in the tables and pictures; the cards
of the cores say why.
"""

import importlib
from collections.abc import Iterator, Sequence

from lightning_accel.evidence.growth.curves import GrowthRow

CORES = ("low_rank", "projection", "recurrent", "async_sgd")


def rows(*, quick: bool, device: str, growth_of: Sequence[str] = CORES) -> Iterator[GrowthRow]:
    """Yield the points of all curves, core by core: about eight minutes on two cores.

    Args:
        quick: Two small sizes a curve, to see that it runs.
        device: To run on.
        growth_of: The cores, of `CORES`.

    Raises:
        ValueError: If one of ``growth_of`` is no core.
    """
    unknown = sorted(set(growth_of) - set(CORES))
    if unknown:
        raise ValueError(f"`growth_of` must name cores of {', '.join(CORES)}, got {', '.join(unknown)}.")
    for core in growth_of:
        yield from importlib.import_module(f"lightning_accel.bench.growth.{core}").rows(quick=quick, device=device)
