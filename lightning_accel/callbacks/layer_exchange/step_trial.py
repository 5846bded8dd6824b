"""Whole training steps on a private copy of module and optimizers, so that trying leaves the run as it is."""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_accel.callbacks.layer_exchange.recorded_inputs import RecordedInputs
from lightning_accel.callbacks.layer_exchange.step_by_hand import step_by_hand
from lightning_accel.callbacks.layer_exchange.structure import exchange_layers
from lightning_accel.lightning_private import uncompiled
from lightning_accel.low_rank.optimizers.exchange import state_alike


class StepTrial:
    """A copy of module and optimizers that makes training steps on one batch: forward, backward, clipping, update.

    The copy's ``log`` does nothing, and its ``trainer`` shows the run's own, but with a silent logger and the copied
    optimizers. Parameters, buffers, metrics and attributes of the run's module are out of reach; the random state is
    the caller's to protect.

    Args:
        trainer: Whose precision, clipping and progress apply.
        pl_module: Copied; with manual optimization, `step` makes what its ``training_step`` makes.
        batch: As ``training_step`` gets it; copied before each step, which may change it.
        batch_idx: As ``training_step`` gets it.

    Raises:
        Exception: Whatever copying raises; the module then can not be tried.
    """

    def __init__(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int) -> None:
        self._trainer, self._batch, self._batch_idx = trainer, batch, batch_idx
        self._clip_algorithm = GradClipAlgorithmType(trainer.gradient_clip_algorithm or "norm")
        with uncompiled(pl_module) as compile_like:
            if isinstance(pl_module.__dict__.get("training_step"), FunctionType):
                raise TypeError("`training_step` was replaced on the instance; a copy would run the original")
            with _GraphTensorsDetached():
                self.module, self.optimizers = copy.deepcopy((pl_module, list(trainer.optimizers)))
        self._attach(compile_like)

    def _attach(self, compile_like: Callable[[Any], Any] | None) -> None:
        self._compile_like = compile_like
        for module in self.module.modules():
            if hasattr(module, "log_dict"):
                module.__dict__.update(log=_silent, log_dict=_silent)
        self.module.trainer = _QuietTrainer(self._trainer, self.optimizers)  # type: ignore[assignment]  # quacks alike
        for parameter in self.module.parameters():
            parameter.grad = None
        self._training_step = self.module.training_step
        if compile_like is not None:
            self._training_step = compile_like(self._training_step)

    def changed(self, change: Callable[[nn.Module], Sequence[str]]) -> "StepTrial":
        """Return a second copy whose layers ``change`` has exchanged; its moments are of the right size, no more."""
        other = copy.copy(self)
        with _GraphTensorsDetached():
            other.module, other.optimizers = copy.deepcopy((self.module, self.optimizers))
        other._attach(self._compile_like)
        exchange_layers(other.module, other.optimizers, change, state_alike)
        return other

    def changed_for_forward(self, change: Callable[[nn.Module], Sequence[str]]) -> "StepTrial":
        """Return a second copy for a single `forward`: neither compiled, which takes longer, nor in an optimizer."""
        other = copy.copy(self)
        with _GraphTensorsDetached():
            other.module = copy.deepcopy(self.module)
        other._attach(None)
        exchange_layers(other.module, (), change)
        return other

    def run(self) -> Any:
        """Run ``training_step`` and return what it returns."""
        arguments = [copy.deepcopy(self._batch)]
        if is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2):
            arguments.append(self._batch_idx)
        with self._trainer.precision_plugin.train_step_context():
            return self._training_step(*arguments)

    def forward(self) -> Tensor:
        """Run ``training_step`` and return its loss.

        Raises:
            TypeError: If it returns no loss.
        """
        output = self.run()
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError("`training_step` returned no loss")
        return loss

    @property
    def tolerance(self) -> float:
        """Relative difference of a loss that rounding can make."""
        exact = self._trainer.precision in ("32-true", "64-true") and self.module.device.type == "cpu"
        halves = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.module.parameters())
        return 1e-3 if exact and not halves else 3e-2

    def step(self) -> None:
        """Make one whole training step."""
        if not self.module.automatic_optimization:
            step_by_hand(self.module, self.optimizers, self._trainer, self.run)
            return
        self.module.backward(self.forward())
        clip = self._trainer.gradient_clip_val
        for optimizer in self.optimizers:
            if clip:
                self._trainer.precision_plugin.clip_gradients(optimizer, clip, self._clip_algorithm)
            optimizer.step()
            optimizer.zero_grad()

    def take_parameters(self, pl_module: "pl.LightningModule") -> None:
        """Give the copy's parameters the values of the run's, from which its steps have moved them."""
        values = {name: p for name, p in pl_module.named_parameters() if not nn.parameter.is_lazy(p)}
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name in values:
                    parameter.copy_(values[name])

    def recorded_inputs(self) -> RecordedInputs:
        """Make a training step's forward and return what the layers got."""
        recorder = RecordedInputs(self.module)
        with recorder:
            self.forward()
        return recorder


class _QuietTrainer:
    """The run's Trainer as a trial step may see it: nothing is logged, the optimizers are copies."""

    def __init__(self, trainer: "pl.Trainer", optimizers: list[torch.optim.Optimizer]) -> None:
        self._trainer = trainer
        self.optimizers = optimizers
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class _GraphTensorsDetached(TorchFunctionMode):
    """Copy without their history what modules keep of the last step (a loss, a metric's last value).

    ``copy.deepcopy`` refuses tensors that stand inside an autograd graph.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _silent(*_: object, **__: object) -> None:
    """Stand in for ``log`` and ``log_dict``."""
