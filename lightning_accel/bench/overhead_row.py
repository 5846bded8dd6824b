"""What the projection callback adds to a training step: a row of the suite ``projection``."""

import contextlib
import functools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_accel.callbacks.projection.l1inf_projection import L1InfProjection
from lightning_accel.callbacks.projection.timing import Timing
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired, synchronize
from lightning_accel.zoo.models.autoencoder import SupervisedAutoencoder

_TURN = 20  # steps
_SETTLING = 2  # steps at the beginning of a turn that are not counted
_LIMIT = 1.03


class _Turns(Callback):
    """Let the projection follow each step of every other turn, and none of the others; time all of them.

    So both kinds of steps are as they are in a fit of their kind: code and weights that a projection leaves in the
    caches are there for the next step with one. Steps are timed from batch to batch.
    """

    def __init__(self, projection: L1InfProjection, clock: Callable[[], float]) -> None:
        self.projection, self.clock, self.last = projection, clock, 0.0
        self.when, self.freezes = projection._run.timing, projection._run.freeze_zero_groups
        self.turns: list[list[float]] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Stop the clock for the batch before, and start it anew."""
        synchronize(pl_module.device)
        if batch_idx > 0 and (batch_idx - 1) % _TURN >= _SETTLING:
            self.turns[-1].append(self.clock() - self.last)
        if batch_idx % _TURN == 0:
            self.turns.append([])
            projects = len(self.turns) % 2 == 1
            self.projection._run.timing = self.when if projects else Timing(at_end=True)
            self.projection._run.freeze_zero_groups = projects and self.freezes  # or groups would be held between
        self.last = self.clock()


def overhead_rows(*, fits: int, turns: int, device: str, clock: Callable[[], float], note: str) -> Iterator[BenchRow]:
    """Train the papers' autoencoder, ``turns`` times 20 steps with the projection and as many without, in turns.

    Where its memory happens to lie makes a fit quicker or slower, so there are several. One row for a ball of some
    radius, one for a sparsity, as by default.
    """
    kinds = {"a radius": {"radius_fraction": 0.1}, "target_sparsity=0.9": {"target_sparsity": 0.9}}
    for kind, arguments in kinds.items():
        yield _overhead_row(kind, arguments, fits=fits, turns=turns, device=device, clock=clock, note=note)


def _overhead_row(
    kind: str,
    arguments: dict[str, float],
    *,
    fits: int,
    turns: int,
    device: str,
    clock: Callable[[], float],
    note: str,
) -> BenchRow:
    torch.manual_seed(0)
    data = functools.cache(lambda samples: TensorDataset(torch.randn(samples, 1_000), torch.randint(0, 2, (samples,))))
    seconds: dict[str, list[float]] = {"projected": [], "plain": []}
    for _ in range(fits):
        projection = L1InfProjection(parameters="encoder.0.weight", groups="columns", **arguments)  # type: ignore[arg-type]
        model = SupervisedAutoencoder(in_features=1_000)
        found = step_seconds(model, data, projection, batch_size=32, turns=turns, device=device, clock=clock)
        for key, values in found.items():
            seconds[key] += values
    variant, baseline = f"L1InfProjection on the encoder's columns, {kind}", "step without it"
    return BenchRow(
        suite="projection",
        case="autoencoder 1000-100-2-100-1000, batch 32, training step of the Trainer",
        variant=variant,
        baseline=baseline,
        ratio=compare_paired(seconds["projected"], seconds["plain"]),
        seconds={
            baseline: statistics.median(seconds["plain"]),
            variant: statistics.median(seconds["projected"]),
        },
        target=_LIMIT,
        better="at most",
        note=note,
    )


def step_seconds(
    model: LightningModule,
    data: Callable[[int], TensorDataset],
    projection: L1InfProjection,
    *,
    batch_size: int,
    turns: int,
    device: str,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Fit for ``turns`` times 20 steps with the projection and as many without, in turns.

    Args:
        model: To train.
        data: Makes so many samples.
        projection: Is switched on and off.
        batch_size: Samples a step.
        turns: Of either kind; one more of each starts up and is not counted.
        device: ``"cpu"``, or anything else for a GPU.
        clock: Returns seconds.

    Returns:
        Seconds a step, a median a turn: ``"projected"`` and ``"plain"``.
    """
    watch = _Turns(projection, clock)
    _fit([projection, watch], model, data(batch_size * (2 * _TURN * (turns + 1) + 1)), batch_size, device)
    medians = [statistics.median(turn) for turn in watch.turns if len(turn) == _TURN - _SETTLING][2:]
    return {"projected": medians[0::2], "plain": medians[1::2]}


def _fit(callbacks: list[Callback], model: LightningModule, data: TensorDataset, batch_size: int, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet_trainer():
        warnings.simplefilter("ignore")  # advice about workers
        Trainer(
            max_epochs=1,
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            callbacks=callbacks,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, DataLoader(data, batch_size=batch_size))


@contextlib.contextmanager
def quiet_trainer() -> Iterator[None]:
    """Keep what the Trainer says about devices out of the table."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
