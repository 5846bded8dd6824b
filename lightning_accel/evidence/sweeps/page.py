"""The picture and the page of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_accel.evidence.page import embed, render_page
from lightning_accel.evidence.plots import COLOURS, MissingPackageError, save_for_page
from lightning_accel.evidence.sweeps.runs import Setting, SweepRun

_UNITS = {"samples_per_second": "training samples a second", "batches_per_second": "training batches a second"}


@dataclass(frozen=True)
class SweepReport:
    """What a page of a sweep shows.

    Attributes:
        runs: All runs, failed ones included.
        settings: Runs joined over seeds.
        metric: The metric that decides.
        mode: ``"max"`` or ``"min"``.
        speed: Name of the speed; ``None`` if none was logged.
        on_front: Names of settings on the Pareto front.
        near_front: Names of those that chance alone may keep off it.
        conclusion: One sentence.
        environment: Where it ran.
    """

    runs: Sequence[SweepRun]
    settings: Sequence[Setting]
    metric: str
    mode: str
    speed: str | None
    on_front: set[str]
    near_front: set[str]
    conclusion: str
    environment: Mapping[str, str | int]

    def mark(self, setting: Setting) -> str:
        """Return what the table says of a setting's place; of a lone setting nothing, there is no choice."""
        if len(self.settings) == 1:
            return ""
        return "*" if setting.name in self.on_front else "(*)" if setting.name in self.near_front else ""


def draw_trade_off(report: SweepReport, path: Path) -> None:
    """Draw the metric against the speed: a point a setting with its intervals, the front joined.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("pictures need matplotlib: pip install 'lightning-accel[examples]'.") from None
    assert report.speed is not None
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    points = [(s, s.speed) for s in report.settings if s.speed is not None]
    front = sorted((speed.mean, s.metric.mean) for s, speed in points if s.name in report.on_front)
    axes.plot(*zip(*front, strict=True), "-", color=COLOURS[0], linewidth=1.2, label="Pareto front")
    for setting, speed in points:
        colour = COLOURS[0] if setting.name in report.on_front else "#808080"
        axes.errorbar(
            speed.mean,
            setting.metric.mean,
            xerr=None if len(setting.jobs) == 1 else speed.half_width,
            yerr=None if len(setting.jobs) == 1 else setting.metric.half_width,
            fmt="o",
            color=colour,
            markerfacecolor="none" if setting.name in report.near_front else colour,
            capsize=2,
        )
        at = (speed.mean, setting.metric.mean)
        axes.annotate(",".join(setting.jobs), at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    seeds = max(len(setting.jobs) for setting in report.settings)
    axes.set_title(f"{len(report.settings)} settings, up to {seeds} seeds each; numbers are jobs", fontsize=10)
    axes.set_xlabel(_UNITS[report.speed])
    axes.set_ylabel(f"{report.metric} ({'higher' if report.mode == 'max' else 'lower'} is better)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    save_for_page(figure, path)


def write_sweep_page(report: SweepReport, path: Path, *, picture: Path | None) -> None:
    """Write one self-contained HTML page.

    Raises:
        MissingPackageError: Without jinja2.
    """
    render_page("sweep.html.j2", path, report=report, pictures=embed(picture))
