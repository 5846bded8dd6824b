"""Whether quality has been kept: a margin, fixed before the runs, that the interval must stay within."""

from lightning_accel.evidence.goal import Mode
from lightning_accel.measure import PairedDifference

DEFAULT_MARGIN = 0.005
NOT_SHOWN = "not shown"


def quality_verdict(difference: PairedDifference, mode: Mode, *, metric: str, margin: float) -> str:
    """Say what paired differences of a quality metric show.

    A difference that is not significant does not show equality: it may be that there were too few pairs. So quality
    counts as kept only if the whole interval lies above ``-margin`` (of a metric that is to be high).

    Args:
        difference: Candidate minus baseline.
        mode: Whether ``"max"`` or ``"min"`` is good.
        metric: Name of the metric; what speaks of accuracy is written in points.
        margin: Largest loss that still counts as none, in the metric's unit, >= 0.

    Returns:
        ``"better"``, ``"worse"``, ``"not worse than 0.5 points"``, ``"not shown"`` (to be within the margin), or
        ``"undecided"`` where there are too few pairs for the confidence.
    """
    verdict = difference.verdict
    if verdict == "undecided":
        return verdict
    gain, loss = ("higher", "lower") if mode == "max" else ("lower", "higher")
    if verdict == gain:
        return "better"
    worst = difference.low if mode == "max" else -difference.high
    if worst >= -margin:
        return f"not worse than {write_margin(margin, metric)}"
    return "worse" if verdict == loss else NOT_SHOWN


def write_margin(margin: float, metric: str) -> str:
    """Write a margin in the unit that readers of the metric use."""
    return f"{100.0 * margin:g} points" if "acc" in metric.lower() else f"{margin:g}"
