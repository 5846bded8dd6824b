"""The first steps with exchanged layers: they must be trained by nobody but the optimizers, else all go back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_accel.low_rank import low_rank_layers
from lightning_accel.low_rank.factors.layers import LowRankLayer
from lightning_accel.low_rank.optimizers.exchange import Replacement

_STEPS = 10  # after which a layer that had no gradient counts as one that never has


@dataclass(frozen=True)
class Exchange:
    """What an exchange of layers did, and what is needed to take it back.

    Attributes:
        dense: Name to a module that is what the layer was; holds the dense weight.
        factors: Name to the factors that took the weight's place.
        replacements: What was done to the optimizers.
        trained: Layers whose weights had a gradient or a state before; none where nobody knows, as in a first step.
    """

    dense: Mapping[str, nn.Module]
    factors: Mapping[str, tuple[nn.Parameter, ...]]
    replacements: list[Replacement] = field(default_factory=list)
    trained: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return list(self.dense)


@dataclass
class FirstSteps:
    """Looks whether new layers are trained.

    No look before the switch sees all ways to a weight: code outside the module, branches that a trial did not take,
    writes between steps. After the switch they show: a dense weight that still gets gradients or is written to, factors
    that get none, or that change between two steps.

    Args:
        exchange: Keeps the dense weights until the look is over.
    """

    exchange: Exchange
    _steps: int = 0
    _trained: set[str] = field(default_factory=set)
    _values: dict[str, Tensor] = field(default_factory=dict)  # at the end of the last step
    _before: dict[str, Tensor] = field(default_factory=dict)  # dense weights, as they were
    _epoch: int = -1  # of the last step; at the end of an epoch callbacks may well project or average

    def __post_init__(self) -> None:
        self._before = {name: weight_of(layer).detach().clone() for name, layer in self.exchange.dense.items()}

    def at_batch_start(self, trainer: "pl.Trainer", module: nn.Module) -> str | None:
        """Say what has changed the factors since the last step of this epoch; None if nothing has."""
        if trainer.current_epoch != self._epoch:
            return None
        for name, layer in self._layers(module).items():
            for factor in layer.factor_names:
                kept = self._values.get(f"{name}.{factor}")
                now = getattr(layer, factor)
                if kept is not None and kept.shape == now.shape and not torch.equal(kept, now.detach()):
                    return f"something else than an optimizer writes into the parameters of `{name}` between steps"
        return None

    def at_batch_end(self, trainer: "pl.Trainer", module: nn.Module) -> str | None:
        """Say what is wrong after a step; None if nothing is, or not yet."""
        self._steps, self._epoch = self._steps + 1, trainer.current_epoch
        layers = self._layers(module)
        for name in self.exchange.dense:
            weight = weight_of(self.exchange.dense[name])
            if weight.grad is not None and name in layers:
                return f"the model reaches the dense weight of `{name}` by another way than its layer"
            if not torch.equal(weight.detach(), self._before[name]):
                return f"something holds the dense weight of `{name}` and writes into it"
        for name, layer in layers.items():
            factors = {factor: getattr(layer, factor) for factor in layer.factor_names}
            if name not in self._trained and any(self._moves(f"{name}.{key}", f) for key, f in factors.items()):
                self._trained.add(name)
            for key, factor in factors.items():
                self._values[f"{name}.{key}"] = factor.detach().clone()
        if self._steps < _STEPS * trainer.accumulate_grad_batches:
            return None
        idle = self._idle(module) - self.unused(module)
        if idle:
            names = ", ".join(f"`{name}`" for name in sorted(idle)[:3])
            return f"the factors of {names} got no gradient in {self._steps} steps"
        return None

    def unused(self, module: nn.Module) -> set[str]:
        """Return the layers that no step has trained, neither before the exchange, when others were, nor since."""
        return self._idle(module) - self.exchange.trained if self.exchange.trained else set()

    def _idle(self, module: nn.Module) -> set[str]:
        frozen = {name for name, layer in self.exchange.dense.items() if not weight_of(layer).requires_grad}
        layers = self._layers(module)
        since = {
            name for name, layer in layers.items() if not any(factor.requires_grad for factor in factors_of(layer))
        }
        return layers.keys() - frozen - since - self._trained

    @property
    def steps(self) -> int:
        """Batches since the exchange."""
        return self._steps

    def forget(self, names: list[str]) -> None:
        """Look no more at layers that are dense again."""
        self._trained |= set(names)

    def over(self, trainer: "pl.Trainer") -> bool:
        """Say whether everything was seen: all layers are trained, and two starts of a batch came after a step."""
        wanted = {name for name, layer in self.exchange.dense.items() if weight_of(layer).requires_grad}
        steps = self._steps // trainer.accumulate_grad_batches
        return (wanted <= self._trained and steps >= 3) or steps >= _STEPS

    def _layers(self, module: nn.Module) -> dict[str, LowRankLayer]:
        return {name: layer for name, layer in low_rank_layers(module).items() if name in self.exchange.dense}

    def _moves(self, key: str, factor: nn.Parameter) -> bool:
        """Say whether a factor has a gradient; where that is cleared already, whether the last step has moved it."""
        if factor.grad is not None:
            return bool(factor.grad.any())
        before = self._values.get(key)
        return before is not None and not torch.equal(before, factor.detach())


def factors_of(layer: LowRankLayer) -> tuple[nn.Parameter, ...]:
    """Return the factors of a layer, in their order."""
    return tuple(getattr(layer, name) for name in layer.factor_names)


def weight_of(dense: nn.Module) -> nn.Parameter:
    """Return the weight of a dense layer, by the name that pruning gives it where the layer is pruned."""
    weight = dense._parameters.get("weight", dense._parameters.get("weight_orig"))
    assert weight is not None
    return weight
