# ruff: noqa: ARG002  # hooks take what Lightning passes
"""Where the time of a training step goes, seen through Lightning's own hooks."""

import itertools
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

PHASES = ("forward", "backward", "optimizer", "callbacks", "other")

_COUNTED_EPOCHS = 4  # enough to see every phase of an accelerator that alternates

_Mark = tuple[str, float | torch.cuda.Event]


class StepClock:
    """Split every training step into forward, backward, optimizer, callbacks and other.

    Two callbacks stand first and last in the list: what passes between them within one hook is the time of the
    callbacks in between. On a CUDA device the marks are events on the current stream, read once an epoch, so that
    timing adds no synchronization to a step. A forward pass through several optimizers or manual optimization counts
    where its marks fall: all that ends in a backward pass is "forward", all that ends in an optimizer step is
    "optimizer".

    Args:
        count_flops: Whether to count the floating point operations of one step in each of the last four epochs (their
            second step, if they have one). A counted step is slow and left out of ``steps``.

    Attributes:
        steps: Seconds by phase, one dictionary a step.
        samples: Batch size of each of these steps; 0 where it cannot be told from the batch.
        waits: Seconds between the end of the step before and the start of this one (the loader's share); the first
            step of an epoch has none, so it is shorter than ``steps``.
        flops: Operations of each counted step.
        stages: Which parameters there were in each of these steps: how many in all, and how many of them trained.
        validation_seconds: Within ``fit``, the sanity check before it aside.
        curve: One entry a validation (an epoch, without validation): seconds since ``start``, epoch, step, metrics.
        setup_seconds: From ``start`` to the first step; ``None`` before it.
    """

    def __init__(self, *, count_flops: bool = True) -> None:
        self.count_flops = count_flops
        self.steps: list[dict[str, float]] = []
        self.samples: list[int] = []
        self.waits: list[float] = []
        self.flops: list[int] = []
        self.stages: list[tuple[int, int]] = []
        self.validation_seconds = 0.0
        self.curve: list[dict[str, Any]] = []
        self.setup_seconds: float | None = None
        self._began = time.perf_counter()
        self._marks: list[_Mark] = []
        self._pending: list[tuple[list[_Mark], int, tuple[int, int]]] = []
        self._validation_began = 0.0
        self._step_ended: float | None = None
        self._counter: FlopCounterMode | None = None
        self._counted = False
        self._batch_size = 0
        self._cuda = False

    def attach(self, trainer: Trainer) -> None:
        """Put the two callbacks at both ends of the trainer's list."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, _Opening(self))
        callbacks.append(_Closing(self))

    def start(self) -> None:
        """Set the zero of ``curve`` and ``setup_seconds``; call it right before ``fit``."""
        self._began = time.perf_counter()

    def elapsed(self) -> float:
        """Return seconds since ``start``."""
        return time.perf_counter() - self._began

    def begin_step(self, batch: Any, *, cuda: bool) -> None:
        """Start the step; the time since the last one went into loading data."""
        self._cuda = cuda
        if self.setup_seconds is None:
            self.setup_seconds = self.elapsed()
        if self._step_ended is not None:
            self.waits.append(time.perf_counter() - self._step_ended)
        self._batch_size = _batch_size(batch)
        self._marks = []
        self.mark("other")

    def mark(self, phase: str) -> None:
        """Book the time since the last mark on ``phase``."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def end_step(self, stage: tuple[int, int] = (0, 0)) -> None:
        """Finish the step; counted steps run slower and are not timed."""
        if not self._counted:
            self._pending.append((self._marks, self._batch_size, stage))
        self._counted = False
        self._step_ended = time.perf_counter()

    def begin_validation(self) -> None:
        """Start the clock of a validation."""
        self._validation_began = time.perf_counter()

    def end_validation(self) -> None:
        """Stop it; the next step did not wait for data as long as that took."""
        now = time.perf_counter()
        self.validation_seconds += now - self._validation_began
        if self._step_ended is not None:
            self._step_ended = now

    def begin_counting(self, trainer: Trainer, batch_index: int) -> None:
        """Count this step's operations if it is the one of its epoch."""
        epochs = trainer.max_epochs or -1
        is_late = epochs < 0 or trainer.current_epoch >= epochs - _COUNTED_EPOCHS
        if self.count_flops and is_late and batch_index == min(1, trainer.num_training_batches - 1):
            self._counted = True
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def end_counting(self, *, keep: bool = True) -> None:
        """Stop counting, if a count is under way."""
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)
            if keep:
                self.flops.append(counter.get_total_flops())

    def end_epoch(self) -> None:
        """Read the marks of the epoch (on CUDA: after one synchronization)."""
        if self._pending and self._cuda:
            torch.cuda.synchronize()
        for marks, samples, stage in self._pending:
            self.steps.append(_seconds_by_phase(marks))
            self.samples.append(samples)
            self.stages.append(stage)
        self._pending = []
        self._step_ended = None

    def note_metrics(self, trainer: Trainer) -> None:
        """Append the metrics logged so far to ``curve``, once a global step."""
        step = trainer.global_step
        if self.curve and self.curve[-1]["step"] == step:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.curve.append({"seconds": self.elapsed(), "epoch": trainer.current_epoch, "step": step, "metrics": metrics})


class _Opening(Callback):
    """First in the list: books what Lightning and the model did since the last mark."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self._handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handles = _after_optimizer_steps(trainer, self._clock, "optimizer")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _remove(self._handles)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._clock.end_counting(keep=False)
        _remove(self._handles)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._clock.begin_step(batch, cuda=pl_module.device.type == "cuda")

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._clock.mark("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._clock.mark("forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.mark("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._clock.mark("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.end_counting()
        self._clock.mark("other")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.begin_validation()


class _Closing(Callback):
    """Last in the list: books what the callbacks in between took."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self._handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handles = _after_optimizer_steps(trainer, self._clock, "callbacks")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _remove(self._handles)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _remove(self._handles)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._clock.mark("callbacks")
        self._clock.begin_counting(trainer, batch_idx)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._clock.mark("callbacks")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._clock.mark("callbacks")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.mark("callbacks")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._clock.mark("callbacks")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.mark("callbacks")
        self._clock.end_step(_sizes(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._clock.note_metrics(trainer)
            self._clock.end_validation()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.end_epoch()
        self._clock.note_metrics(trainer)


def _after_optimizer_steps(trainer: Trainer, clock: StepClock, phase: str) -> list[RemovableHandle]:
    """Mark after each optimizer's real step: right under accumulation and manual optimization, too."""
    return [o.register_step_post_hook(lambda *_: clock.mark(phase)) for o in trainer.optimizers]


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _sizes(module: LightningModule) -> tuple[int, int]:
    """Return the numbers of parameters, and of those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _batch_size(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except Exception:  # any structure is a legal batch; a size that cannot be told is no reason to stop
        return 0


def _seconds_by_phase(marks: list[_Mark]) -> dict[str, float]:
    seconds = dict.fromkeys(PHASES, 0.0)
    for (_, before), (phase, after) in itertools.pairwise(marks):
        if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
            seconds[phase] += before.elapsed_time(after) / 1000.0
        elif isinstance(before, float) and isinstance(after, float):
            seconds[phase] += after - before
    return seconds
