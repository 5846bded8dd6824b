"""Runs of a sweep as they lie in its folder, and settings: runs that differ in their seed alone, as one point."""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# What a sweep is judged by without another wish. A metric of the test set is none: a setting that is chosen by it looks
# better than it is.
_METRICS = ("val/accuracy", "val/loss", "train/loss")
_SPEEDS = ("samples_per_second", "batches_per_second")
# 97.5 % points of Student's t for 1 to 10 degrees of freedom; beyond, 2.1 is close enough.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class SweepRun:
    """One job of a sweep.

    Attributes:
        job: Name of its folder.
        overrides: What the job was started with.
        metrics: What it logged; a number that was not finite is missing.
        failure: Why it failed; empty if it did not.
        not_finite: Names of the metrics whose numbers were not finite, as those of a training that diverged.
    """

    job: str
    overrides: tuple[str, ...]
    metrics: dict[str, float]
    failure: str = ""
    not_finite: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A mean with its noise.

    Attributes:
        mean: Over the seeds.
        half_width: Of the 95 % interval of the mean (Student's t); ``nan`` for one seed.
    """

    mean: float
    half_width: float

    def __str__(self) -> str:
        """Write ``0.912 ± 0.006``."""
        return f"{self.mean:.4g}" if math.isnan(self.half_width) else f"{self.mean:.4g} ± {self.half_width:.2g}"


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone.

    Attributes:
        name: The overrides that tell it from the others, whole.
        jobs: Names of its runs.
        metric: Of the metric that decides.
        speed: Of the speed; ``None`` if it was not logged.
    """

    name: str
    jobs: tuple[str, ...]
    metric: Estimate
    speed: Estimate | None


def read_runs(folder: Path) -> list[SweepRun]:
    """Read ``metrics.json`` or ``failed.json`` of every job of a sweep, in order of the job numbers."""
    runs = []
    for job in folder.glob("*/"):
        metrics, failed = job / "metrics.json", job / "failed.json"
        if metrics.exists():
            record = json.loads(metrics.read_text(encoding="utf-8"))
            values = {name: value for name, value in record["metrics"].items() if value is not None}
            not_finite = tuple(name for name in record["metrics"] if name not in values)
            runs.append(SweepRun(job.name, tuple(record["overrides"]), values, not_finite=not_finite))
        elif failed.exists():
            record = json.loads(failed.read_text(encoding="utf-8"))
            runs.append(SweepRun(job.name, tuple(record["overrides"]), {}, record["reason"]))
    return sorted(runs, key=lambda run: (len(run.job), run.job))


def choose_metric(runs: Sequence[SweepRun], wanted: str | None, mode: str) -> tuple[str | None, str]:
    """Return the metric that all runs logged, the wanted one first, and which of it is best, ``"max"`` or ``"min"``.

    A number that was not finite was logged as well: see `diverged_as_failed`.
    """
    whole = [{*run.metrics, *run.not_finite} for run in runs if not run.failure]
    if wanted is not None and all(wanted in logged for logged in whole):
        return wanted, mode
    found = next((name for name in _METRICS if whole and all(name in logged for logged in whole)), None)
    return found, "min" if found is not None and found.endswith("loss") else "max"


def diverged_as_failed(runs: Sequence[SweepRun], metric: str | None) -> list[SweepRun]:
    """Return the runs; those whose number of the metric that decides was not finite have failed: it has no rank."""
    diverged = [metric in run.not_finite and not run.failure for run in runs]
    reason = f"its {metric} is not a finite number."
    return [replace(run, failure=reason) if lost else run for run, lost in zip(runs, diverged, strict=True)]


def choose_speed(runs: Sequence[SweepRun]) -> str | None:
    """Return the speed that all runs logged."""
    whole = [run for run in runs if not run.failure]
    return next((name for name in _SPEEDS if whole and all(name in run.metrics for run in whole)), None)


def settings_of(runs: Sequence[SweepRun], metric: str, speed: str | None) -> list[Setting]:
    """Join the runs of each setting, in order of their first jobs."""
    whole = [run for run in runs if not run.failure]
    kinds: dict[tuple[str, ...], list[SweepRun]] = {}
    for run in whole:
        kinds.setdefault(tuple(o for o in run.overrides if not o.startswith("seed=")), []).append(run)
    shared = set.intersection(*(set(run.overrides) for run in runs)) if kinds else set()  # failed ones tell, too
    return [
        Setting(
            name=" ".join(o for o in overrides if o not in shared) or "all as given",
            jobs=tuple(run.job for run in group),
            metric=_estimate([run.metrics[metric] for run in group]),
            speed=None if speed is None else _estimate([run.metrics[speed] for run in group]),
        )
        for overrides, group in kinds.items()
    ]


def trade_off(settings: Sequence[Setting], mode: str) -> tuple[set[str], set[str]]:
    """Return the names of settings on the Pareto front, and of those that chance alone may keep off it.

    A setting is off the front if another is better in speed or metric by more than the noise, and in neither worse.
    What is beaten by its mean, but by no more than the noise, may belong to it. Settings of one seed have no known
    noise: their means decide.
    """
    points = [s for s in settings if s.speed is not None]
    on, perhaps = set(), set()
    for point in points:
        others = [other for other in points if other is not point]
        if not any(_beats(other, point, mode, beyond_noise=False) for other in others):
            on.add(point.name)
        elif not any(_beats(other, point, mode, beyond_noise=True) for other in others):
            perhaps.add(point.name)
    return on, perhaps


def conclusion(settings: Sequence[Setting], metric: str, mode: str) -> str:
    """Say in one sentence what the sweep shows of the metric."""
    sign = 1.0 if mode == "max" else -1.0
    ranked = sorted(settings, key=lambda s: -sign * s.metric.mean)
    best, rest = ranked[0], ranked[1:]
    if not rest:
        return f"One setting: {metric} {best.metric}."
    close = [s for s in rest if not _differs(best.metric, s.metric)]
    if len(best.jobs) == 1:
        return (
            f"Highest of one run each: {metric} {best.metric} by {best.name}; seeds would tell how far that is chance."
        )
    if not close:
        return f"Best beyond the noise: {metric} {best.metric} by {best.name}."
    fastest = max((s for s in [best, *close] if s.speed is not None), key=_speed_of, default=None)
    hint = f"; the fastest of them: {fastest.name}" if fastest is not None else ""
    return f"{metric} {best.metric} by {best.name}, from which {len(close)} more can not be told apart{hint}."


def write_table(runs: Sequence[SweepRun], path: Path) -> None:
    """Write one CSV line a run: job, overrides, every metric, why it failed."""
    names = sorted({name for run in runs for name in run.metrics})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "overrides", *names, "failure"])
        for run in runs:
            values = (run.metrics.get(name, "") for name in names)
            writer.writerow([run.job, " ".join(run.overrides), *values, run.failure])


def _estimate(values: Sequence[float]) -> Estimate:
    count = len(values)
    if count == 1:
        return Estimate(values[0], math.nan)
    student = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else 2.1
    return Estimate(statistics.fmean(values), student * statistics.stdev(values) / math.sqrt(count))


def _noise(a: Estimate, b: Estimate) -> float:
    noise = math.hypot(a.half_width, b.half_width)
    return 0.0 if math.isnan(noise) else noise


def _differs(a: Estimate, b: Estimate) -> bool:
    return abs(a.mean - b.mean) > _noise(a, b)


def _beats(other: Setting, point: Setting, mode: str, *, beyond_noise: bool) -> bool:
    """Say whether ``other`` is worse in nothing and better in something."""
    sign = 1.0 if mode == "max" else -1.0
    assert other.speed is not None
    assert point.speed is not None
    gains = (sign * (other.metric.mean - point.metric.mean), other.speed.mean - point.speed.mean)
    if min(gains) < 0.0:
        return False
    if not beyond_noise:
        return max(gains) > 0.0
    return gains[0] > _noise(other.metric, point.metric) or gains[1] > _noise(other.speed, point.speed)


def _speed_of(setting: Setting) -> float:
    assert setting.speed is not None
    return setting.speed.mean
