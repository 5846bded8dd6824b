"""Changing a module's layers inside a Trainer: checkpoints, optimizers, DDP and weight averages follow.

Changed structure is read from a checkpoint's keys and shapes, never from saved callback state: weights arrive before
callback states do, and weights-only checkpoints carry none. While ``fit`` resumes, the module stays dense until the
optimizers exist, so that ``configure_optimizers`` meets the same layers in a resumed run as in the first one; then the
factors take their places in module and optimizers (`StructureHook.held`).
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.callbacks.layer_exchange.first_steps import Exchange, factors_of, weight_of
from lightning_accel.lightning_private import averaged_modules, every_callback
from lightning_accel.low_rank import adapt_structure, low_rank_layers, merge, replace_parameters
from lightning_accel.low_rank.decompose import swap
from lightning_accel.low_rank.factors.layers import LOW_RANK_TYPES, LowRankConv
from lightning_accel.low_rank.in_place import as_it_is, copy_without_hooks
from lightning_accel.low_rank.optimizers.exchange import ProjectState

_log = logging.getLogger(__name__)

_HOOK = "_low_rank_structure_hook"
FACTORS = ("factor_in", "core", "factor_out")
_SWITCHING = {"SingleDeviceStrategy", "DDPStrategy"}
_SHARDED_STATES = {"ZeroRedundancyOptimizer"}
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}

Module = TypeVar("Module", bound="pl.LightningModule")


@runtime_checkable
class FollowsStructure(Protocol):
    """A callback that wants to know when layers were exchanged while the Trainer runs."""

    def on_structure_change(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", names: Sequence[str]) -> None:
        """Look up again what was taken from the layers ``names``."""


@runtime_checkable
class ChangesStructure(Protocol):
    """A callback that exchanges layers, now or later."""

    def structure_state(self) -> str:
        """Return ``"pending"``, ``"low rank"`` or ``"dense"``."""


@runtime_checkable
class RestsFactors(Protocol):
    """A callback that trains low-rank layers with a part of their factors at rest."""

    def phase_weights(self) -> tuple[float, float] | None:
        """Return the shares of the steps in which group 0 and group 1 rest; None where they are not known."""


@runtime_checkable
class SharesLayers(Protocol):
    """A strategy whose processes share parameters that none of them owns: rank 0 exchanges layers, all follow."""

    def exchanging_layers(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which layers are exchanged and the optimizers hold the moments of all processes."""


class StructureHook:
    """Make a module's layers fit each state dict it loads (a ``load_state_dict`` pre-hook of the root module).

    Attributes:
        deferred: While true, incoming factors are kept in ``held`` and the module stays, or becomes, dense.
        held: Full parameter name to factor, waiting for `release`.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.held: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "StructureHook":
        """A copy (of a weight average, say) has no optimizer to wait for: it adapts at once."""
        return StructureHook()

    def __call__(self, module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: object) -> None:
        """Adapt ``module``, or hold the factors back; called by torch before the module loads."""
        if not self.deferred:
            adapt_structure(module, state_dict, prefix)
            return
        incoming = [name for name, _ in module.named_modules() if f"{prefix}{name}.factor_in" in state_dict]
        merge(module, [name for name in low_rank_layers(module) if name in incoming])
        held = {f"{prefix}{name}.{factor}" for name in incoming for factor in FACTORS}
        adapt_structure(module, {key: value for key, value in state_dict.items() if key not in held}, prefix)
        for name in incoming:
            factors: dict[str, Tensor] = {}
            for factor in FACTORS:
                if (key := f"{prefix}{name}.{factor}") in state_dict:
                    factors[factor] = state_dict.pop(key).detach().clone()
            self.held |= {f"{name}.{factor}": value for factor, value in factors.items()}
            # Until the factors are in their places, others may read it: `configure_optimizers`, who copies a teacher.
            state_dict[f"{prefix}{name}.weight"] = LowRankConv.product(factors)  # as of a linear layer

    def defer(self) -> None:
        """Hold factors back until `release`."""
        self.deferred, self.held = True, {}

    def release(self) -> dict[str, Tensor]:
        """Return what was held back; from now on the module adapts at once."""
        held, self.held, self.deferred = self.held, {}, False
        return held


def load_factors(factors: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """Make layers of ``module`` low rank with these values (full parameter name to tensor); return their names."""
    names = adapt_structure(module, dict(factors))
    for name in names:
        for factor in low_rank_layers(module)[name].factor_names:
            module.get_parameter(f"{name}.{factor}").data.copy_(factors[f"{name}.{factor}"])
    return names


def structure_hook(module: nn.Module) -> StructureHook:
    """Return the module's hook, registered now if it has none yet."""
    hook = module.__dict__.get(_HOOK)
    if hook is None:
        hook = StructureHook()
        module.__dict__[_HOOK] = hook
        module.register_load_state_dict_pre_hook(hook)
    return hook


