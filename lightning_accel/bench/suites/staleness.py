"""Test accuracy of asynchronous training by each staleness rule, with one worker that is three times slower.

Every run is a whole fit of two worker processes under a Trainer, with the settings of ``experiment=cnn_digits``; pairs
of runs share a seed with a fit in one process. Accuracy, not time, is measured here.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from typing_extensions import override

from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired
from lightning_accel.strategies.for_lightning import AsyncSGDStrategy
from lightning_accel.zoo.data.digits import Digits
from lightning_accel.zoo.models.cnn import CNN

_SLOWDOWN = 3.0
_BASELINE = "one process"
RULES: dict[str, dict[str, Any]] = {
    "look_ahead (default)": {},
    "inverse": {"staleness": "inverse"},
    "none": {"staleness": "none"},
    "delay_compensation": {"staleness": "delay_compensation"},
    "drop beyond 2": {"staleness": "drop", "drop_beyond": 2},
    "none, at most 1 push ahead": {"staleness": "none", "max_staleness": 1},
}


class Straggler(Callback):
    """Make one worker slower: it sleeps after each batch in proportion to what the batch took.

    Args:
        worker: Which one.
        slowdown: How many times slower, >= 1.
    """

    def __init__(self, worker: int, slowdown: float) -> None:
        self._worker, self._slowdown = worker, slowdown
        self._began = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self._worker:
            time.sleep((self._slowdown - 1.0) * (time.perf_counter() - self._began))


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the accuracy by each rule, relative to that of one process."""
    seeds = range(1 if quick else 6)
    alone = [accuracy(None, seed, quick=quick, device=device) for seed in seeds]
    for name, settings in RULES.items():
        yield row(name, alone, [accuracy(settings, seed, quick=quick, device=device) for seed in seeds])


def row(name: str, alone: Sequence[float], found: Sequence[float]) -> BenchRow:
    """Return the row of a rule from the accuracies of one process and of two workers, seed by seed."""
    lost = 100.0 * (statistics.fmean(alone) - statistics.fmean(found))
    return BenchRow(
        suite="staleness",
        case="digits CNN, one of 2 workers 3x slower, test accuracy",
        variant=name,
        baseline=_BASELINE,
        ratio=compare_paired(found, alone),  # accuracy over accuracy: 1 is as good as one process
        target=0.995,
        note=f"mean (least to most) over {len(found)} seeds: {_spread(found)}, one process {_spread(alone)}; "
        f"{lost:+.2f} points lost; the ratio is of accuracies",
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2%} ({min(values):.2%} to {max(values):.2%})"


def accuracy(settings: dict[str, Any] | None, seed: int, *, quick: bool, device: str) -> float:
    """Fit and return the test accuracy; ``settings`` are of `AsyncSGDStrategy`, None is one process."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=2 if quick else 30,
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=1 if settings is None else 2,
        strategy="auto" if settings is None else AsyncSGDStrategy(**settings),
        callbacks=None if settings is None else [Straggler(1, _SLOWDOWN)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = CNN(dropout=0.4, lr=2e-3, schedule="cosine"), Digits(batch_size=32, seed=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(model, data)
        (found,) = trainer.test(model, data, verbose=False)
    return float(found["test/accuracy"])
