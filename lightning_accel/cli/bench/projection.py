"""Projections against a copy of the same bytes, the callback against a plain training step, shrunk models.

Ratios of the first kind are times over that of ``copy_`` (to a tensor that exists), which moves every byte once in and
once out: no in-place projection of a tensor that does not fit into the caches can come close to 1 or below, for it
reads twice. Times are CPU time of the one thread, so that other programs disturb them less.
"""

import contextlib
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.callbacks.l1inf_projection import L1InfProjection
from lightning_accel.cli.bench._shrink_rows import shrink_rows
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired, synchronize
from lightning_accel.projection import ExactState, project_l1inf, radius_for_sparsity
from lightning_accel.zoo.autoencoder import SupervisedAutoencoder

_SHAPES = ((1_000, 10_000), (10_000, 10_000))
_CONVOLUTION = (512, 512, 3, 3)
_NAMES = {0: "rows", 1: "columns"}
_IN_PLACE = {0: 1.3, 1: 1.5}
_EXACT = {0.5: 6.0, 0.9: 4.0, 0.99: 2.5}
_EAGER = "chunked eager operations, nothing is compiled"


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the rows of the suite.

    Args:
        quick: Few pairs and small tensors, for a look in about a minute.
        device: To run on.
    """
    pairs = 3 if quick else 15
    for shape in ((500, 2_000),) if quick else _SHAPES:
        for dim in (0, 1):
            yield from _against_copy(shape, dim, pairs=pairs, device=device)
    yield from _convolution((64, 64, 3, 3) if quick else _CONVOLUTION, pairs=pairs, device=device)
    if device == "cpu" and (os.cpu_count() or 1) > 1:
        yield from _two_threads((500, 2_000) if quick else _SHAPES[0], pairs=pairs)
    yield _overhead(pairs=20 if quick else 300, device=device)
    yield from shrink_rows(width=256 if quick else 4096, pairs=pairs, device=device, clock=_clock(device))


def _clock(device: str) -> Callable[[], float]:
    return time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _over_copy(
    case: str, x: Tensor, candidates: dict[str, tuple[Callable[[], object], float | None]], *, pairs: int, device: str
) -> Iterator[BenchRow]:
    """Time candidates (with targets) and a copy in turns; each candidate gets ``x`` anew."""
    other, seconds = torch.empty_like(x), dict[str, list[float]]()
    clock = _clock(device)

    def timed(run: Callable[[], object]) -> float:
        x.copy_(fresh)
        synchronize(device)
        begin = clock()
        run()
        synchronize(device)
        return clock() - begin

    fresh = x.clone()
    everything = {"copy_": lambda: other.copy_(fresh)} | {name: run for name, (run, _) in candidates.items()}
    for run in everything.values():
        timed(run)
    for _ in range(pairs):
        for name, run in everything.items():
            seconds.setdefault(name, []).append(timed(run))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, (_, target) in candidates.items():
        ratio = compare_paired(seconds[name], seconds["copy_"])
        yield BenchRow(
            suite="projection",
            case=case,
            variant=name,
            baseline="copy_",
            ratio=ratio,
            seconds={"copy_": medians["copy_"], name: medians[name]},
            target=target,
            better="at most",
            note=_EAGER if device == "cpu" else "",
        )


def _against_copy(shape: tuple[int, int], dim: int, *, pairs: int, device: str) -> Iterator[BenchRow]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    group, name = (dim,), _NAMES[dim]
    radius = radius_for_sparsity(x, 0.5, group)
    candidates: dict[str, tuple[Callable[[], object], float | None]] = {
        f"bi-level in place, {name}": (lambda: project_l1inf(x, radius, group, out=x), _IN_PLACE[dim]),
        f"bi-level new tensor, {name}": (lambda: project_l1inf(x, radius, group), 3.0),
        f"clone, {name}": (x.clone, None),
    }
    for sparsity, target in _EXACT.items():
        goal, state = radius_for_sparsity(x, sparsity, group, "exact"), ExactState()

        def exact(goal: float = goal, state: ExactState = state) -> None:
            project_l1inf(x, goal, group, "exact", out=x, state=state)

        candidates[f"exact, {sparsity:.0%} zero, {name}"] = (exact, target)
    size = f"{shape[0]:,} x {shape[1]:,}"
    yield from _over_copy(f"{size} float32", x, candidates, pairs=pairs, device=device)
    half = x.bfloat16()
    small = radius_for_sparsity(half, 0.5, group)
    run = (lambda: project_l1inf(half, small, group, out=half)), 2.5
    yield from _over_copy(f"{size} bfloat16", half, {f"bi-level in place, {name}": run}, pairs=pairs, device=device)


def _convolution(shape: tuple[int, ...], *, pairs: int, device: str) -> Iterator[BenchRow]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    candidates: dict[str, tuple[Callable[[], object], float | None]] = {}
    for dim, name in ((0, "out-channels"), (1, "in-channels")):
        radius = radius_for_sparsity(x, 0.5, (dim,))

        def project(radius: float = radius, dim: int = dim) -> None:
            project_l1inf(x, radius, (dim,), out=x)

        candidates[f"bi-level in place, {name}"] = project, _IN_PLACE[dim]
    case = f"convolution {' x '.join(map(str, shape))} float32"
    yield from _over_copy(case, x, candidates, pairs=pairs, device=device)


def _two_threads(shape: tuple[int, int], *, pairs: int) -> Iterator[BenchRow]:
    before = torch.get_num_threads()
    keys = {"one thread": 1, "two threads": 2}
    for dim, name in _NAMES.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        fresh, radius = x.clone(), radius_for_sparsity(x, 0.5, (dim,))
        seconds: dict[str, list[float]] = {key: [] for key in keys}
        try:
            for i in range(pairs + 1):
                for key, threads in keys.items():
                    x.copy_(fresh)
                    torch.set_num_threads(threads)
                    begin = time.perf_counter()
                    project_l1inf(x, radius, (dim,), out=x)
                    if i:  # the first starts the threads
                        seconds[key].append(time.perf_counter() - begin)
        finally:
            torch.set_num_threads(before)
        yield BenchRow(
            suite="projection",
            case=f"{shape[0]:,} x {shape[1]:,} float32",
            variant=f"two threads, bi-level in place, {name}",
            baseline="one thread",
            ratio=compare_paired(seconds["two threads"], seconds["one thread"]),
            seconds={key: statistics.median(values) for key, values in seconds.items()},
            target=0.6,
            better="at most",
            note="wall-clock time",
        )


class _StepClock(Callback):
    """Take the time from each batch to the next; the first of an epoch, which also starts it, is left out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.last, self.seconds = clock, 0.0, list[float]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:  # noqa: ARG002
        now = self.clock()
        if batch_idx > 1:
            self.seconds.append(now - self.last)
        self.last = now


def _overhead(*, pairs: int, device: str) -> BenchRow:
    """Train the papers' autoencoder and project after every second step: neighbours differ by the projection alone."""
    torch.manual_seed(0)
    clock = _StepClock(_clock(device))
    projection = L1InfProjection(radius_fraction=0.1, parameters="encoder.0.weight", groups="columns", every_n_steps=2)
    batches = 2 * pairs + 2
    data = TensorDataset(torch.randn(32 * batches, 1_000), torch.randint(0, 2, (32 * batches,)))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # advice about workers
        Trainer(
            max_epochs=1,
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            callbacks=[projection, clock],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(SupervisedAutoencoder(in_features=1_000), DataLoader(data, batch_size=32))
    seconds = {"projected": clock.seconds[0::2], "plain": clock.seconds[1::2]}
    count = min(map(len, seconds.values()))
    return BenchRow(
        suite="projection",
        case="autoencoder 1000-100-2-100-1000, batch 32, training step of the Trainer",
        variant="L1InfProjection on the encoder's columns",
        baseline="step without it",
        ratio=compare_paired(seconds["projected"][:count], seconds["plain"][:count]),
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        target=1.03,
        better="at most",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the Trainer says about devices out of the table."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
