"""Layers that a callback exchanges while asynchronous workers train: one worker exchanges them, the others follow."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_accel.async_sgd import ParameterStore
from lightning_accel.lightning_private import every_callback


@runtime_checkable
class TakesLayers(Protocol):
    """A callback that exchanges layers, and can follow an exchange that another process has made."""

    def prepare_module(self, module: nn.Module) -> None:
        """Let a module that other processes are going to train load the layers that they will have made."""

    def take_layers(self, trainer: Any, values: Mapping[str, Tensor]) -> None:
        """Exchange layers of this process's module for those of these values, by the names of parameters."""


def prepare_to_come_back(trainer: Any) -> None:
    """Let the caller's module take exchanged layers when the workers' result comes back, if a callback makes some."""
    for callback in every_callback(trainer):
        if isinstance(callback, TakesLayers):
            callback.prepare_module(trainer.lightning_module)


def follow_layers(trainer: Any, store: ParameterStore) -> None:
    """Give this worker's module the layers that the run has by now, and let its callbacks know."""
    mine = dict(trainer.lightning_module.named_parameters())
    values = dict(zip(store.parameter_names, store.snapshot().parameters, strict=True))
    new = {name: value for name, value in values.items() if name not in mine}
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    callback = next((found for found in every_callback(trainer) if isinstance(found, TakesLayers)), None)
    if callback is not None:  # else the store finds that this worker's layers are not the run's
        callback.take_layers(trainer, new)