def enable_low_rank_loading(module: Module) -> Module:
    """Let ``module`` load state dicts of low-rank runs: its layers will follow the incoming keys and shapes.

    For code without the callback, e.g. ``Trainer().test(enable_low_rank_loading(Model()), ckpt_path=path)``.

    Args:
        module: Dense or low rank; changed when it loads, not now.

    Returns:
        The same module.

    Example:
        >>> from lightning_accel import enable_low_rank_loading
        >>> from lightning_accel.low_rank import decompose, low_rank_layers, make_plan
        >>> from lightning_accel.zoo import MLP
        >>> trained = MLP(width=16, depth=2)
        >>> _ = decompose(trained, make_plan(trained, None, ratio=2.0, method="fixed"))
        >>> fresh = MLP(width=16, depth=2)
        >>> handle = enable_low_rank_loading(fresh)
        >>> fresh.load_state_dict(trained.state_dict())
        <All keys matched successfully>
        >>> low_rank_layers(fresh).keys() == low_rank_layers(trained).keys()
        True
    """
    structure_hook(module)
    return module


def exchange_layers(
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    change: Callable[[nn.Module], Sequence[str]],
    project: ProjectState | None = None,
) -> Exchange:
    """Run ``change``, which factors layers of ``module`` in place, and put the factors in the weights' groups.

    Args:
        module: Changed in place.
        optimizers: Their groups keep their options and order; states are projected, see `replace_parameters`.
        change: Swaps dense layers for low-rank ones and returns their names.
        project: Makes the factors' states, see `replace_parameters`.

    Returns:
        What was done, with the dense layers.
    """
    before = {
        name: as_it_is(layer) for name, layer in module.named_modules() if layer._parameters.get("weight") is not None
    }
    names = list(change(module))
    factored = low_rank_layers(module)
    dense = {name: before[name] for name in names}
    trained = frozenset(name for name, layer in dense.items() if _was_trained(weight_of(layer), optimizers))
    exchange = Exchange(dense, {name: factors_of(factored[name]) for name in names}, trained=trained)
    replaced = {weight_of(dense): factored[name] for name, dense in exchange.dense.items()}
    for weight in replaced:
        weight.grad = None  # of the step before; what comes now comes by another way than the new layer
    for optimizer in optimizers:
        exchange.replacements.append(replace_parameters(optimizer, replaced, project=project))
        for line in exchange.replacements[-1].fresh:
            _log.info("the optimizer's moments start fresh for a weight of shape %s", line)
    return exchange


