"""Low-rank layers that another process has made, in this one's module: what a strategy asks of a callback."""

import functools
from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_accel.callbacks.layer_exchange.structure import exchange_own_layers, load_factors, structure_hook


class TakesLayers:
    """A callback that exchanges layers, of which one process decides for all that share parameters."""

    def prepare_module(self, module: nn.Module) -> None:
        """Let a module that other processes are going to train load the layers that they will have made."""
        structure_hook(module)

    def take_layers(self, trainer: "pl.Trainer", values: Mapping[str, Tensor]) -> None:
        """Make layers of this process's module low rank with these values, by the names of parameters that are new."""
        exchange_own_layers(trainer, trainer.lightning_module, functools.partial(load_factors, values))
