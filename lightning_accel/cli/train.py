"""``lightning-accel train``: compose, fit, test, and say in a few lines what came out."""

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.fit import Run, best_checkpoint, build, fit
from lightning_accel.cli.results import save_configuration, save_metrics
from lightning_accel.cli.terminal import open_console


def train(cfg: DictConfig) -> float | None:
    """Train as composed and return ``cfg.optimized_metric``, for sweepers.

    Raises:
        UsageError: If ``cfg.optimized_metric`` was not logged.
    """
    folder = Path(cfg.paths.output_dir)
    run = build(cfg)
    if run.trainer.is_global_zero:
        save_configuration(cfg, folder)
    metrics = fit(run, ckpt_path=cfg.ckpt_path, test=cfg.test)
    if run.trainer.is_global_zero:
        save_metrics(metrics, list(HydraConfig.get().overrides.task), folder)
        _show(run, metrics, folder)
    return optimized(metrics, cfg.optimized_metric)


def optimized(metrics: dict[str, float], name: str | None) -> float | None:
    """Return the metric a sweeper asked for.

    Raises:
        UsageError: If it was not logged.
    """
    if name is None:
        return None
    if name not in metrics:
        from lightning_accel.cli.errors import did_you_mean

        raise UsageError(f"`optimized_metric` must be a logged metric, got {name}. {did_you_mean(name, metrics)}")
    return metrics[name]


def _show(run: Run, metrics: dict[str, float], folder: Path) -> None:
    console = open_console()
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    names = ", ".join(type(callback).__name__ for callback in run.accelerators)
    table.add_row("accelerators", names or "none")
    for name in sorted(metrics, key=lambda n: (n.endswith(("_seconds", "_second")), n)):
        table.add_row(name, f"{metrics[name]:.4g}")
    best = best_checkpoint(run.trainer)
    if best:
        table.add_row("checkpoint", os.path.relpath(best))
    table.add_row("results", os.path.relpath(folder))
    console.print(table)
