"""Low-rank layers in a running fit: followed when they become dense, put back when they do not train."""

import copy
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_accel.callbacks.layer_exchange.first_steps import Exchange, FirstSteps, factors_of, weight_of
from lightning_accel.callbacks.layer_exchange.structure import SharesLayers, rewrap_ddp, tell_callbacks
from lightning_accel.lightning_private import averaged_modules
from lightning_accel.low_rank import low_rank_layers
from lightning_accel.low_rank.factors.layers import LOW_RANK_TYPES
from lightning_accel.low_rank.in_place import become
from lightning_accel.low_rank.optimizers.exchange import put_weight, undo_replacement
from lightning_accel.torch_private import gradient_hooks_of

WRITTEN = "its weight was written into, which factors can not follow"
HOOKED = "a gradient hook was put on its weight, which factors can not follow"


@dataclass
class ExchangedLayers:
    """Watches the low-rank layers of a fit from their exchange on; does nothing before.

    Attributes:
        first: Looks at the first steps; None before the exchange and when they are over.
        factors: Name to the factors of each layer that is low rank.
    """

    first: FirstSteps | None = None
    factors: dict[str, tuple[nn.Parameter, ...]] = field(default_factory=dict)

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exchange: Exchange) -> None:
        """Watch layers that were exchanged just now."""
        self.resume(pl_module)
        if exchange.names and not isinstance(trainer.strategy, SharesLayers):  # where others move parameters, too
            self.first = FirstSteps(exchange)

    def resume(self, module: nn.Module) -> None:
        """Watch layers that were low rank before; what they were is not known any more."""
        self.first, self.factors = None, {}
        for name, layer in low_rank_layers(module).items():
            self.factors[name] = factors_of(layer)
            layer.followed = True

    def end(self) -> None:
        """Forget everything."""
        self.first, self.factors = None, {}

    def at_batch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> dict[str, str]:
        """Return layers that are dense from now on, each with the reason."""
        return self._written(trainer, pl_module) or self._judged(
            trainer, pl_module, None if self.first is None else self.first.at_batch_start(trainer, pl_module)
        )

    def before_update(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> dict[str, str]:
        """Return layers that became dense in the step under way, after the optimizers were given their weights."""
        return self._written(trainer, pl_module)

    def at_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> dict[str, str]:
        """Return layers that are dense from now on, each with the reason."""
        if self.first is None:
            return {}
        judged = self._judged(trainer, pl_module, self.first.at_batch_end(trainer, pl_module))
        if not judged and self.first is not None and self.first.over(trainer):
            judged = self._idle(trainer, pl_module, self.first)
            self.first = None
        return judged

    def _idle(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", first: FirstSteps) -> dict[str, str]:
        """Put back layers that no step uses: what they are changes nothing, so the others keep their training.

        Processes may use different layers; one that was used by any stays.
        """
        idle = first.unused(pl_module)
        alike = [
            name
            for name in first.exchange.names
            if trainer.strategy.reduce_boolean_decision(name in idle and name in self.factors, all=True)
        ]
        for name in alike:
            place = pl_module.get_submodule(name)
            training = place.training
            become(place, first.exchange.dense[name])
            place.train(training)
        self._now_dense(trainer, pl_module, alike)
        return dict.fromkeys(alike, f"it got no gradient in {first.steps} steps")

    def _written(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> dict[str, str]:
        """Give the optimizers the weights of layers that became dense by themselves."""
        names = [name for name in self.factors if not _is_low_rank(pl_module.get_submodule(name))]
        hooked = {name for name in names if gradient_hooks_of(weight_of(pl_module.get_submodule(name)))}
        self._now_dense(trainer, pl_module, names)
        return {name: HOOKED if name in hooked else WRITTEN for name in names}

    def _now_dense(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", names: list[str]) -> None:
        for name in names:
            weight = weight_of(pl_module.get_submodule(name))
            for optimizer in trainer.optimizers:
                put_weight(optimizer, self.factors[name], weight)
            del self.factors[name]
        if names:
            if self.first is not None:
                self.first.forget(names)
            _let_others_follow(trainer, pl_module, names)

    def _judged(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", why: str | None) -> dict[str, str]:
        """Put all layers back if something is wrong with one, on any process."""
        if self.first is None:
            return {}
        if not trainer.strategy.reduce_boolean_decision(why is not None, all=False):
            return {}
        exchange = self.first.exchange
        names = [name for name in exchange.names if name in self.factors]
        for name in names:
            place = pl_module.get_submodule(name)
            training = place.training
            become(place, exchange.dense[name])
            place.train(training)
            weight_of(place).grad = None
        for replacement in exchange.replacements:
            undo_replacement(replacement, [weight_of(exchange.dense[name]) for name in names])
        self.end()
        _let_others_follow(trainer, pl_module, names)
        return dict.fromkeys(names, why or "another process found that they can not be exchanged")


def _let_others_follow(trainer: "pl.Trainer", pl_module: "pl.LightningModule", names: list[str]) -> None:
    rewrap_ddp(trainer)
    for average in averaged_modules(trainer):
        for name in names:
            old = average.get_submodule(name)
            with torch.no_grad():
                become(old, copy.deepcopy(pl_module.get_submodule(name)).to(next(old.parameters()).device))
    tell_callbacks(trainer, pl_module, names)


def _is_low_rank(layer: nn.Module) -> bool:
    return isinstance(layer, LOW_RANK_TYPES) and layer.settle()
