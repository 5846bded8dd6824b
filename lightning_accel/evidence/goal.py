"""The metric that judges quality, and the value a run has to reach."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_accel.evidence.measured_runs.runs import Run

Mode = Literal["max", "min"]

_OF_BASELINE = 0.98
_SMALL_IS_GOOD = ("loss", "error", "mse", "mae", "perplexity")
_RULE = re.compile(r"(?P<of>plain|pair)_best\s*(?:(?P<sign>[-+*])\s*(?P<number>\d+(?:\.\d*)?(?:e-?\d+)?))?")


@dataclass(frozen=True)
class Goal:
    """The metric by which quality is judged, and the value a run has to reach.

    Attributes:
        metric: Its logged name.
        mode: Whether ``"max"`` or ``"min"`` is good.
        target: Value to reach; with ``by_pair``, its median over pairs.
        derived: Whether the target was derived from the baseline's runs.
        by_pair: Pair to its own target; empty if there is one target for all.
        rule: How the target was found, in words.
    """

    metric: str
    mode: Mode
    target: float
    derived: bool = True
    by_pair: Mapping[int, float] = field(default_factory=dict)
    rule: str = ""

    def target_of(self, run: Run) -> float:
        """Return the value that ``run`` has to reach; the same for all runs of a pair."""
        return self.by_pair.get(run.pair, self.target)

    def best(self, run: Run) -> float | None:
        """Return the best value on the run's curve; ``None`` if it holds none."""
        values = [v for p in run.curve if (v := p["metrics"].get(self.metric)) is not None]
        return (max if self.mode == "max" else min)(values, default=None)

    def seconds(self, run: Run) -> float:
        """Return the wall seconds until the run reached its target, set-up included; infinite if it never did."""
        target = self.target_of(run)
        for point in run.curve:
            value = point["metrics"].get(self.metric)
            if value is not None and (value >= target if self.mode == "max" else value <= target):
                return float(point["seconds"])
        return math.inf

    @property
    def words(self) -> str:
        """What has to be reached, for a table; of targets by pair the median."""
        sign = ">=" if self.mode == "max" else "<="
        whose = "the pair's target, " if self.by_pair else ""
        return f"{self.metric} {sign} {whose}{self.target:.4g}"


@dataclass(frozen=True)
class TargetRule:
    """A target that is computed from the baseline's best values, so that no one picks it after seeing the runs.

    Attributes:
        of: ``"plain"``: one target for all, from the median over the baseline's runs. ``"pair"``: each pair has its
            own, from the baseline's run of that pair; for data whose difficulty changes with the seed.
        sign: ``"-"``, ``"+"`` or ``"*"``.
        number: In the metric's unit, or a factor.
    """

    of: Literal["plain", "pair"]
    sign: str = "*"
    number: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "TargetRule":
        """Read ``"plain_best-0.005"``, ``"pair_best*0.98"``, ``"plain_best"`` and the like.

        Raises:
            ValueError: If it is not written like that.
        """
        found = _RULE.fullmatch(text.strip())
        if found is None:
            raise ValueError(
                "`target` must be a number, or plain_best or pair_best with -, + or * and a number behind it, such as "
                f"plain_best-0.005, got {text!r}."
            )
        of: Literal["plain", "pair"] = "pair" if found["of"] == "pair" else "plain"
        return cls(of) if found["sign"] is None else cls(of, found["sign"], float(found["number"]))

    def of_best(self, best: float) -> float:
        """Return the target for a best value."""
        if self.sign == "*":
            return best * self.number
        return best + self.number if self.sign == "+" else best - self.number

    @property
    def words(self) -> str:
        """The rule, for a report."""
        whose = "the plain run of the same pair" if self.of == "pair" else "the plain runs (median)"
        change = "" if (self.sign, self.number) == ("*", 1.0) else f" {self.sign.replace('*', 'x')} {self.number:g}"
        return f"best value of {whose}{change}"


def derive_goal(
    baseline: Sequence[Run], *, metric: str | None = None, mode: Mode | None = None, target: float | str | None = None
) -> Goal | None:
    """Choose metric and target from the baseline's runs where the user did not.

    The metric is the first that was logged of ``val/accuracy``, ``val_acc``, whatever has both "val" and "acc" in its
    name, ``val/loss`` and ``val_loss``. The target is 2 % short of the baseline's best (its median over runs):
    ``0.98 * best`` for a metric to maximize, ``best / 0.98`` for one to minimize (the other way round below 0).

    Args:
        baseline: Runs of the arm to beat, at least one.
        metric: Logged name.
        mode: By default ``"min"`` for names that speak of a loss or an error, else ``"max"``.
        target: Value to reach, or a rule, see `TargetRule.parse`.

    Returns:
        ``None`` if ``metric`` is ``None`` and no run logged a metric that could serve.

    Raises:
        ValueError: If ``mode`` is neither ``"max"`` nor ``"min"``, ``target`` is neither a number nor a rule, or
            ``metric`` was not logged by all runs; the message names what was.
    """
    if mode not in (None, "max", "min"):
        raise ValueError(f"`mode` must be 'max' or 'min', got {mode!r}.")
    rule = TargetRule.parse(target) if isinstance(target, str) else None
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
    if isinstance(target, int | float):
        return Goal(metric, mode, target, derived=False, rule="a value given by the user")
    blank = Goal(metric, mode, 0.0)
    bests = {run.pair: value for run in baseline if (value := blank.best(run)) is not None}
    middle = statistics.median(bests.values())
    if rule is None:
        rule = TargetRule("plain", "*", _OF_BASELINE if (mode == "max") == (middle > 0.0) else 1.0 / _OF_BASELINE)
    if rule.of == "plain":
        return Goal(metric, mode, rule.of_best(middle), rule=rule.words)
    by_pair = {pair: rule.of_best(best) for pair, best in bests.items()}
    return Goal(metric, mode, statistics.median(by_pair.values()), by_pair=by_pair, rule=rule.words)


def _logged(run: Run) -> set[str]:
    return {name for point in run.curve for name, value in point["metrics"].items() if value is not None}
