"""Whether something that anyone can do without this package is all that the user needs."""

from collections.abc import Sequence

from lightning_accel.evidence.comparison import Comparison


def advise(comparisons: Sequence[Comparison], alternatives: Sequence[Comparison]) -> str:
    """Say in one sentence how the accelerators stand against the free alternatives; empty without alternatives.

    Args:
        comparisons: Of the accelerated arm with every other arm.
        alternatives: Of every other arm with the plain one.
    """
    if not alternatives:
        return ""
    against = {comparison.baseline: comparison for comparison in comparisons}
    good = [found for found in alternatives if found.fit.verdict == "faster" and not _loses_quality(found)]
    if not good:
        return "No free alternative makes the plain run faster and keeps its quality."
    best = max(good, key=_speed)
    own = against[best.candidate]
    gain = f"{best.candidate} alone is {_speed(best):.2f} times as fast as plain"
    if own.fit.verdict == "faster" and not _loses_quality(own):
        return f"{gain}; the accelerators are {_speed(own):.2f} times as fast as that."
    return f"{gain}, and the accelerators are not shown to be better than that: it is all that this run needs."


def _speed(comparison: Comparison) -> float:
    assert comparison.fit.ratio is not None
    return comparison.fit.ratio.median


def _loses_quality(comparison: Comparison) -> bool:
    lines = [line for line in comparison.lines if line.difference is not None and line.name.startswith("final ")]
    return any(line.verdict in ("worse", "not shown") for line in lines)
