"""A row of the suite ``recurrent``: what ran in turns, its times, and what was chosen."""

import statistics
from collections.abc import Callable

from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired, time_interleaved
from lightning_accel.recurrent.module import Recurrent


def timed_row(  # noqa: PLR0917
    case: str,
    baseline: str,
    variant: str,
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    target: float | None,
    chosen: Callable[[], str] | None = None,
) -> BenchRow:
    """Run ``variants`` in turns, and compare two of them.

    Args:
        case: Of the row.
        baseline: The slower one, if all is well.
        variant: The one that is judged.
        variants: What runs, by name; those beside the two are told in the note.
        rounds: Of which each has a pair.
        device: They run on.
        target: For the ratio; None: none is set.
        chosen: Says which schedule ran, asked afterwards.
    """
    seconds = time_interleaved(variants, rounds=rounds, warmup=1, device=device)
    return BenchRow(
        suite="recurrent",
        case=case,
        variant=variant,
        baseline=baseline,
        ratio=compare_paired(seconds[baseline], seconds[variant]),
        seconds=medians(seconds),
        target=target,
        note=times_beside(seconds, baseline, variant, chosen),
    )


def chosen_by(layer: Recurrent) -> Callable[[], str]:
    """Return what says which schedule was chosen, once it was."""
    return lambda: f"chose {', '.join(sorted(set(layer.schedules[0].choices.values())))}"


def times_beside(seconds: dict[str, list[float]], baseline: str, variant: str, chosen: Callable[[], str] | None) -> str:
    """Write the times of what ran beside the two."""
    said = [] if chosen is None else [chosen()]
    others = {name: time for name, time in medians(seconds).items() if name not in (baseline, variant)}
    return "; ".join([*said, *(f"{name} {1e3 * time:.1f} ms" for name, time in others.items())])


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each."""
    return {name: statistics.median(times) for name, times in seconds.items()}
