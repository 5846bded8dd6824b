"""Points of curves of cost against a size, and the places where such a curve bends."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_accel.evidence.rows import BenchRow

KNEE = 0.5  # change of the slope, on logarithmic axes, from which on a curve is said to bend


@dataclass(frozen=True)
class GrowthRow(BenchRow):
    """One point of a curve: a row of a benchmark at one size.

    Attributes:
        core: Core that was measured; its curves share a picture.
        curve: What grows and what stays as it is, e.g. ``"width, MLP of 2 hidden layers"``.
        axis: What the size counts, e.g. ``"units a layer"``.
        size: Of this point, > 0.
        setup_seconds: What is spent once, before the first step at the variant's pace; ``None``: nothing is.
    """

    core: str = ""
    curve: str = ""
    axis: str = ""
    size: float = 1.0
    setup_seconds: float | None = None

    @property
    def steps_to_pay_back(self) -> float | None:
        """Steps after which the set-up is won back, infinite if never; ``None`` where no gain is meant."""
        if self.setup_seconds is None or self.better == "at most":
            return None
        gain = self.seconds[self.baseline] - self.seconds[self.variant]
        return math.ceil(self.setup_seconds / gain) if gain > 0.0 and self.ratio.verdict == "faster" else math.inf


@dataclass(frozen=True)
class Knee:
    """Where the cost of a variant bends.

    Attributes:
        variant: Whose.
        size: At which the slope changes.
        before: Slope up to it, on logarithmic axes: 1 is proportional to the size, 0 independent of it.
        after: Slope from it on.
    """

    variant: str
    size: float
    before: float
    after: float


def curves(rows: Iterable[GrowthRow]) -> list[list[GrowthRow]]:
    """Return the points curve by curve, in the order in which curves first appear, each by rising size."""
    found: dict[tuple[str, str], list[GrowthRow]] = {}
    for row in rows:
        found.setdefault((row.core, row.curve), []).append(row)
    return [sorted(points, key=lambda row: row.size) for points in found.values()]


def slopes(points: Sequence[GrowthRow], variant: str) -> list[float]:
    """Return the slope of a variant's seconds between neighbouring points, one fewer than there are points.

    Args:
        points: Of one curve, by rising size.
        variant: A name in every point's ``seconds``.

    Example:
        >>> from lightning_accel.evidence.growth.curves import GrowthRow, slopes
        >>> from lightning_accel.measure import compare_paired
        >>> def point(size, seconds):
        ...     ratio = compare_paired([seconds], [seconds])
        ...     return GrowthRow("growth", "case", "new", "old", ratio, {"new": seconds}, size=size)
        >>> slopes([point(10, 0.1), point(100, 1.0), point(1000, 1.0)], "new")
        [1.0, 0.0]
    """
    return [math.log(b.seconds[variant] / a.seconds[variant]) / math.log(b.size / a.size) for a, b in pairwise(points)]


def knees(points: Sequence[GrowthRow]) -> list[Knee]:
    """Return where the baseline or the variant of a curve bends by more than `KNEE`, by rising size."""
    found = []
    for name in (points[0].baseline, points[0].variant):
        steep = slopes(points, name)
        for point, before, after in zip(points[1:-1], steep[:-1], steep[1:], strict=True):
            if abs(after - before) > KNEE:
                found.append(Knee(name, point.size, before, after))
    return sorted(found, key=lambda knee: knee.size)


def conclusion(points: Sequence[GrowthRow]) -> str:
    """Say in a clause what a curve shows: where the variant pays, or what it costs at both ends."""
    first, last = points[0], points[-1]
    variant, baseline = first.variant, first.baseline
    if first.better == "at most":
        ends = (
            f"{first.ratio.median:.3g} times as long as {baseline} at {_counted(first)}, {last.ratio.median:.3g} times"
        )
        return f"{variant} takes {ends} at {write_size(last.size)}"
    faster = [point.ratio.verdict == "faster" for point in points]
    best = max(points, key=lambda point: point.ratio.median)
    peak = f"{best.ratio.median:.3g} times at {_counted(best)}"
    if all(faster):
        return f"{variant} is faster than {baseline} at every size, {peak}"
    if not any(faster):
        return f"{variant} is faster than {baseline} nowhere, at best {peak}"
    begin = faster.index(True)
    end = len(faster) - 1 - faster[::-1].index(True)
    if not all(faster[begin : end + 1]):
        sizes = ", ".join(write_size(point.size) for point, won in zip(points, faster, strict=True) if won)
        where = f"at {sizes}"
    elif end == len(faster) - 1:
        where = f"from {write_size(points[begin].size)} on"
    else:
        where = f"from {write_size(points[begin].size)} to {write_size(points[end].size)}"
    return f"{variant} is faster than {baseline} {where}, {peak}"


def _counted(point: GrowthRow) -> str:
    return f"{write_size(point.size)} {point.axis.removesuffix('s') if point.size == 1 else point.axis}"


def write_size(size: float) -> str:
    """Write a size with few digits, ``4,096``, ``100k``, ``30M``."""
    if size >= 1e6:
        return f"{size / 1e6:.3g}M"
    if size >= 1e4:
        return f"{size / 1e3:.3g}k"
    return f"{size:,.0f}" if size == round(size) else f"{size:g}"
