"""What a projection adds to a training step: neighbouring steps of one fit, with and without it."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_accel.callbacks.l1inf_projection import L1InfProjection
from lightning_accel.evidence.feature_selection import METHODS, MakeFit
from lightning_accel.measure import PairedRatio, compare_paired, synchronize

_WARM_UP = 4  # steps that are left out, an even number


@dataclass(frozen=True)
class Overhead:
    """Time of a training step that is followed by a projection, against that of its neighbour which is not.

    Attributes:
        method: As in `Selection`.
        sparsity: Fraction of the features to clear, in [0, 1].
        ratio: Seconds with the projection over those without.
        seconds: Median of a step without it.
    """

    method: str
    sparsity: float
    ratio: PairedRatio
    seconds: float


class _StepClock(Callback):
    """Take the time of each training step, its optimizer step and projection included."""

    def __init__(self) -> None:
        self.begin, self.seconds = 0.0, list[float]()
        # one thread's own time is not disturbed by other programs
        self.clock: Callable[[], float] = time.perf_counter

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Choose the clock."""
        alone = pl_module.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if alone else time.perf_counter

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ARG002
        """Start the clock."""
        synchronize(pl_module.device)
        self.begin = self.clock()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ARG002
        """Stop the clock."""
        synchronize(pl_module.device)
        self.seconds.append(self.clock() - self.begin)


def measure_overhead(make: MakeFit, *, parameter: str, sparsities: Sequence[float], seed: int) -> Iterator[Overhead]:
    """Fit once for each method and sparsity, project after every second step, and compare neighbours.

    Args:
        make: Builds trainer, model and data for a seed, with callbacks.
        parameter: Name of the weight whose columns are projected.
        sparsities: Fractions of the columns to clear, in [0, 1].
        seed: Of model and data.

    Raises:
        ValueError: If the fits have fewer than 6 optimizer steps.
    """
    for sparsity in sparsities:
        for name, method in METHODS.items():
            clock = _StepClock()
            projection = L1InfProjection(
                target_sparsity=sparsity, parameters=parameter, groups="columns", method=method, every_n_steps=2
            )
            trainer, model, data = make(seed, [projection, clock])
            trainer.fit(model, data)
            plain, projected = clock.seconds[_WARM_UP::2], clock.seconds[_WARM_UP + 1 :: 2]
            if not projected:
                raise ValueError(f"a fit must have at least {_WARM_UP + 2} steps, got {len(clock.seconds)}.")
            plain = plain[: len(projected)]
            yield Overhead(name, sparsity, compare_paired(projected, plain), statistics.median(plain))
