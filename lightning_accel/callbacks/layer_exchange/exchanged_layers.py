"""Low-rank layers in a running fit: followed when they become dense, put back when they do not train."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_accel.callbacks.layer_exchange.first_steps import Exchange, FirstSteps, factors_of, weight_of
from lightning_accel.callbacks.layer_exchange.structure import SharesLayers, rewrap_ddp, tell_callbacks
from lightning_accel.lightning_private import averaged_modules
from lightning_accel.low_rank import low_rank_layers
from lightning_accel.low_rank.factors.factored import is_low_rank
from lightning_accel.low_rank.factors.layers import LOW_RANK_TYPES
from lightning_accel.low_rank.in_place import become, copy_without_hooks
from lightning_accel.low_rank.optimizers.exchange import orphans, put_weight, undo_replacement
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
    _layers: dict[str, nn.Module] = field(default_factory=dict)  # these: others may stand in their places by now

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exchange: Exchange) -> None:
        """Watch layers that were exchanged just now."""
        self._watch(pl_module)
        if exchange.names and not isinstance(trainer.strategy, SharesLayers):  # where others move parameters, too
            self.first = FirstSteps(exchange)

    def resume(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watch layers that were low rank before, and say which of them this fit will not train."""
        self._watch(pl_module)
        if not trainer.optimizers or isinstance(trainer.strategy, SharesLayers):
            return
        named = {name: {str(i): factor for i, factor in enumerate(self.factors[name])} for name in self.factors}
        untrained = [name for name in named if len(orphans(trainer.optimizers, named[name])) == len(named[name])]
        if untrained:
            names = ", ".join(f"`{name}`" for name in untrained)
            rank_zero_warn(
                f"no optimizer holds the factors of {names}: this fit leaves these low-rank layers as they are. Where "
                "`configure_optimizers` chooses parameters by their names, it has to take `factor_in`, `core` and "
                "`factor_out`, too; or make the module dense before (`lightning_accel.low_rank.merge`)."
            )

    def _watch(self, module: nn.Module) -> None:
        self.end()
        for name, layer in low_rank_layers(module).items():
            self.factors[name], self._layers[name] = factors_of(layer), layer
            layer.followed = True

    def end(self) -> None:
        """Forget everything; from now on layers say themselves when they become dense."""
        for layer in self._layers.values():
            if isinstance(layer, LOW_RANK_TYPES):
                layer.followed = False
        self.first, self.factors, self._layers = None, {}, {}

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
            self._put_back(name, first.exchange.dense[name])
        self._now_dense(trainer, pl_module, alike)
        return dict.fromkeys(alike, f"it got no gradient in {first.steps} steps")

    def _written(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> dict[str, str]:
        """Give the optimizers the weights of layers that became dense by themselves."""
        names = [name for name, layer in self._layers.items() if not is_low_rank(layer)]
        hooked = {name for name in names if gradient_hooks_of(weight_of(self._layers[name]))}
        self._now_dense(trainer, pl_module, names)
        return {name: HOOKED if name in hooked else WRITTEN for name in names}

    def _now_dense(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", names: list[str]) -> None:
        layers = {name: self._layers.pop(name) for name in names}
        for name, layer in layers.items():
            factors = self.factors.pop(name)
            for optimizer in trainer.optimizers:
                put_weight(optimizer, factors, weight_of(layer))
        if names:
            if self.first is not None:
                self.first.forget(names)
            _let_others_follow(trainer, pl_module, layers)

    def _judged(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", why: str | None) -> dict[str, str]:
        """Put all layers back if something is wrong with one, on any process."""
        if self.first is None:
            return {}
        if not trainer.strategy.reduce_boolean_decision(why is not None, all=False):
            return {}
        exchange = self.first.exchange
        names = [name for name in exchange.names if name in self.factors]
        layers = {name: self._layers[name] for name in names}
        for name, layer in layers.items():
            self._put_back(name, exchange.dense[name])
            weight_of(layer).grad = None
        for replacement in exchange.replacements:
            undo_replacement(replacement, [weight_of(exchange.dense[name]) for name in names])
        self._watch(pl_module)  # layers that were low rank before the exchange
        _let_others_follow(trainer, pl_module, layers)
        return dict.fromkeys(names, why or "another process found that they can not be exchanged")

    def _put_back(self, name: str, dense: nn.Module) -> None:
        """Let a layer be what it was, as frozen as it is by now."""
        layer, trains = self._layers[name], any(factor.requires_grad for factor in self.factors[name])
        training = layer.training
        become(layer, dense)
        layer.train(training)
        weight_of(layer).requires_grad_(trains)


def _let_others_follow(trainer: "pl.Trainer", pl_module: "pl.LightningModule", layers: Mapping[str, nn.Module]) -> None:
    rewrap_ddp(trainer)
    for average in averaged_modules(trainer):
        for name, layer in layers.items():
            old = average.get_submodule(name)
            with torch.no_grad():
                become(old, copy_without_hooks(layer).to(next(old.parameters()).device))
    tell_callbacks(trainer, pl_module, list(layers))
