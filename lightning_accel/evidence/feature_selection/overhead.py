"""What a projection adds to a training step: neighbouring steps of one fit, with and without it."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_accel.evidence.feature_selection.study import METHODS, MakeFit, MakeProjection
from lightning_accel.measure import PairedRatio, compare_paired, synchronize

_WARM_UP = 4  # steps that are left out


@dataclass(frozen=True)
class Overhead:
    """Time of a training step that is followed by a projection, against that of its neighbour which is not.

    Attributes:
        method: As in `Selection`.
        sparsity: Fraction of the features to clear, in [0, 1].
        ratio: Seconds with the projection over those without.
        seconds: Median of a step without it, from batch to batch.
    """

    method: str
    sparsity: float
    ratio: PairedRatio
    seconds: float


class _StepClock(Callback):
    """Take the time of each training step, from the end of the batch before to its own end.

    So reading the batch counts, as it does for who waits for the training; the first batch of an epoch, which also
    starts it, is left out.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.seconds: dict[int, float] = {}  # by the number of the optimizer step, from 1
        # one thread's own time is not disturbed by other programs
        self.clock: Callable[[], float] = time.perf_counter

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Choose the clock."""
        alone = pl_module.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if alone else time.perf_counter

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Forget the batch before."""
        self.last = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the clock, and start it anew."""
        synchronize(pl_module.device)
        now = self.clock()
        if self.last is not None:
            self.seconds[trainer.global_step] = now - self.last
        self.last = now

    def neighbours(self) -> tuple[list[float], list[float]]:
        """Return seconds of the even steps, which are projected, and of the odd ones before them."""
        even = [step for step in self.seconds if step % 2 == 0 and step > _WARM_UP and step - 1 in self.seconds]
        return [self.seconds[step] for step in even], [self.seconds[step - 1] for step in even]


def measure_overhead(
    make: MakeFit, project: MakeProjection, *, parameter: str, sparsities: Sequence[float], seed: int
) -> Iterator[Overhead]:
    """Fit once for each method and sparsity, project after every second step, and compare neighbours.

    Args:
        make: Builds trainer, model and data for a seed, with callbacks.
        project: Builds the callback that projects.
        parameter: Name of the weight whose columns are projected.
        sparsities: Fractions of the columns to clear, in [0, 1].
        seed: Of model and data.

    Raises:
        ValueError: If no epoch has two steps to compare after the first 4 of the fit.
    """
    for sparsity in sparsities:
        for name, method in METHODS.items():
            clock = _StepClock()
            projection = project(
                target_sparsity=sparsity, parameters=parameter, groups="columns", method=method, every_n_steps=2
            )
            trainer, model, data = make(seed, [projection, clock])
            trainer.fit(model, data)
            projected, plain = clock.neighbours()
            if not projected:
                raise ValueError(
                    f"a fit must have epochs of at least 3 steps, and {_WARM_UP + 2} steps in all, to compare "
                    f"neighbours, got {trainer.global_step} steps in {trainer.current_epoch} epochs."
                )
            yield Overhead(name, sparsity, compare_paired(projected, plain), statistics.median(plain))
