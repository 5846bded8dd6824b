"""Training on a GPU: what callbacks add to a Trainer's step, and two asynchronous workers that share the device."""

import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_accel.async_sgd import ParameterStore, Settings, Worker, run_workers
from lightning_accel.bench.on_gpu.models import resnet50
from lightning_accel.bench.overhead_row import quiet_trainer
from lightning_accel.callbacks.projection.l1inf_projection import L1InfProjection
from lightning_accel.callbacks.sequential_freezing import SequentialFreezing
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.low_rank import decompose, make_plan
from lightning_accel.measure import compare_paired, synchronize

_LIMIT = 1.02  # of a step with a callback, over one without
_SETTLING = 10  # steps at the beginning of a fit that are not counted
_UNITS = 100_000  # batches of an epoch that no run comes to the end of


class _Images(LightningModule):
    """Classify images, in channels_last, with a fused optimizer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.loss = float("nan")

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class _Clock(Callback):
    """Take the time of all steps but the first ones together: who waits for each step hides what runs beside it."""

    def __init__(self) -> None:
        self.seconds_a_step, self.loss = float("nan"), float("nan")
        self._begun = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Begin when the first steps are over."""
        if batch_idx == _SETTLING:
            synchronize(pl_module.device)
            self._begun = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """End with the last step."""
        if batch_idx + 1 == trainer.num_training_batches:
            synchronize(pl_module.device)
            self.seconds_a_step = (time.perf_counter() - self._begun) / (batch_idx + 1 - _SETTLING)
            self.loss = float(outputs["loss"])  # type: ignore[index]


def overhead_rows(device: str, *, small: bool, note: str) -> Iterator[BenchRow]:
    """Yield what each callback adds to a training step of the Trainer, in turns with fits without it."""
    torch.manual_seed(0)
    shape, steps, rounds = ((4, 3, 32, 32), 14, 2) if small else ((128, 3, 224, 224), 60, 3)
    net = resnet50((1, 1), 16, 10) if small else resnet50()
    low = copy.deepcopy(net)
    decompose(low, make_plan(low, None, ratio=2.0, method="fixed"))
    name = "ResNet of 2 bottlenecks" if small else "ResNet-50"
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    batches = [(x, torch.zeros(len(x), dtype=torch.long, device=device))] * steps
    cases: dict[str, tuple[nn.Module, Callable[[], Callback]]] = {
        "L1InfProjection()": (net, L1InfProjection),
        "SequentialFreezing(mode='none')": (low, lambda: SequentialFreezing(mode="none")),
    }
    for variant, (model, make) in cases.items():
        seconds: dict[str, list[float]] = {variant: [], "without": []}
        losses: dict[str, float] = {}
        for turn in range(2 * rounds):
            which = variant if turn % 2 else "without"
            clock = _Clock()
            _fit(copy.deepcopy(model), batches, [*([make()] if which == variant else []), clock], device)
            seconds[which].append(clock.seconds_a_step)
            losses[which] = clock.loss
        yield BenchRow(
            suite="gpu",
            case=f"{name}, bf16, channels_last, batch {shape[0]}, step of the Trainer",
            variant=variant,
            baseline="without",
            ratio=compare_paired(seconds[variant], seconds["without"]),
            seconds={key: statistics.median(values) for key, values in seconds.items()},
            target=None if small else _LIMIT,
            better="at most",
            note=f"{note}loss after {steps} steps {losses[variant]:.3f}, without {losses['without']:.3f}",
        )


