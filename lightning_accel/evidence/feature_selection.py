"""The papers' experiment: how well a model classifies with few input features, and which features those are."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_accel.callbacks.l1inf_projection import L1InfProjection
from lightning_accel.evidence.plots import MissingPackageError
from lightning_accel.measure import PairedRatio, compare_paired

METHODS = ("bilevel", "exact")
PLAIN = "no projection"

MakeFit = Callable[[int, Sequence[Callback]], tuple[Trainer, LightningModule, LightningDataModule]]


@dataclass(frozen=True)
class Selection:
    """One training.

    Attributes:
        method: ``"no projection"``, ``"bilevel"`` or ``"exact"``.
        sparsity: Fraction of the features to clear, in [0, 1].
        seed: Of model and data.
        accuracy: On the test samples, in [0, 1].
        features: That kept a weight.
        informative: Of those, how many the class depends on; ``None`` where nobody knows.
        step_seconds: Median of a training step.
    """

    method: str
    sparsity: float
    seed: int
    accuracy: float
    features: int
    informative: int | None
    step_seconds: float


class _StepClock(Callback):
    """Take the time of each training step, its optimizer step and projection included."""

    def __init__(self) -> None:
        self.begin, self.seconds = 0.0, list[float]()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.begin)


def select_features(
    make: MakeFit, *, parameter: str, sparsities: Sequence[float], retrain_epoch: int, seeds: Sequence[int]
) -> Iterator[tuple[Selection, Tensor]]:
    """Train with every method at every sparsity under every seed; yield what came out and the selecting weights.

    As in the papers: train, project the columns of the first weight once, keep the zeros, rewind the rest to its
    initial values and train on. Methods are compared at equal sparsity, for equal radii mean different things.

    Args:
        make: Builds trainer, model and data for a seed, with callbacks.
        parameter: Name of the weight whose columns are the features.
        sparsities: Fractions of the features to clear, in [0, 1].
        retrain_epoch: Epoch (from 0) that begins with the projection.
        seeds: One training of each kind a seed.
    """
    for seed in seeds:
        yield _train(make, [], parameter=parameter, seed=seed, method=PLAIN, sparsity=0.0)
        for sparsity in sparsities:
            for method in METHODS:
                projection = L1InfProjection(
                    target_sparsity=sparsity,
                    parameters=parameter,
                    groups="columns",
                    method="exact" if method == "exact" else "bilevel",
                    mode="project_then_retrain",
                    retrain_epoch=retrain_epoch,
                    rewind="init",
                )
                yield _train(make, [projection], parameter=parameter, seed=seed, method=method, sparsity=sparsity)


def _train(
    make: MakeFit, callbacks: Sequence[Callback], *, parameter: str, seed: int, method: str, sparsity: float
) -> tuple[Selection, Tensor]:
    clock = _StepClock()
    trainer, model, data = make(seed, [*callbacks, clock])
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    weight = model.get_parameter(parameter).detach().cpu().clone()
    kept = torch.nonzero((weight != 0).any(0))[:, 0].tolist()
    informative = getattr(data, "informative", None)
    found = None if informative is None else len(set(kept) & set(informative.tolist()))
    accuracy = float(result["test/accuracy"])
    return Selection(method, sparsity, seed, accuracy, len(kept), found, statistics.median(clock.seconds)), weight


@dataclass(frozen=True)
class Summary:
    """All seeds of one method at one sparsity: means, and standard deviations where more than one seed ran.

    Attributes:
        method: As in `Selection`.
        sparsity: As in `Selection`.
        accuracy: Mean and standard deviation.
        features: Mean.
        informative: Mean; ``None`` where nobody knows.
        step: Median step time over that without projection, paired by seed.
    """

    method: str
    sparsity: float
    accuracy: tuple[float, float]
    features: float
    informative: float | None
    step: PairedRatio


def summarize(runs: Sequence[Selection]) -> list[Summary]:
    """Summarize the seeds of each method and sparsity, in the order of their first run.

    Raises:
        ValueError: If a seed has no run without projection to compare with.
    """
    plain = {run.seed: run for run in runs if run.method == PLAIN}
    missing = {run.seed for run in runs} - set(plain)
    if missing:
        raise ValueError(f"`runs` must hold a run without projection for every seed, got none for {sorted(missing)}.")
    summaries = []
    for method, sparsity in dict.fromkeys((run.method, run.sparsity) for run in runs):
        mine = [run for run in runs if (run.method, run.sparsity) == (method, sparsity)]
        accuracies = [run.accuracy for run in mine]
        spread = statistics.stdev(accuracies) if len(mine) > 1 else 0.0
        known = [run.informative for run in mine if run.informative is not None]
        summaries.append(
            Summary(
                method=method,
                sparsity=sparsity,
                accuracy=(statistics.fmean(accuracies), spread),
                features=statistics.fmean(run.features for run in mine),
                informative=statistics.fmean(known) if known else None,
                step=compare_paired([r.step_seconds for r in mine], [plain[r.seed].step_seconds for r in mine]),
            )
        )
    return summaries


def write_runs(runs: Sequence[Selection], path: Path) -> None:
    """Write the runs as JSON."""
    path.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n", encoding="utf-8")


def plot_accuracy_against_features(summaries: Sequence[Summary], path: Path) -> None:
    """Draw mean accuracy, with its spread, against the number of kept features.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    figure, axes = _figure(1)
    for method in dict.fromkeys(s.method for s in summaries):
        mine = sorted((s for s in summaries if s.method == method), key=lambda s: s.features)
        means, spreads = [s.accuracy[0] for s in mine], [s.accuracy[1] for s in mine]
        axes[0].errorbar([s.features for s in mine], means, yerr=spreads, marker="o", capsize=3, label=method)
    axes[0].set(xscale="log", xlabel="features kept", ylabel="test accuracy", title="Accuracy against kept features")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def plot_weights(before: Tensor, after: Tensor, path: Path) -> None:
    """Draw the magnitudes of a weight (units, features) without and with projection, features sorted by the latter.

    Raises:
        MissingPackageError: Without matplotlib.
    """
    figure, axes = _figure(2)
    order = after.abs().amax(0).argsort(descending=True)
    top = float(max(before.abs().max(), after.abs().max()))
    for axis, weight, title in zip(axes, (before, after), ("no projection", "projected and retrained"), strict=True):
        image = axis.imshow(weight.abs()[:, order].numpy(), aspect="auto", vmin=0.0, vmax=top, interpolation="nearest")
        axis.set(title=title, xlabel="feature, sorted", ylabel="hidden unit")
    figure.colorbar(image, ax=axes, label="magnitude of the weight")
    figure.savefig(path, dpi=120)


def _figure(columns: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("pictures need matplotlib: pip install 'lightning-accel[examples]'") from None
    figure = Figure(figsize=(6.0 * columns, 4.0), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
