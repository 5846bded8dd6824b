"""Who else holds a layer, its weight or a copy of the network, and so would not follow an exchange of layers."""

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_accel.lightning_private import RECORDS, averaged_modules, callbacks_of
from lightning_accel.low_rank.copies import alike
from lightning_accel.low_rank.optimizers.kinds import why_not_followed
from lightning_accel.torch_private import own_attributes

_DEPTH = 5
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LIBRARIES = (
    *("torch.", "lightning.", "pytorch_lightning.", "lightning_fabric.", "lightning_utilities."),
    *("lightning_accel.", "torchmetrics.", "numpy.", "logging."),
)
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
    for owner, value in list(_places(trainer, module)):  # all at once: what is seen is known by its identity
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
        buffers = [b for b in part.buffers(recurse=False) if not nn.parameter.is_lazy(b)]
        yield f"{label} in its buffers", dict(enumerate(buffers))  # shapes alone say little there (codebooks)
        if isinstance(part, nn.ParameterList | nn.ParameterDict):
            yield label, list(part.parameters())
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
        known = {name: p for name, p in self.root.named_parameters() if not nn.parameter.is_lazy(p)}
        self.by_shape: defaultdict[tuple[int, ...], list[tuple[str, Tensor]]] = defaultdict(list)
        for name in dict.fromkeys([*self.shapes, *known]):  # weights to be exchanged before others like them
            self.by_shape[known[name].shape].append((name, known[name]))
        parts = [m for name, m in self.root.named_modules() if any(_is_in(layer, name) for layer in self.names)]
        lists = [_shapes(part.parameters()) for part in parts]
        self.lists = {shapes for shapes in lists if len(shapes) > 1}

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
        if isinstance(value, (Mapping, list, tuple, set, frozenset)) and (name := self._copied_in(value)):
            return f"{owner} keeps tensors like `{name}` and other parameters, as copies and averages are"
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
        if any(_shapes(part.parameters()) in self.lists for part in module.modules()):
            return f"{owner} holds a {type(module).__name__} that has the parameters of the network, as a copy has"
        return None

    def _copied_in(self, values: Any) -> str | None:
        """Return a weight that a container has a copy of, exact or averaged, if it has copies of other parameters, too.

        Copies of one alone are what somebody looks at; what works on several goes through the module's parameters.
        """
        found: dict[str, None] = {}
        for value in values.values() if isinstance(values, Mapping) else values:
            if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided:
                others = ((name, p) for name, p in self.by_shape[value.shape] if p is not value)
                like = (name for name, p in others if p.device == value.device and alike(value, p))
                found |= dict.fromkeys(itertools.islice(like, 1))
        return next((name for name in found if name in self.shapes), None) if len(found) > 1 else None

    def _is_value_of(self, key: object, value: object) -> bool:
        shape = getattr(value, "shape", None)  # of a tensor or an array
        if not isinstance(key, str) or not isinstance(shape, tuple):
            return False
        return any((name == key or name.endswith(f".{key}")) and shape == s for name, s in self.shapes.items())

    def _is_like_parameters(self, values: Sequence[Any]) -> bool:
        return all(isinstance(v, Tensor) for v in values) and _shapes(values) in self.lists


def _shapes(tensors: Iterable[Tensor]) -> tuple[tuple[int, ...] | None, ...]:
    """Return the shapes of tensors, None of those that have none before the first batch."""
    return tuple(None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape) for tensor in tensors)


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
