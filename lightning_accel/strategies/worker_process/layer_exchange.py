"""Layers that become low rank while asynchronous workers train: one worker exchanges them, the others follow."""

import functools
from typing import Any

from lightning_accel.async_sgd import ParameterStore
from lightning_accel.callbacks.layer_exchange.structure import (
    ChangesStructure,
    enable_low_rank_loading,
    exchange_own_layers,
    load_factors,
)
from lightning_accel.lightning_private import every_callback


def prepare_to_come_back(trainer: Any) -> None:
    """Let the caller's module take low-rank layers when the workers' result comes back, if a callback makes some."""
    if any(isinstance(callback, ChangesStructure) for callback in every_callback(trainer)):
        enable_low_rank_loading(trainer.lightning_module)


def follow_layers(trainer: Any, store: ParameterStore) -> None:
    """Give this worker's module the low-rank layers that the run has by now, and let its callbacks know."""
    module = trainer.lightning_module
    mine = dict(module.named_parameters())
    values = dict(zip(store.parameter_names, store.snapshot().parameters, strict=True))
    factors = {name: value for name, value in values.items() if name not in mine}
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    exchange_own_layers(trainer, module, functools.partial(load_factors, factors))