def _was_trained(weight: nn.Parameter, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Say whether a step has reached a weight, as far as its gradient and the optimizers' states tell."""
    if weight.grad is not None and bool(weight.grad.any()):
        return True
    return any(optimizer.state.get(weight) for optimizer in optimizers)


def exchange_layers_in_fit(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", change: Callable[[nn.Module], Sequence[str]]
) -> Exchange:
    """`exchange_layers`, and let the strategy, weight averages and other callbacks follow."""
    strategy = trainer.strategy
    with strategy.exchanging_layers() if isinstance(strategy, SharesLayers) else contextlib.nullcontext():
        return exchange_own_layers(trainer, pl_module, change)


def exchange_own_layers(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", change: Callable[[nn.Module], Sequence[str]]
) -> Exchange:
    """`exchange_layers_in_fit` in this process alone."""
    exchange = exchange_layers(pl_module, trainer.optimizers, change)
    if not exchange.names:
        return exchange
    rewrap_ddp(trainer)
    for average in averaged_modules(trainer):
        for name in exchange.names:
            old = average.get_submodule(name)
            if not isinstance(old, LOW_RANK_TYPES):  # else its averaged factors came with the checkpoint
                device = next(old.parameters()).device
                swap(average, name, copy_without_hooks(pl_module.get_submodule(name)).to(device))
    tell_callbacks(trainer, pl_module, exchange.names)
    return exchange


def tell_callbacks(trainer: "pl.Trainer", pl_module: "pl.LightningModule", names: Sequence[str]) -> None:
    """Let callbacks look up anew what they took from the layers ``names``."""
    for callback in every_callback(trainer):
        if isinstance(callback, FollowsStructure):
            callback.on_structure_change(trainer, pl_module, names)


def rewrap_ddp(trainer: "pl.Trainer") -> None:
    """Wrap the module anew, so that DDP reduces exactly the parameters that are trainable now.

    DDP looks at ``requires_grad`` and at the parameters once, when it wraps; a parameter thawed or made later would
    diverge silently. The new wrapper sends rank 0's parameters to all. Nothing to do for other strategies.
    """
    strategy = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        gc.collect()  # the old reducer leaves the gradients only when it is gone
        strategy.configure_ddp()  # type: ignore[attr-defined]  # strategies that wrap by DDP have it


def can_switch_in_fit(strategy: object) -> bool:
    """Say whether optimizers and wrappers of ``strategy`` follow `exchange_layers_in_fit`."""
    return isinstance(strategy, SharesLayers) or bool(_SWITCHING & {kind.__name__ for kind in type(strategy).__mro__})


def follows_others(trainer: "pl.Trainer") -> bool:
    """Say whether this process gets its layers from another one, and so decides nothing itself."""
    return isinstance(trainer.strategy, SharesLayers) and not trainer.is_global_zero


def refuse_unprepared(trainer: "pl.Trainer", module: nn.Module, accelerator: str) -> None:
    """Refuse a launcher that brings weights back into a module of the calling process that can not take them.

    Lightning loads them with ``strict=False``: factors would be dropped silently.

    Raises:
        MisconfigurationException: If the module has no `StructureHook` yet.
    """
    launchers = {kind.__name__ for kind in type(trainer.strategy.launcher).__mro__}
    if "_MultiProcessingLauncher" in launchers and _HOOK not in module.__dict__:
        raise MisconfigurationException(
            f"{accelerator} changes layers in a process that {type(trainer.strategy).__name__} starts, and the module "
            "you hold could not take the result back. Call `lightning_accel.enable_low_rank_loading(module)` before "
            "`fit`, or use strategy='ddp'."
        )


def refuse_sharded(strategy: object, accelerator: str) -> None:
    """Refuse strategies that shard parameters, or restore weights only after the optimizers exist.

    Raises:
        MisconfigurationException: With the strategies that work.
    """
    names = {kind.__name__ for kind in type(strategy).__mro__}
    if names & _SHARDED:
        raise MisconfigurationException(
            f"{accelerator} exchanges layers while the Trainer runs, which {type(strategy).__name__} does not allow: "
            "parameters are sharded and restored after the optimizers exist. Use strategy='ddp' or one device, or "
            "decompose the model yourself before the Trainer sees it (`lightning_accel.low_rank.decompose` with a "
            "saved `RankPlan`) and leave the callback out."
        )


def refuse_sharded_states(optimizers: Sequence[torch.optim.Optimizer], accelerator: str) -> None:
    """Refuse optimizers that deal parameters and states out to the processes when they are made.

    Raises:
        MisconfigurationException: With what works.
    """
    for optimizer in optimizers:
        names = {kind.__name__ for kind in type(optimizer).__mro__} & _SHARDED_STATES
        if names:
            raise MisconfigurationException(
                f"{accelerator} changes which parameters are trained while the Trainer runs, and {', '.join(names)} "
                "would deal them out anew and lose its states. Use the optimizer that it wraps, by itself."
            )
