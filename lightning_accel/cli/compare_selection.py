"""``lightning-accel compare experiment=sae_synthetic``: feature selection by projection, instead of a race."""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.fit import build
from lightning_accel.cli.results import save_configuration
from lightning_accel.evidence.feature_selection import (
    PLAIN,
    Selection,
    Summary,
    plot_accuracy_against_features,
    plot_weights,
    select_features,
    summarize,
    write_runs,
)
from lightning_accel.evidence.plots import MissingPackageError


def compare_selection(cfg: DictConfig) -> float:
    """Train without projection, bi-level and exact at equal sparsity; print the table, write rows and pictures.

    Returns:
        How much higher the accuracy of the best projection is than that without.

    Raises:
        UsageError: If ``cfg.selection`` or ``cfg.compare.pairs`` is out of range.
    """
    settings = cfg.selection
    if not settings.sparsities or not all(0.0 < s < 1.0 for s in settings.sparsities):
        raise UsageError(f"`selection.sparsities` must be fractions in (0, 1), got {list(settings.sparsities)}.")
    if cfg.compare.pairs < 1:
        raise UsageError(f"`compare.pairs` must be an integer >= 1, got {cfg.compare.pairs}.")
    folder = Path(cfg.paths.output_dir)
    save_configuration(cfg, folder)
    console = Console(highlight=False)

    def make(seed: int, callbacks: Sequence[Callback]) -> tuple[Trainer, LightningModule, LightningDataModule]:
        mine = cfg.copy()
        mine.seed = seed
        run = build(
            mine, accelerators=False, monitoring=False, loggers=False, extra_callbacks=callbacks, root_dir=folder
        )
        if run.data is None:
            raise UsageError("There is no data to select features of: choose some, e.g. data=classification.")
        return run.trainer, run.model, run.data

    for name in ("lightning.pytorch", "lightning_accel"):  # dozens of short fits say the same
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    runs: list[Selection] = []
    weights: dict[tuple[str, float], Tensor] = {}
    for run, weight in select_features(
        make,
        parameter=settings.parameter,
        sparsities=list(settings.sparsities),
        retrain_epoch=settings.retrain_epoch,
        seeds=[cfg.seed + i for i in range(cfg.compare.pairs)],
    ):
        runs.append(run)
        weights.setdefault((run.method, run.sparsity), weight)
        text = f"{run.method}, {run.sparsity:.0%} cleared, seed {run.seed}: accuracy {run.accuracy:.3f}"
        console.print(text, markup=False, style="dim")
    summaries = summarize(runs)
    written = [folder / "feature_selection.json"]
    write_runs(runs, written[0])
    try:
        plot_accuracy_against_features(summaries, folder / "accuracy_against_features.png")
        shown = max((s for s in summaries if s.method != PLAIN), key=lambda s: s.accuracy[0])
        before, after = weights[PLAIN, 0.0], weights[shown.method, shown.sparsity]
        plot_weights(before, after, folder / "weights.png")
        written += [folder / "accuracy_against_features.png", folder / "weights.png"]
    except MissingPackageError as error:
        console.print(f"No picture: {error}", markup=False, style="dim", soft_wrap=True)
    console.print(selection_table(summaries, seeds=cfg.compare.pairs))
    for path in written:
        console.print(os.path.relpath(path), markup=False, style="dim", soft_wrap=True)
    plain = next(s for s in summaries if s.method == PLAIN)
    return max(s.accuracy[0] for s in summaries if s.method != PLAIN) - plain.accuracy[0]


def selection_table(summaries: Sequence[Summary], *, seeds: int) -> Table:
    """Return the table of the study."""
    table = Table(title=f"Feature selection, {seeds} seeds", box=None)
    for column in ("method", "cleared", "accuracy", "features", "informative", "step time"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for s in summaries:
        table.add_row(
            s.method,
            f"{s.sparsity:.0%}",
            f"{s.accuracy[0]:.3f} ± {s.accuracy[1]:.3f}",
            f"{s.features:.0f}",
            "" if s.informative is None else f"{s.informative:.1f}",
            f"{s.step.median:.2f} x",
        )
    return table
