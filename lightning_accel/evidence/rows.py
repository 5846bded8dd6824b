"""The row of a micro-benchmark table."""

from dataclasses import dataclass, field
from typing import Literal

from lightning_accel.measure import PairedRatio


@dataclass(frozen=True)
class BenchRow:
    """One measured line of ``lightning-accel bench``.

    Attributes:
        suite: Core that was measured, e.g. ``"low_rank"``.
        case: What was run, with shapes, e.g. ``"MLP 4x1024, batch 64, training step"``.
        variant: What was measured against ``baseline``, e.g. ``"knapsack + sequential freezing"``.
        baseline: Name of the peer.
        ratio: Times faster than the baseline; for ``better="at most"`` times the baseline's time.
        seconds: Median seconds of every variant that ran interleaved in this case.
        target: Ratio to reach, if one was set.
        better: Whether the ratio should be ``"at least"`` or ``"at most"`` the target.
        note: What a reader must know to judge the row.
    """

    suite: str
    case: str
    variant: str
    baseline: str
    ratio: PairedRatio
    seconds: dict[str, float] = field(default_factory=dict)
    target: float | None = None
    better: Literal["at least", "at most"] = "at least"
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Say whether the median meets the target; ``None`` without one."""
        if self.target is None:
            return None
        return self.ratio.median >= self.target if self.better == "at least" else self.ratio.median <= self.target
