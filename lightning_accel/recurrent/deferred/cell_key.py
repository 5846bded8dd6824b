"""What a cell is made of beside the values of its tensors: what was found of it holds while this is the same."""

import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_accel.recurrent.instance_forward import InstanceForward
from lightning_accel.torch_private import HOOK_DICTIONARIES, own_attributes

_SIMPLE = (int, float, str, bool, bytes, complex, type(None))
_DEEP = 3  # how far containers are looked into
_LONG = 64  # entries of one


def cell_key(cell: nn.Module) -> dict[str, Any]:
    """Describe a cell: its modules, their modes, hooks, forwards and attributes, its tensors' names, shapes and types.

    Equal keys mean that nothing changed that Python code of the cell could look at, as far as it belongs to the cell;
    what cannot be described counts by its identity.
    """
    key: dict[str, Any] = {}
    for name, module in cell.named_modules():
        prefix = f"{name}." if name else ""
        key[f"{prefix}<module>"] = (id(module), type(module).__qualname__, module.training)
        key[f"{prefix}<forward>"] = _forward(module)
        key[f"{prefix}<hooks>"] = tuple(
            (kind, tuple((k, id(hook)) for k, hook in module.__dict__[kind].items()))
            for kind in HOOK_DICTIONARIES
            if module.__dict__.get(kind) and not (kind.startswith("_forward") and module is cell)
        )
        for kind in ("_parameters", "_buffers"):
            for own, tensor in module.__dict__[kind].items():
                key[prefix + own] = None if tensor is None else _tensor(tensor)
        for own, value in own_attributes(module).items():
            if own != "forward":
                key[prefix + own] = _described(value, _DEEP)
        for own, value in _class_values(type(module)):
            key[f"{prefix}<class>.{own}"] = value
    return key


def changed_part(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Name what differs between two keys; ``None`` if nothing does."""
    if before == after:
        return None
    return next((name for name in {**before, **after} if before.get(name, _MISSING) != after.get(name, _MISSING)), None)


_MISSING = object()


def _tensor(tensor: Tensor) -> Any:
    return (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, type(tensor).__qualname__)


def _forward(module: nn.Module) -> Any:
    forward: Any = module.__dict__.get("forward")
    while isinstance(forward, InstanceForward):
        forward = forward.own
    return id(type(module).forward) if forward is None else ("own", id(forward))


def _described(value: Any, depth: int) -> Any:
    if isinstance(value, _SIMPLE):
        return (type(value).__name__, repr(value))
    if isinstance(value, Tensor):
        return ("tensor", id(value), value._version if not value.is_inference() else 0)
    if depth and isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LONG:
        return (type(value).__name__, *[_described(v, depth - 1) for v in value])
    if depth and isinstance(value, dict) and len(value) <= _LONG:
        return ("dict", *[(_described(k, 0), _described(v, depth - 1)) for k, v in value.items()])
    if isinstance(value, types.FunctionType):
        cells = tuple(_cell_contents(c) for c in value.__closure__ or ())
        return ("function", id(value), *[_described(v, depth - 1) for v in cells if depth])
    if depth and hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, nn.Module)):
        inside = tuple((k, _described(v, depth - 1)) for k, v in vars(value).items())
        return ("object", id(value), inside)
    length = len(value) if isinstance(value, (list, tuple, set, frozenset, dict)) else 0
    return ("object", id(value), length)


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _class_values(kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield simple attributes of a user's class and its bases, which all its instances share."""
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(base).items():
            if not name.startswith("__") and isinstance(value, _SIMPLE):
                yield f"{base.__qualname__}.{name}", repr(value)
