"""What two arms' runs say about each other: a table of metrics and one verdict."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_accel.evidence.goal import Goal, Mode
from lightning_accel.evidence.measured_runs.runs import Run
from lightning_accel.evidence.measured_runs.step_clock import PHASES
from lightning_accel.evidence.non_inferiority import DEFAULT_MARGIN, quality_verdict
from lightning_accel.measure import PairedDifference, PairedRatio, compare_paired, subtract_paired

Unit = Literal["seconds", "bytes", "count", "per second", "metric", "joules"]


@dataclass(frozen=True)
class Line:
    """One metric of a comparison.

    Attributes:
        name: Of the metric.
        unit: How to write the two values.
        baseline: Median of the baseline arm; infinite if a target was not reached.
        candidate: Median of the other arm.
        ratio: Of costs baseline / candidate, of throughput candidate / baseline: over 1 the candidate is better.
        difference: For quality metrics, candidate - baseline, in place of ``ratio``.
        verdict: In words.
    """

    name: str
    unit: Unit
    baseline: float
    candidate: float
    ratio: PairedRatio | None
    difference: PairedDifference | None
    verdict: str


@dataclass(frozen=True)
class Money:
    """What a saving is worth.

    Attributes:
        price_per_hour: Of one device.
        currency: Its name.
        baseline_hours: Device-hours of one fit of the baseline.
        candidate_hours: Device-hours of one fit of the candidate.
    """

    price_per_hour: float
    currency: str
    baseline_hours: float
    candidate_hours: float

    @property
    def saved_per_hour(self) -> float:
        """Price saved for every device-hour that the baseline would take; negative if the candidate costs more."""
        return self.price_per_hour * (1.0 - self.candidate_hours / self.baseline_hours)


@dataclass(frozen=True)
class Comparison:
    """A candidate arm against a baseline arm.

    Attributes:
        baseline: Name of the arm.
        candidate: Name of the arm.
        pairs: Number of pairs.
        lines: The first one, the wall time of the fit, decides.
        goal: What time-to-target refers to; ``None`` if no metric was logged.
        headline: Verdict in one sentence.
        money: ``None`` without a price.
    """

    baseline: str
    candidate: str
    pairs: int
    lines: tuple[Line, ...]
    goal: Goal | None
    headline: str
    money: Money | None

    @property
    def fit(self) -> Line:
        """The line that decides."""
        return self.lines[0]

    def to_dict(self) -> dict[str, object]:
        """Return plain data for JSON; infinite values become ``None``."""
        return _without_infinities({**dataclasses.asdict(self), "verdict": self.fit.verdict})


def compare_runs(
    runs: Mapping[str, Sequence[Run]],
    baseline: str,
    candidate: str,
    *,
    goal: Goal | None,
    price_per_hour: float | None = None,
    currency: str = "EUR",
    confidence: float = 0.95,
    margin: float = DEFAULT_MARGIN,
) -> Comparison:
    """Compare two arms pair by pair.

    Args:
        runs: Arm to runs; index i of two arms makes a pair.
        baseline: Name of the arm to beat.
        candidate: Name of the other one.
        goal: See `derive_goal`.
        price_per_hour: Of one device, >= 0.
        currency: Of the price.
        confidence: Of the intervals, in (0, 1).
        margin: Largest loss of the goal's metric that counts as none, in its unit, >= 0.

    Raises:
        ValueError: If there is no pair, or the price or the margin is negative.
    """
    old, new = runs[baseline], runs[candidate]
    if not old or len(old) != len(new):
        raise ValueError(f"`runs` must hold complete pairs, got {len(old)} and {len(new)} runs.")
    if price_per_hour is not None and price_per_hour < 0.0:
        raise ValueError(f"`price_per_hour` must be >= 0, got {price_per_hour}.")
    if margin < 0.0:
        raise ValueError(f"`margin` must be >= 0, got {margin}.")
    table = _Table(old, new, confidence, margin)
    lines = [
        table.cost("fit, wall clock", "seconds", lambda run: run.fit_seconds, timed=True),
        table.cost("fit, CPU time", "seconds", lambda run: run.cpu_seconds, timed=True),
        table.cost("until the first step", "seconds", lambda run: run.setup_seconds, timed=True),
        table.cost("callbacks, whole fit", "seconds", lambda run: run.callback_seconds, timed=True),
        table.cost("training step", "seconds", lambda run: run.step_seconds, timed=True),
        *(
            table.cost(f"  {phase}", "seconds", lambda run, p=phase: run.phase_seconds.get(p), timed=True)  # type: ignore[misc]
            for phase in PHASES
        ),
        table.cost("samples", "per second", lambda run: run.samples_per_second, timed=True, inverse=True),
    ]
    if goal is not None:
        lines.append(table.cost(f"until {goal.words}", "seconds", goal.seconds, timed=True))
        final = lambda run: run.metrics.get(goal.metric)  # noqa: E731  # as the others in this list
        lines.append(table.quality(f"best {goal.metric}", goal.best, goal.mode))
        lines.append(table.quality(f"final {goal.metric}", final, goal.mode))
    lines += [
        table.cost("parameters", "count", lambda run: run.parameters),
        table.operations(),
        table.cost("peak memory", "bytes", lambda run: run.peak_memory_bytes),
        table.cost("energy", "joules", lambda run: run.energy_joules),
        table.cost("checkpoint", "bytes", lambda run: run.checkpoint_bytes),
    ]
    present = tuple(line for line in lines if line is not None)
    money = None
    if price_per_hour is not None:
        hours = [statistics.median(run.fit_seconds * run.devices for run in arm) / 3600.0 for arm in (old, new)]
        money = Money(price_per_hour, currency, *hours)
    return Comparison(
        baseline=baseline,
        candidate=candidate,
        pairs=len(old),
        lines=present,
        goal=goal,
        headline=headline(baseline, candidate, present, goal),
        money=money,
    )


def speed_verdict(ratio: PairedRatio) -> str:
    """Put a paired time ratio into words: an interval that covers 1 is no speed-up."""
    return {"no difference": "no speed-up"}.get(ratio.verdict, ratio.verdict)


def headline(baseline: str, candidate: str, lines: Sequence[Line], goal: Goal | None) -> str:
    """Say what was found: how soon the target is reached and whether quality is kept, then how long the fit takes."""
    target = next((line for line in lines if goal is not None and line.name == f"until {goal.words}"), None)
    quality = next((line for line in lines if goal is not None and line.name == f"final {goal.metric}"), None)
    whole = _fit_sentence(baseline, candidate, lines[0])
    if goal is None or target is None or target.ratio is None or target.verdict in ("", "undecided"):
        return whole
    ratio = target.ratio
    words = {"faster": "shorter", "slower": "longer"}.get(target.verdict, "no shorter")
    interval = f"ratio {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    kept = f"; final {goal.metric} {quality.verdict}" if quality is not None else ""
    return f"Time until {goal.words}: {words} than {baseline}'s, {interval}{kept}. {whole}"


def _fit_sentence(baseline: str, candidate: str, line: Line) -> str:
    ratio = line.ratio
    assert ratio is not None
    interval = f"{ratio.confidence:.0%} interval {ratio.low:.2f} to {ratio.high:.2f}, {write_pairs(ratio.pairs)}"
    subject = candidate[:1].upper() + candidate[1:]
    if line.verdict == "undecided":
        too_few = f"{write_pairs(ratio.pairs)} {'is' if ratio.pairs == 1 else 'are'} too few"
        return (
            f"Undecided: {too_few} for {ratio.confidence:.0%} confidence, take at least 6. Seen so far: {candidate} "
            f"takes {1 / ratio.median:.2f} times as long as {baseline}."
        )
    if line.verdict == "no speed-up":
        return f"No speed-up: {candidate}, compared with {baseline}, is {ratio.median:.2f} times as fast ({interval})."
    if line.verdict == "faster":
        return f"{subject} is {ratio.median:.2f} times as fast as {baseline} ({interval})."
    return f"{subject} is slower than {baseline}: {ratio.median:.2f} times as fast ({interval})."


def write_pairs(count: int) -> str:
    """Return ``"1 pair"``, ``"2 pairs"`` and so on."""
    return f"{count} pair{'' if count == 1 else 's'}"


class _Table:
    """Makes lines from the runs of two arms; a metric that either arm lacks makes none."""

    def __init__(self, old: Sequence[Run], new: Sequence[Run], confidence: float, margin: float) -> None:
        self._old, self._new, self._confidence, self._margin = old, new, confidence, margin

    def cost(
        self, name: str, unit: Unit, of: Callable[[Run], float | None], *, timed: bool = False, inverse: bool = False
    ) -> Line | None:
        old, new = self._pairs(of)
        if not old:
            return None
        if min(*old, *new) <= 0.0:
            ratio, verdict = None, ""
        else:
            ratio = compare_paired(*((new, old) if inverse else (old, new)), confidence=self._confidence)
            words = {"faster": "less", "slower": "more", "no difference": "no difference"}
            verdict = speed_verdict(ratio) if timed else words.get(ratio.verdict, ratio.verdict)
            if not timed and old == new:
                verdict = "equal"
        return Line(name, unit, statistics.median(old), statistics.median(new), ratio, None, verdict)

    def quality(self, name: str, of: Callable[[Run], float | None], mode: Mode) -> Line | None:
        old, new = self._pairs(of)
        if not old:
            return None
        difference = subtract_paired(old, new, confidence=self._confidence)
        verdict = quality_verdict(difference, mode, metric=name, margin=self._margin)
        return Line(name, "metric", statistics.median(old), statistics.median(new), None, difference, verdict)

    def operations(self) -> Line | None:
        """Compare counts, which one run an arm has."""
        counts = [[run.flops for run in runs if run.flops] for runs in (self._old, self._new)]
        if not all(counts):
            return None
        old, new = (statistics.median(arm) for arm in counts)
        verdict = "equal" if old == new else "less" if new < old else "more"
        ratio = PairedRatio(old / new, old / new, old / new, p_value=1.0, pairs=len(self._old))
        return Line("FLOP a step", "count", old, new, ratio, None, verdict)

    def _pairs(self, of: Callable[[Run], float | None]) -> tuple[list[float], list[float]]:
        values = [(of(a), of(b)) for a, b in zip(self._old, self._new, strict=True)]
        both = [(a, b) for a, b in values if a is not None and b is not None]
        return [a for a, _ in both], [b for _, b in both]


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
