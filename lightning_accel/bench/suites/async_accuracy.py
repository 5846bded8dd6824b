"""What asynchrony costs in test accuracy, by optimizer, number of workers and evenness of their speeds.

Every cell is simulated on a virtual clock with the server's own arithmetic (`simulate`), six seeds each; four of them
are run again with real processes under a Trainer, which sleep in each step so that all compute at the same time. Pairs
share seed, split and order of batches with a fit in one process. Accuracy, not time, is measured here.
"""

import functools
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.async_sgd import Settings
from lightning_accel.async_sgd.simulation.run import simulate
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired
from lightning_accel.strategies.for_lightning import AsyncSGDStrategy
from lightning_accel.zoo.data.digits import Digits
from lightning_accel.zoo.models.cnn import CNN
from lightning_accel.zoo.models.mlp import MLP

EPOCHS = 6
_BATCH = 32
_STEP_SECONDS = 0.01  # of a real worker, at least
MODELS: dict[str, Callable[[], LightningModule]] = {"CNN": CNN, "MLP": functools.partial(MLP, width=256, depth=3)}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD, momentum 0.9": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "SGD, momentum 0.95": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.95),
    "Adam": functools.partial(torch.optim.Adam, lr=2e-3),
    "AdamW": functools.partial(torch.optim.AdamW, lr=2e-3),
}


class Cell(NamedTuple):
    """One line of the table: ``slowdown`` is how many times slower the last worker is."""

    model: str
    optimizer: str
    workers: int
    slowdown: float

    def __str__(self) -> str:
        speeds = "even" if self.slowdown == 1.0 else f"one {self.slowdown:g}x slower"
        return f"digits {self.model}, {self.optimizer}, {self.workers} workers, {speeds}"


CELLS = [Cell(*cell) for cell in itertools.product(MODELS, OPTIMIZERS, (2, 3, 4), (1.0, 3.0))]
REAL = [
    Cell("CNN", "SGD, momentum 0.9", 3, 1.0),
    Cell("CNN", "SGD, momentum 0.95", 4, 1.0),
    Cell("MLP", "SGD, momentum 0.9", 4, 3.0),
    Cell("CNN", "Adam", 4, 3.0),
]


def rows(*, quick: bool, simulated: bool = True, first_seed: int = 0) -> Iterator[BenchRow]:
    """Yield the accuracy of each cell, relative to that of one process.

    Args:
        quick: One seed, few cells.
        simulated: Whether to run the cells on the virtual clock, too, or real processes alone.
        first_seed: Of those that follow one another, >= 0.

    Raises:
        ValueError: If ``first_seed < 0``.
    """
    if first_seed < 0:
        raise ValueError(f"`first_seed` must be >= 0, got {first_seed}.")
    seeds = range(first_seed, first_seed + (1 if quick else 6))
    cells = CELLS[4:6] if quick else CELLS
    for cell in cells if simulated else []:
        alone = [alone_accuracy(cell.model, cell.optimizer, seed) for seed in seeds]
        yield _row(cell, "simulated", alone, [simulated_accuracy(cell, seed) for seed in seeds])
    for cell in REAL[:1] if quick else REAL:
        some = seeds[:3]
        alone = [alone_accuracy(cell.model, cell.optimizer, seed) for seed in some]
        yield _row(cell, "real processes", alone, [real_accuracy(cell, seed) for seed in some])


def _row(cell: Cell, variant: str, alone: Sequence[float], found: Sequence[float]) -> BenchRow:
    lost = [100.0 * (a - b) for a, b in zip(alone, found, strict=True)]
    return BenchRow(
        suite="async_accuracy",
        case=str(cell),
        variant=variant,
        baseline="one process",
        ratio=compare_paired(found, alone),  # accuracy over accuracy: 1 is as good as one process
        target=0.99,
        note=f"points lost over {len(lost)} seeds: median {statistics.median(lost):+.2f}, mean "
        f"{statistics.fmean(lost):+.2f}, most {max(lost):+.2f}; mean {statistics.fmean(found):.2%}, one process "
        f"{statistics.fmean(alone):.2%}",
    )


@functools.cache
def _data(seed: int) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Return the batches of all epochs in order, and the test set."""
    data = Digits(batch_size=_BATCH, seed=seed)
    data.prepare_data()
    data.setup("fit")
    loader, batches = data.train_dataloader(), []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # the sampler of the zoo's loaders has it
        batches += [(x, target) for x, target in loader]
    x, target = data.parts[2].tensors
    return batches, (x, target)


def _loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def _accuracy(module: nn.Module, seed: int) -> float:
    x, target = _data(seed)[1]
    module.eval()
    with torch.no_grad():
        return float((module(x).argmax(1) == target).double().mean())


@functools.cache
def alone_accuracy(model: str, optimizer: str, seed: int) -> float:
    """Train in one process, and return the test accuracy."""
    torch.manual_seed(seed)
    module = MODELS[model]()
    steps = OPTIMIZERS[optimizer](module.parameters())
    for batch in _data(seed)[0]:
        steps.zero_grad()
        _loss(module, batch).backward()
        steps.step()
    return _accuracy(module, seed)


def simulated_accuracy(cell: Cell, seed: int, **settings: Any) -> float:
    """Train on the virtual clock, and return the test accuracy; ``settings`` are of `Settings`."""
    torch.manual_seed(seed)
    module = MODELS[cell.model]()
    simulate(
        module,
        _loss,
        _data(seed)[0],
        OPTIMIZERS[cell.optimizer](module.parameters()),
        settings=Settings(**settings),
        step_seconds=[1.0] * (cell.workers - 1) + [cell.slowdown],
        seed=seed,
    )
    return _accuracy(module, seed)


class _Steps(Callback):
    """Give a module its optimizer and each step of a worker its length."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        make = OPTIMIZERS[self._cell.optimizer]
        pl_module.configure_optimizers = lambda: make(pl_module.parameters())  # type: ignore[method-assign]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        slow = trainer.global_rank == self._cell.workers - 1
        time.sleep(_STEP_SECONDS * (self._cell.slowdown if slow else 1.0))


def real_accuracy(cell: Cell, seed: int) -> float:
    """Train with real processes, and return the test accuracy."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    module = MODELS[cell.model]()
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=cell.workers,
        strategy=AsyncSGDStrategy(),
        callbacks=[_Steps(cell)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, Digits(batch_size=_BATCH, seed=seed))
    return _accuracy(module, seed)
