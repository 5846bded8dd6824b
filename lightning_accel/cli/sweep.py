"""What a sweep says at its end: a table of its runs, and which of them trade speed against the metric best."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_accel.cli.results import cleaned

_METRICS = ("test/accuracy", "val/accuracy", "test/loss", "val/loss", "train/loss")
_SPEEDS = ("samples_per_second", "batches_per_second")


@dataclass(frozen=True)
class SweepRun:
    """One job of a sweep.

    Attributes:
        job: Name of its folder.
        overrides: What the job was started with.
        metrics: What it logged; a number that was not finite is missing.
    """

    job: str
    overrides: tuple[str, ...]
    metrics: dict[str, float]


class SweepReport(Callback):
    """Hydra callback: when a sweep has ended, print its runs and write ``sweep.csv`` and ``trade_off.png``."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the folder that a sweeper may keep its own records in."""
        Path(config.paths.root_dir).mkdir(parents=True, exist_ok=True)
        _unfinished.append(config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Report on the folder of the sweep; a sweep without results stays silent."""
        _unfinished.clear()
        report(config)


_unfinished: list[DictConfig] = []  # Hydra tells no callback when a sweep fails or is interrupted


def report_unfinished() -> None:
    """Report on the jobs that had ended when their sweep failed or was interrupted."""
    while _unfinished:
        report(_unfinished.pop())


def report(config: DictConfig) -> None:
    """Print and write what the jobs of a sweep left in its folder."""
    folder = Path(config.hydra.sweep.dir)
    _clean_own_record(folder)
    runs = read_runs(folder)
    if not runs:
        return
    metric, mode = choose_metric(runs, config.get("optimized_metric"), config.get("optimized_mode", "max"))
    speed = next((name for name in _SPEEDS if all(name in run.metrics for run in runs)), None)
    best = pareto(runs, metric, mode, speed) if metric and speed else set()
    write_table(runs, folder / "sweep.csv")
    _show(runs, metric, speed, best)
    if metric and speed and draw(runs, metric, speed, best, folder / "trade_off.png"):
        Console().print(f"trade-off: {folder / 'trade_off.png'}", markup=False, soft_wrap=True)


def read_runs(folder: Path) -> list[SweepRun]:
    """Read ``metrics.json`` of every job of a sweep, in order of the job numbers."""
    runs = []
    for path in folder.glob("*/metrics.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: value for name, value in record["metrics"].items() if value is not None}
        runs.append(SweepRun(path.parent.name, tuple(record["overrides"]), metrics))
    return sorted(runs, key=lambda run: (len(run.job), run.job))


def choose_metric(runs: list[SweepRun], wanted: str | None, mode: str) -> tuple[str | None, str]:
    """Return the metric that all runs logged, the wanted one first, and which of it is best, ``"max"`` or ``"min"``."""
    if wanted is not None and all(wanted in run.metrics for run in runs):
        return wanted, mode
    found = next((name for name in _METRICS if all(name in run.metrics for run in runs)), None)
    return found, "min" if found is not None and found.endswith("loss") else "max"


def pareto(runs: list[SweepRun], metric: str, mode: str, speed: str) -> set[str]:
    """Return the jobs that no other job beats in speed without being worse in the metric, or the other way round."""
    sign = 1.0 if mode == "max" else -1.0
    points = {run.job: (run.metrics[speed], sign * run.metrics[metric]) for run in runs}

    def beaten(point: tuple[float, float]) -> bool:
        return any(p != point and p[0] >= point[0] and p[1] >= point[1] for p in points.values())

    return {job for job, point in points.items() if not beaten(point)}


def write_table(runs: list[SweepRun], path: Path) -> None:
    """Write one CSV line a run: job, overrides, every metric."""
    names = sorted({name for run in runs for name in run.metrics})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "overrides", *names])
        for run in runs:
            writer.writerow([run.job, " ".join(run.overrides), *(run.metrics.get(name, "") for name in names)])


def draw(runs: list[SweepRun], metric: str, speed: str, best: set[str], path: Path) -> bool:
    """Draw the metric against the speed, Pareto points joined; ``False`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    front = sorted((run.metrics[speed], run.metrics[metric]) for run in runs if run.job in best)
    axes.plot(*zip(*front, strict=True), "o-", color="tab:blue", label="Pareto")
    others = [run for run in runs if run.job not in best]
    axes.plot([r.metrics[speed] for r in others], [r.metrics[metric] for r in others], "o", color="0.6", label="others")
    for run in runs:
        axes.annotate(run.job, (run.metrics[speed], run.metrics[metric]), xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel(speed.replace("_", " "))
    axes.set_ylabel(metric)
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def _show(runs: list[SweepRun], metric: str | None, speed: str | None, best: set[str]) -> None:
    columns = [name for name in (metric, speed, "fit_seconds") if name is not None]
    shared = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    table = Table("job", "overrides", *columns, "Pareto" if best else "")
    for run in runs:
        own = " ".join(override for override in run.overrides if override not in shared)
        numbers = [f"{run.metrics[name]:.4g}" if name in run.metrics else "-" for name in columns]
        table.add_row(run.job, own, *numbers, "*" if run.job in best else "")
    Console(highlight=False).print(table)


def _clean_own_record(folder: Path) -> None:
    """Take what names this machine out of Hydra's own record of the sweep."""
    record = folder / "multirun.yaml"
    if record.exists():
        plain = OmegaConf.to_container(OmegaConf.load(record), resolve=False)
        if isinstance(plain, dict) and isinstance(plain.get("hydra"), dict):
            plain["hydra"].pop("runtime", None)
        record.write_text(OmegaConf.to_yaml(OmegaConf.create(cleaned(plain))), encoding="utf-8")  # type: ignore[call-overload]