def _fit(net: nn.Module, batches: list[tuple[Tensor, Tensor]], callbacks: list[Callback], device: str) -> None:
    net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet_trainer():
        warnings.simplefilter("ignore")  # advice about workers
        Trainer(
            max_epochs=1,
            accelerator="cpu" if torch.device(device).type == "cpu" else "gpu",
            devices=1,
            precision="bf16-mixed",
            callbacks=callbacks,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(_Images(net), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # a list is a data set


def asynchronous_rows(device: str, *, small: bool, note: str) -> Iterator[BenchRow]:
    """Yield two asynchronous workers on one device against one process; optimizers on the host, or on the device."""
    window, rounds = (1.0, 1) if small else (4.0, 3)
    there = "cpu" if torch.device(device).type == "cpu" else device
    plain, here, beside = "one process", "2 workers", f"2 workers, optimizer_device={there}"
    variants: dict[str, Callable[[], tuple[float, float]]] = {
        plain: lambda: _one_process(window, device, small=small),
        here: lambda: _workers(window, device, Settings(lease_batches=64), small=small),
        beside: lambda: _workers(window, device, Settings(lease_batches=64, optimizer_device=there), small=small),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, float] = {}
    for _ in range(rounds):
        for name, run in variants.items():
            pace, losses[name] = run()
            seconds[name].append(1.0 / pace)
    for name in (here, beside):
        yield BenchRow(
            suite="gpu",
            case="images, two asynchronous workers that share the device, steps a second",
            variant=name,
            baseline=plain,
            ratio=compare_paired(seconds[plain], seconds[name]),
            seconds={key: statistics.median(values) for key, values in seconds.items()},
            target=None if small else 1.0,
            note=f"{note}seconds are of a step, whoever makes it; loss {losses[name]:.3f}, one process "
            f"{losses[plain]:.3f}; start-up not counted",
        )


class _Task:
    """A step of a model that leaves a large device idle."""

    def __init__(self, device: str, *, small: bool) -> None:
        torch.manual_seed(0)
        size, batch = (16, 4) if small else (64, 32)
        self.net = resnet50((1, 1), 8 if small else 32, 10).to(device)
        self.x = torch.randn(batch, 3, size, size, device=device)
        self.y = torch.arange(batch, device=device) % 10
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        self.last = self.x.new_zeros(())

    def step(self) -> None:
        """Make a training step."""
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.net(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.last = loss.detach()


def _one_process(window: float, device: str, *, small: bool) -> tuple[float, float]:
    """Return steps a second, and the last loss."""
    task = _Task(device, small=small)
    for _ in range(_SETTLING):
        task.step()
    synchronize(device)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < window:
        task.step()
        float(task.last)  # as the workers do, whose pushes wait for the step
        steps += 1
    return steps / (time.perf_counter() - began), float(task.last)


def _workers(window: float, device: str, settings: Settings, *, small: bool) -> tuple[float, float]:
    found: tuple[float, float]
    found, _ = run_workers(
        train_beside, (2, window, device, small), workers=2, settings=settings, start_method="forkserver"
    )
    return found


def train_beside(
    store: ParameterStore, workers: int, window: float, device: str, small: bool
) -> tuple[float, float] | None:
    """Train as one of several workers; returns all their steps a second and the last loss, in the coordinator."""
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    task = _Task(device, small=small)
    worker = Worker(
        store,
        store.settings,
        dict(task.net.named_parameters()),
        dict(task.net.named_buffers()),
        [task.optimizer],
        module=task.net,
    )
    number = worker.join(worker.opening).worker
    worker.attach()
    steps, settled, began = 0, 0, 0.0
    while not began or time.perf_counter() - began < window:
        for lease in store.lease(0, lambda: range(_UNITS)):
            if settled == _SETTLING and not began:
                store.kv(f"ready {number}", b"yes")
                for other in range(workers):
                    store.kv(f"ready {other}")
                began = time.perf_counter()
            worker.pending.append(lease.id)
            task.step()
            settled, steps = settled + (settled < _SETTLING), steps + bool(began)
            if began and time.perf_counter() - began >= window:
                break
    worker.flush()
    pace = steps / (time.perf_counter() - began)
    store.kv(f"pace {number}", str(pace).encode())
    if not store.is_coordinator:
        return None
    paces = [float(store.kv(f"pace {other}") or b"0") for other in range(workers)]
    return sum(paces), float(task.last)
