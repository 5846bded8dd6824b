"""``lightning-accel compare experiment=sae_synthetic``: feature selection by projection, instead of a race."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig
from rich.table import Table

from lightning_accel.callbacks.projection.l1inf_projection import L1InfProjection
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.fit import build
from lightning_accel.cli.results import cleaned, cleaned_override, save_configuration
from lightning_accel.cli.terminal import open_console
from lightning_accel.evidence.feature_selection.overhead import Overhead, measure_overhead
from lightning_accel.evidence.feature_selection.page import SelectionReport, write_selection_page
from lightning_accel.evidence.feature_selection.plots import plot_accuracy_against_features, plot_weights
from lightning_accel.evidence.feature_selection.study import (
    METHODS,
    PLAIN,
    MakeFit,
    Trained,
    headline,
    select_features,
    sparsest_without_loss,
    summarize,
    write_runs,
)
from lightning_accel.evidence.plots import MissingPackageError
from lightning_accel.measure import environment


def compare_selection(cfg: DictConfig) -> float:
    """Train without projection, with projections and controls at equal sparsity; print, draw and write what came out.

    Returns:
        How much higher the accuracy of the best projection is than that without.

    Raises:
        UsageError: If ``cfg.selection`` or ``cfg.compare.pairs`` is out of range.
    """
    settings = cfg.selection
    if not settings.sparsities or not all(0.0 < s < 1.0 for s in settings.sparsities):
        raise UsageError(f"`selection.sparsities` must be fractions in (0, 1), got {list(settings.sparsities)}.")
    epoch = settings.retrain_epoch
    if epoch is not None and not 0 < epoch < cfg.trainer.max_epochs:
        raise UsageError(
            f"`selection.retrain_epoch` must be in [1, {cfg.trainer.max_epochs - 1}], so that there is training before "
            f"and after, or null, got {epoch}. Change it or `trainer.max_epochs`."
        )
    if cfg.compare.pairs < 1:
        raise UsageError(f"`compare.pairs` must be an integer >= 1, got {cfg.compare.pairs}.")
    folder = Path(cfg.paths.output_dir)
    save_configuration(cfg, folder)
    console = open_console()
    make = _fits(cfg, folder)
    with _quiet(), _threads(cfg.compare.threads):
        trained: list[Trained] = []
        for seed in (cfg.seed + i for i in range(cfg.compare.pairs)):
            found = select_features(
                make,
                L1InfProjection,
                parameter=settings.parameter,
                sparsities=list(settings.sparsities),
                retrain_epoch=epoch,
                seeds=[seed],
            )
            trained += found
            accuracies = [f"{t.selection.accuracy:.3f}" for t in trained if t.selection.seed == seed]
            console.print(f"seed {seed}: test accuracies {', '.join(accuracies)}", markup=False, style="dim")
        runs = [t.selection for t in trained]
        written = [folder / "feature_selection.json"]
        write_runs(runs, written[0])
        overheads = list[Overhead]()
        try:
            overheads += measure_overhead(
                make, L1InfProjection, parameter=settings.parameter, sparsities=list(settings.sparsities), seed=cfg.seed
            )
        except ValueError as error:  # what the trainings found is worth showing all the same
            console.print(f"Time of a step is not measured: {error}", markup=False, style="yellow", soft_wrap=True)
        where = environment()
    report = SelectionReport(summarize(runs), overheads, runs, where, _settings(cfg))
    try:
        written += _draw(report, trained, folder)
    except MissingPackageError as error:
        console.print(f"Without {error}", markup=False, style="yellow", soft_wrap=True)
    console.print(selection_table(report, seeds=cfg.compare.pairs))
    console.print(headline(report.summaries), markup=False, style="bold", soft_wrap=True)
    for path in written:
        console.print(os.path.relpath(path), markup=False, style="dim", soft_wrap=True)
    plain = next(s for s in report.summaries if s.method == PLAIN)
    return max(s.accuracy[0] for s in report.summaries if s.method in METHODS) - plain.accuracy[0]


def selection_table(report: SelectionReport, *, seeds: int) -> Table:
    """Return the table of the study."""
    table = Table(title=f"Feature selection, {seeds} seed{'s' if seeds > 1 else ''}", box=None, pad_edge=False)
    for column in report.header:
        table.add_column(column.replace(" (", "\n("), justify="left" if column == "method" else "right", no_wrap=True)
    for row in report.rows(short=True):
        table.add_row(*row)
    return table


def _draw(report: SelectionReport, trained: Sequence[Trained], folder: Path) -> list[Path]:
    accuracy, weights, page = (folder / n for n in ("accuracy_against_features.png", "weights.png", "report.html"))
    plot_accuracy_against_features(report.summaries, accuracy)
    sparsity, seed = sparsest_without_loss(report.summaries), trained[0].selection.seed
    mine = [t for t in trained if t.selection.seed == seed and t.selection.sparsity in (0.0, sparsity)]
    shown = [t for t in mine if t.selection.method == PLAIN or t.selection.method in METHODS]
    when = {PLAIN: f"before ({PLAIN})"}
    titles = [
        f"{when.get(s.method, f'after {s.method}')}: {s.features:,} features, test accuracy {s.accuracy:.3f}"
        for s in (t.selection for t in shown)
    ]
    plot_weights(dict(zip(titles, (t.weight for t in shown), strict=True)), weights, informative=shown[0].informative)
    heading = f"Weights of the first layer before and after projection, {sparsity:.0%} cleared, seed {seed}"
    pictures = {"Accuracy against kept features": accuracy, heading: weights}
    write_selection_page(report, page, pictures=pictures)
    return [accuracy, weights, page]


def _fits(cfg: DictConfig, folder: Path) -> MakeFit:
    def make(seed: int, callbacks: Sequence[Callback]) -> tuple[Trainer, LightningModule, LightningDataModule]:
        mine = cfg.copy()
        mine.seed = seed
        run = build(
            mine, accelerators=False, monitoring=False, loggers=False, extra_callbacks=callbacks, root_dir=folder
        )
        if run.data is None:
            raise UsageError("There is no data to select features of: choose some, e.g. data=classification.")
        return run.trainer, run.model, run.data

    return make


def _settings(cfg: DictConfig) -> dict[str, str]:
    """Return what was compared, fit to be shown to anyone."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    epoch = cfg.selection.retrain_epoch
    once = f"once, when epoch {epoch} begins; zeros stay, the rest is trained anew from its initial values"
    settings = {
        "model": str(cfg.model.get("_target_", "")),
        "data": str((cfg.get("data") or {}).get("_target_", "")),
        "features": f"columns of {cfg.selection.parameter}",
        "projected": "after every step" if epoch is None else once,
        "epochs": str(cfg.trainer.get("max_epochs")),
        "command": " ".join(["lightning-accel compare", *map(cleaned_override, overrides)]),
    }
    return {name: str(cleaned(text)) for name, text in settings.items() if text}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what dozens of short fits say again and again."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_accel")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
