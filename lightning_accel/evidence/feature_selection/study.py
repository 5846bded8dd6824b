"""The papers' experiment: how well a model classifies with few input features, and which features those are."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_accel.evidence.feature_selection.controls import RankedColumns, Ranking
from lightning_accel.measure import PairedDifference, subtract_paired

PLAIN = "no projection"
METHODS: dict[str, Literal["bilevel", "exact"]] = {"bi-level": "bilevel", "exact": "exact"}
KEPT_WEIGHTS = "not rewound"  # bi-level; what is left of the weights after the projection trains on
CONTROLS: dict[str, Ranking] = {"magnitude": "magnitude", "random": "random"}

MakeFit = Callable[[int, Sequence[Callback]], tuple[Trainer, LightningModule, LightningDataModule]]
MakeProjection = Callable[..., Callback]  # `L1InfProjection`, or what takes its arguments


@dataclass(frozen=True)
class Selection:
    """One training.

    Attributes:
        method: ``"no projection"``, one of `METHODS` or of `CONTROLS`, or `KEPT_WEIGHTS`.
        sparsity: Fraction of the features to clear, in [0, 1].
        seed: Of model and data.
        accuracy: On the test samples, in [0, 1].
        features: That kept a weight.
        informative: Of those, how many the class depends on; ``None`` where nobody knows.
    """

    method: str
    sparsity: float
    seed: int
    accuracy: float
    features: int
    informative: int | None


@dataclass(frozen=True)
class Trained:
    """A training and what it left.

    Attributes:
        selection: What came out.
        weight: Whose columns are the features, ``(units, features)``.
        informative: Indices of the features that the class depends on; ``None`` where nobody knows.
    """

    selection: Selection
    weight: Tensor
    informative: Tensor | None


def select_features(
    make: MakeFit,
    project: MakeProjection,
    *,
    parameter: str,
    sparsities: Sequence[float],
    retrain_epoch: int | None,
    seeds: Sequence[int],
) -> Iterator[Trained]:
    """Train with every method at every sparsity under every seed; yield what came out.

    As in the papers: train, project the columns of the first weight once, keep the zeros, rewind the rest to its
    initial values and train on. Of the projection that keeps a mask only, and any ranking of the columns gives one; so
    the same is done with the columns of the largest norms and with random ones. Where the projected weights themselves
    are used (`KEPT_WEIGHTS`), nothing is rewound. Methods are compared at equal sparsity, for equal radii mean
    different things.

    Args:
        make: Builds trainer, model and data for a seed, with callbacks.
        project: Builds the callback that projects.
        parameter: Name of the weight whose columns are the features.
        sparsities: Fractions of the features to clear, in [0, 1].
        retrain_epoch: Epoch (from 0) that begins with the projection; ``None``: project after every step instead, and
            train nothing anew.
        seeds: One training of each kind a seed.
    """
    for seed in seeds:
        yield _train(make, [], parameter=parameter, seed=seed, method=PLAIN, sparsity=0.0)
        for sparsity in sparsities:
            for name, method in METHODS.items():
                projection = project(
                    target_sparsity=sparsity,
                    parameters=parameter,
                    groups="columns",
                    method=method,
                    mode="project" if retrain_epoch is None else "project_then_retrain",
                    retrain_epoch=retrain_epoch,
                    rewind="none" if retrain_epoch is None else "init",
                )
                yield _train(make, [projection], parameter=parameter, seed=seed, method=name, sparsity=sparsity)
            if retrain_epoch is None:
                continue
            kept = project(
                target_sparsity=sparsity,
                parameters=parameter,
                groups="columns",
                mode="project_then_retrain",
                retrain_epoch=retrain_epoch,
            )
            yield _train(make, [kept], parameter=parameter, seed=seed, method=KEPT_WEIGHTS, sparsity=sparsity)
            for name, ranking in CONTROLS.items():
                control = RankedColumns(parameter, sparsity, retrain_epoch, ranking, seed)
                yield _train(make, [control], parameter=parameter, seed=seed, method=name, sparsity=sparsity)


def _train(
    make: MakeFit, callbacks: Sequence[Callback], *, parameter: str, seed: int, method: str, sparsity: float
) -> Trained:
    trainer, model, data = make(seed, callbacks)
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)
    weight = model.get_parameter(parameter).detach().cpu().clone()
    kept = torch.nonzero((weight != 0).any(0))[:, 0].tolist()
    informative = getattr(data, "informative", None)
    found = None if informative is None else len(set(kept) & set(informative.tolist()))
    accuracy = float(result["test/accuracy"])
    return Trained(Selection(method, sparsity, seed, accuracy, len(kept), found), weight, informative)


@dataclass(frozen=True)
class Summary:
    """All seeds of one method at one sparsity: means, and standard deviations where more than one seed ran.

    Attributes:
        method: As in `Selection`.
        sparsity: As in `Selection`.
        accuracy: Mean and standard deviation.
        difference: In accuracy to no projection, paired by seed.
        features: Mean.
        informative: Mean; ``None`` where nobody knows.
        by_chance: Informative ones among as many features drawn at random; ``None`` where nobody knows.
    """

    method: str
    sparsity: float
    accuracy: tuple[float, float]
    difference: PairedDifference
    features: float
    informative: float | None
    by_chance: float | None


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
        known = [run.informative for run in mine if run.informative is not None]
        chances = [
            run.features * (plain[run.seed].informative or 0) / plain[run.seed].features
            for run in mine
            if plain[run.seed].informative is not None
        ]
        summaries.append(
            Summary(
                method=method,
                sparsity=sparsity,
                accuracy=(statistics.fmean(accuracies), statistics.stdev(accuracies) if len(mine) > 1 else 0.0),
                difference=subtract_paired([plain[run.seed].accuracy for run in mine], accuracies),
                features=statistics.fmean(run.features for run in mine),
                informative=statistics.fmean(known) if known else None,
                by_chance=statistics.fmean(chances) if chances else None,
            )
        )
    return summaries


def sparsest_without_loss(summaries: Sequence[Summary]) -> float:
    """Return the highest sparsity at which each of `METHODS` is as accurate as no projection, else the best one."""
    (plain,) = (s for s in summaries if s.method == PLAIN)
    worst: dict[float, float] = {}
    for s in summaries:
        if s.method in METHODS:
            worst[s.sparsity] = min(s.accuracy[0], worst.get(s.sparsity, 1.0))
    without = [sparsity for sparsity, accuracy in worst.items() if accuracy >= plain.accuracy[0]]
    return max(without) if without else max(worst, key=lambda sparsity: worst[sparsity])


def headline(summaries: Sequence[Summary]) -> str:
    """Say in two sentences what the study found, and which part of it gains."""
    (plain,) = (s for s in summaries if s.method == PLAIN)
    at = [s for s in summaries if s.sparsity == sparsest_without_loss(summaries) and s.method != PLAIN]
    shown = [s for s in at if s.method in METHODS]
    parts = ", ".join(f"{s.accuracy[0]:.3f} ({s.method}, {s.difference.verdict})" for s in shown)
    found = (
        f"Test accuracy with {shown[0].features:,.0f} of {plain.features:,.0f} features: {parts}; with all: "
        f"{plain.accuracy[0]:.3f}."
    )
    others = ", ".join(f"{s.accuracy[0]:.3f} ({s.method})" for s in at if s.method not in METHODS)
    if not others:
        return found
    return f"{found} The same training with other masks, or with weights that are not rewound: {others}."


def write_runs(runs: Sequence[Selection], path: Path) -> None:
    """Write the runs as JSON."""
    path.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n", encoding="utf-8")
