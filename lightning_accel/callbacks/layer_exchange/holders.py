"""Who else holds a layer, its weight or a copy of the network, and so would not follow an exchange of layers."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_accel.lightning_private import RECORDS, averaged_modules, callbacks_of
from lightning_accel.low_rank.optimizers.kinds import why_not_followed
from lightning_accel.torch_private import own_attributes

_DEPTH = 5
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LIBRARIES = ("torch.", "lightning.", "lightning_", "pytorch_lightning.", "torchmetrics.", "numpy.", "logging.")
_LINKS = ("_trainer", "_fabric", "trainer")  # from a module back to the run


def why_not_exchanged(trainer: "pl.Trainer", module: "pl.LightningModule", names: Sequence[str]) -> str | None:
    """Say why the layers ``names`` can not be exchanged in this fit; None if nothing is known against it.

    An exchange is right only if everything that works with a weight works with its factors afterwards: optimizers that
    look into their groups, code that goes through the module. What keeps weights, lists of tensors like the module's
    parameters, or a copy of the network elsewhere goes on with what was.
    """
    for optimizer in trainer.optimizers:
        if why := why_not_followed(optimizer):
            return why
    known = {id(average) for average in averaged_modules(trainer)}
    search = _Search(module, names, known)
    for owner, value in _places(trainer, module):
        if why := search.visit(value, owner, _DEPTH):
            return why
    return None


def _places(trainer: "pl.Trainer", module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what users keep beside parameters and submodules, and its name."""
    for name, part in module.named_modules():
        label = f"{type(part).__name__} `{name}`" if name else type(part).__name__
        for attribute, value in own_attributes(part).items():
            if attribute not in _LINKS and attribute not in RECORDS:
                yield f"`{attribute}` of {label}", value
        for hooks in _HOOKS:
            for hook in part.__dict__.get(hooks, {}).values():
                yield f"a hook of {label}", hook
    others: list[object] = [c for c in callbacks_of(trainer) if not type(c).__module__.startswith("lightning_accel.")]
    if getattr(trainer, "datamodule", None) is not None:
        others.append(trainer.datamodule)  # type: ignore[attr-defined]
    for other in others:
        if isinstance(other, nn.Module) or type(other).__module__.startswith(LIBRARIES):
            continue
        for attribute, value in vars(other).items():
            if attribute not in _LINKS and attribute not in RECORDS:
                yield f"`{attribute}` of {type(other).__name__}", value


@dataclass
class _Search:
    root: nn.Module
    names: Sequence[str]
    known: set[int]
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.modules = {id(module) for module in self.root.modules()}
        self.layers = {id(self.root.get_submodule(name)): name for name in self.names}
        weights = {name: self.root.get_submodule(name)._parameters["weight"] for name in self.names}
        self.weights = {id(weight): name for name, weight in weights.items()}
        self.shapes = {f"{name}.weight": weight.shape for name, weight in weights.items() if weight is not None}
        parts = [m for name, m in self.root.named_modules() if any(_is_in(layer, name) for layer in self.names)]
        lists = [[tuple(p.shape) for p in part.parameters()] for part in parts]
        self.lists = {tuple(shapes) for shapes in lists if len(shapes) > 1}

    def visit(self, value: Any, owner: str, depth: int) -> str | None:
        """Say what ``value`` keeps, or return None."""
        if id(value) in self.layers:
            return f"{owner} holds the layer `{self.layers[id(value)]}` beside the module that owns it"
        if id(value) in self.weights:
            return f"{owner} holds the weight of `{self.weights[id(value)]}`"
        if depth == 0 or id(value) in self.seen or isinstance(value, (Tensor, str, bytes, int, float, bool, type)):
            return None
        self.seen.add(id(value))
        if isinstance(value, nn.Module):
            return self._module(value, owner)
        if isinstance(value, Mapping):
            if name := next((k for k in value if self._is_value_of(k, value[k])), None):
                return f"{owner} keeps values by the names of parameters (`{name}`)"
        elif isinstance(value, (list, tuple)) and self._is_like_parameters(value):
            return f"{owner} keeps tensors like the module's parameters, in their order"
        return next((why for part in _parts(value) if (why := self.visit(part, owner, depth - 1))), None)

    def _module(self, module: nn.Module, owner: str) -> str | None:
        if id(module) in self.modules or id(module) in self.known:
            return None
        for part in module.modules():
            if id(part) in self.layers:
                return f"{owner} holds the layer `{self.layers[id(part)]}` beside the module that owns it"
        for parameter in module.parameters():
            if id(parameter) in self.weights:
                return f"{owner} holds the weight of `{self.weights[id(parameter)]}`"
        if any(tuple(tuple(p.shape) for p in part.parameters()) in self.lists for part in module.modules()):
            return f"{owner} holds a {type(module).__name__} that has the parameters of the network, as a copy has"
        return None

    def _is_value_of(self, key: object, value: object) -> bool:
        if not isinstance(key, str) or not isinstance(value, Tensor):
            return False
        return any(
            (name == key or name.endswith(f".{key}")) and shape == value.shape for name, shape in self.shapes.items()
        )

    def _is_like_parameters(self, values: Sequence[Any]) -> bool:
        return all(isinstance(v, Tensor) for v in values) and tuple(tuple(v.shape) for v in values) in self.lists


def _parts(value: Any) -> Iterator[Any]:
    """Yield what can be reached from a plain object in one step."""
    if isinstance(value, Mapping):
        yield from value.values()
        yield from value.keys()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, FunctionType):
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            for cell in value.__closure__ or ():
                yield cell.cell_contents
    elif hasattr(value, "__dict__") and not type(value).__module__.startswith(LIBRARIES):
        yield from vars(value).values()


def _is_in(layer: str, part: str) -> bool:
    return not part or layer == part or layer.startswith(f"{part}.")
