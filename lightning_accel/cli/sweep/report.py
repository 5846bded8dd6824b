"""What a sweep says at its end: a table of its settings, and which of them trade speed against the metric best."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_accel.cli.results import cleaned
from lightning_accel.cli.terminal import open_console
from lightning_accel.evidence.plots import MissingPackageError
from lightning_accel.evidence.summaries import write_sweep_summary
from lightning_accel.evidence.sweeps import page
from lightning_accel.evidence.sweeps.runs import (
    choose_metric,
    choose_speed,
    conclusion,
    diverged_as_failed,
    read_runs,
    settings_of,
    trade_off,
    write_table,
)


class SweepReport(Callback):
    """Hydra callback: when a sweep has ended, print its settings and write a table, a picture and a page."""

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
    from lightning_accel.measure import environment

    folder = Path(config.hydra.sweep.dir)
    _clean_own_record(folder)
    runs = read_runs(folder)
    if not runs:
        return
    console = open_console()
    metric, mode = choose_metric(runs, config.get("optimized_metric"), config.get("optimized_mode", "max"))
    runs = diverged_as_failed(runs, metric)
    write_table(runs, folder / "sweep.csv")
    for run in runs:
        if run.failure:
            console.print(f"job {run.job} failed: {run.failure}", markup=False, style="yellow", soft_wrap=True)
    if metric is None:
        console.print("The runs share no metric of training or validation to compare them by.", markup=False)
        return
    speed = choose_speed(runs)
    settings = settings_of(runs, metric, speed)
    if not settings:
        return
    on_front, near_front = trade_off(settings, mode)
    said = conclusion(settings, metric, mode)
    whole = page.SweepReport(runs, settings, metric, mode, speed, on_front, near_front, said, environment())
    _show(console, whole)
    console.print(said, markup=False, style="bold", soft_wrap=True)
    write_sweep_summary(whole, folder / "sweep.json")
    picture = None
    try:
        if speed is not None:
            picture = folder / "trade_off.png"
            page.draw_trade_off(whole, picture)
            console.print(f"trade-off: {picture}", markup=False, soft_wrap=True)
        page.write_sweep_page(whole, folder / "sweep.html", picture=picture)
        console.print(f"page: {folder / 'sweep.html'}", markup=False, soft_wrap=True)
    except MissingPackageError as error:
        console.print(f"Without {error}", markup=False, style="dim", soft_wrap=True)


def _show(console: Console, whole: page.SweepReport) -> None:
    """Print a row a setting, names whole: a name that is cut can not be given again."""
    table = Table("jobs", "", whole.metric, *([whole.speed.replace("_", " ")] if whole.speed else []), "Pareto")
    table.columns[1].overflow = "fold"
    table.columns[1].header = "setting"
    for setting in whole.settings:
        numbers = [str(setting.metric), *([str(setting.speed)] if whole.speed else [])]
        table.add_row(",".join(setting.jobs), setting.name, *numbers, whole.mark(setting))
    console.print(table)


def _clean_own_record(folder: Path) -> None:
    """Take what names this machine out of Hydra's own record of the sweep."""
    record = folder / "multirun.yaml"
    if record.exists():
        plain = OmegaConf.to_container(OmegaConf.load(record), resolve=False)
        if isinstance(plain, dict) and isinstance(plain.get("hydra"), dict):
            plain["hydra"].pop("runtime", None)
        record.write_text(OmegaConf.to_yaml(OmegaConf.create(cleaned(plain))), encoding="utf-8")  # type: ignore[call-overload]
