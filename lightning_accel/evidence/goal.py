"""The metric that judges quality, and the value a run has to reach."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_accel.evidence.runs import Run

Mode = Literal["max", "min"]

_OF_BASELINE = 0.98
_SMALL_IS_GOOD = ("loss", "error", "mse", "mae", "perplexity")


@dataclass(frozen=True)
class Goal:
    """The metric by which quality is judged, and the value a run has to reach.

    Attributes:
        metric: Its logged name.
        mode: Whether ``"max"`` or ``"min"`` is good.
        target: Value to reach.
        derived: Whether the target was derived from the baseline's runs.
    """

    metric: str
    mode: Mode
    target: float
    derived: bool = True

    def best(self, run: Run) -> float | None:
        """Return the best value on the run's curve; ``None`` if it holds none."""
        values = [v for p in run.curve if (v := p["metrics"].get(self.metric)) is not None]
        return (max if self.mode == "max" else min)(values, default=None)

    def seconds(self, run: Run) -> float:
        """Return the wall seconds until the run reached the target, set-up included; infinite if it never did."""
        for point in run.curve:
            value = point["metrics"].get(self.metric)
            if value is not None and (value >= self.target if self.mode == "max" else value <= self.target):
                return float(point["seconds"])
        return math.inf


def derive_goal(
    baseline: Sequence[Run], *, metric: str | None = None, mode: Mode | None = None, target: float | None = None
) -> Goal | None:
    """Choose metric and target from the baseline's runs where the user did not.

    The metric is the first that was logged of ``val/accuracy``, ``val_acc``, whatever has both "val" and "acc" in its
    name, ``val/loss`` and ``val_loss``. The target is 2 % short of the baseline's best (its median over runs):
    ``0.98 * best`` for a metric to maximize, ``best / 0.98`` for one to minimize (the other way round below 0).

    Args:
        baseline: Runs of the arm to beat, at least one.
        metric: Logged name.
        mode: By default ``"min"`` for names that speak of a loss or an error, else ``"max"``.
        target: Value to reach.

    Returns:
        ``None`` if ``metric`` is ``None`` and no run logged a metric that could serve.

    Raises:
        ValueError: If ``mode`` is neither ``"max"`` nor ``"min"``, or ``metric`` was not logged by all runs; the
            message names what was.
    """
    if mode not in (None, "max", "min"):
        raise ValueError(f"`mode` must be 'max' or 'min', got {mode!r}.")
    logged = set.intersection(*(_logged(run) for run in baseline))
    if metric is None:
        accuracies = sorted(name for name in logged if "val" in name and "acc" in name)
        usual = ["val/accuracy", "val_acc", *accuracies, "val/loss", "val_loss"]
        metric = next((name for name in usual if name in logged), None)
        if metric is None:
            return None
    if metric not in logged:
        names = ", ".join(sorted(logged)) or "none"
        raise ValueError(f"`metric` must be the name of a logged metric, got {metric!r}; logged were: {names}.")
    mode = mode or ("min" if any(word in metric.lower() for word in _SMALL_IS_GOOD) else "max")
    if target is not None:
        return Goal(metric, mode, target, derived=False)
    blank = Goal(metric, mode, 0.0)
    best = statistics.median(value for run in baseline if (value := blank.best(run)) is not None)
    factor = _OF_BASELINE if (mode == "max") == (best > 0.0) else 1.0 / _OF_BASELINE
    return Goal(metric, mode, best * factor)


def _logged(run: Run) -> set[str]:
    return {name for point in run.curve for name, value in point["metrics"].items() if value is not None}
