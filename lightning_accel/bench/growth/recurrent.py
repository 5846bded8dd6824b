"""Training steps of a recurrent cell against the length of the sequence, the cell's size and the number of layers."""

import statistics
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_accel.bench.growth.points import ENOUGH, point
from lightning_accel.bench.overhead_row import quiet_trainer
from lightning_accel.bench.recurrent.cases import training_step
from lightning_accel.bench.recurrent.trainer_rows import fit
from lightning_accel.callbacks.recurrent.intra_stream_scheduling import IntraStreamScheduling
from lightning_accel.evidence.growth.curves import GrowthRow
from lightning_accel.machine.c_functions import compiled_library
from lightning_accel.measure import time_interleaved
from lightning_accel.recurrent.cells import PeepholeLSTMCell
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.schedule_choice import Schedule

_STEPS, _HIDDEN = 128, 128
_LENGTHS = (8, 32, 128, 512, 2048)
_SIZES = (32, 64, 128, 256, 512, 1024)
_LAYERS = (1, 2, 4, 8)
_SETTLED, _COUNTED = 3, 4  # steps of a fit: until schedules are chosen, and after that
_SECONDS = 4.0  # of a point, for as long as there are enough pairs


class Stack(LightningModule):
    """Layers of peephole LSTMs, each fed by the one before, that learn to be zero.

    Args:
        layers: Number of them.
        hidden: Units of each, and of the input.
        schedule: Of `Recurrent`.
    """

    def __init__(self, layers: int, hidden: int, schedule: Schedule) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Recurrent(PeepholeLSTMCell(hidden, hidden), schedule=schedule) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, H) to (T, B, H)."""
        for layer in self.layers:
            x, _ = layer(x)
        return x

    def choices(self) -> list[str]:
        """Return the schedules that were chosen."""
        layers = [layer for layer in self.layers if isinstance(layer, Recurrent)]
        return sorted({choice for layer in layers for choice in layer.schedules[0].choices.values()})

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean square of the outputs."""
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def rows(*, quick: bool, device: str) -> Iterator[GrowthRow]:
    """Yield the points: about three minutes on one core.

    Args:
        quick: Two small sizes a curve.
        device: To run on.
    """
    for steps in (4, 8) if quick else _LENGTHS:
        hidden = 8 if quick else _HIDDEN
        yield _point(f"sequence, H={hidden}, one layer", "time steps", steps, hidden=hidden, steps=steps, device=device)
    steps = 8 if quick else _STEPS
    for hidden in (4, 8) if quick else _SIZES:
        yield _point(f"cell, T={steps}, one layer", "hidden units", hidden, hidden=hidden, steps=steps, device=device)
    hidden = 8 if quick else _HIDDEN
    for layers in (1, 2) if quick else _LAYERS:
        curve = f"depth, T={steps}, H={hidden}"
        yield _point(curve, "layers", layers, layers=layers, hidden=hidden, steps=steps, device=device)


def _point(curve: str, axis: str, size: int, *, hidden: int, steps: int, device: str, layers: int = 1) -> GrowthRow:
    setup = _setup_seconds(layers, hidden, steps, device)
    x = torch.randn(steps, 1, hidden, device=device)
    auto = Stack(layers, hidden, "auto").to(device)
    variants = {
        "loop": training_step(Stack(layers, hidden, "loop").to(device), x),
        "scheduled": training_step(auto, x),
    }
    seconds = time_interleaved(variants, rounds=30, warmup=2, device=device, budget_seconds=_SECONDS, min_rounds=ENOUGH)
    curve = f"{curve}, peephole LSTM, B=1, training step"
    return point(
        "recurrent", curve, axis, size, seconds, setup_seconds=setup, note=f"chose {', '.join(auto.choices())}"
    )


def _setup_seconds(layers: int, hidden: int, steps: int, device: str) -> float:
    """Return what the first steps of a fit take longer than the later: tracing, compiling, comparing, measuring."""
    compiled_library.cache_clear()  # as in a process that has compiled nothing yet
    batches = [(torch.randn(steps, 1, hidden), torch.zeros(1))] * (_SETTLED + _COUNTED)
    with quiet_trainer():
        clock = fit(lambda: Stack(layers, hidden, "auto"), batches, device, IntraStreamScheduling())
    usual = statistics.median(clock.seconds[_SETTLED:])
    return max(0.0, sum(clock.seconds[:_SETTLED]) - _SETTLED * usual)
