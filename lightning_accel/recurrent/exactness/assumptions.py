"""What a trace of a cell takes for granted, as a key: equal keys mean that the trace still says what the cell does.

A trace keeps the operations of one step, not the Python that chose them. So everything that Python may have looked at
is written down: the modules, their hooks, parameters and attributes, the globals and closures that their code names,
and what those hold in turn. What can not be written down (an iterator, a tensor that wants a gradient of its own) is a
doubt, and a cell with a doubt runs the plain loop.
"""

import enum
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel import torch_private
from lightning_accel.recurrent.exactness.closed_parts import why_closed
from lightning_accel.recurrent.exactness.code_names import NamedByCode, imported, is_fixed, is_library, names_of
from lightning_accel.recurrent.exactness.containers import fixed_contents, numbers_of, plain_contents
from lightning_accel.recurrent.exactness.members import attributes_of, called_from, function_of, members_of, own_bases
from lightning_accel.recurrent.instance_forward import InstanceForward

_MOST_VALUES = 20_000
_SMALL_ARRAY_BYTES = 2**16
_ATOMS = (int, str, bool, bytes, complex, type(None), type(...), torch.dtype, torch.device, torch.Size, range)
# Reading one of these may make the step depend on the number of streams.
_SIZE_NAMES = frozenset({"shape", "size", "len", "numel", "nelement", "stride", "__len__", "nbytes", "tolist"})
_OWN_DRAWS = ("random", "secrets", "numpy.random", "time")
_CONTAINERS = (list, tuple, set, frozenset, dict, deque)
_CHANGED_BY = ("__setitem__", "set", "value")  # objects of C that do not show what they hold: arrays, context variables


@dataclass(frozen=True)
class Assumptions:
    """What a trace takes for granted.

    Attributes:
        key: Equal for two moments between which nothing changed that the step may look at.
        doubt: Why no trace can be trusted; ``None`` if one can.
        reads_sizes: Whether the step's own code reads sizes, and so may branch on the number of streams.
        held: Objects whose identity is part of the key, kept alive so that no other gets it.
    """

    key: tuple[Any, ...]
    doubt: str | None
    reads_sizes: bool
    held: tuple[Any, ...]


def assumptions_of(module: nn.Module, loaded: Mapping[str, types.ModuleType] | None = None) -> Assumptions:
    """Write down what a trace of ``module`` would take for granted now.

    Args:
        module: The cell.
        loaded: Modules that imports within its code lead to, by default all that are loaded now.
    """
    walk = _Walk(module, loaded=loaded)
    walk.module(module, "")
    return Assumptions(tuple(walk.values), walk.doubt, walk.reads_sizes, tuple(walk.held))


def first_change(module: nn.Module, before: Assumptions) -> str:
    """Name what differs now from ``before``, as far as a name can be given."""
    walk = _Walk(module, named=True)
    walk.module(module, "")
    for name, old, new in zip(walk.names, before.key, walk.values, strict=False):
        if old != new:
            return f"`{name}`" if name else "what it holds"
    return "something that its code reads"


def change_between(module: nn.Module, before: Assumptions, now: Assumptions) -> str | None:
    """Say what changed from one moment to the other, which is now; ``None`` if nothing did."""
    if before.key != now.key:
        return f"{first_change(module, before)} of it changed"
    return now.doubt if before.doubt is None else None


class _Walk:
    """A walk over everything that a module's code can reach."""

    def __init__(
        self, root: nn.Module, *, named: bool = False, loaded: Mapping[str, types.ModuleType] | None = None
    ) -> None:
        self._registered = {id(m) for m in root.modules()}
        self.values: list[Any] = []
        self.names: list[str] = []
        self.held: list[Any] = []
        self.doubt: str | None = None
        self.reads_sizes = False
        self._named = named
        self._loaded = sys.modules if loaded is None else loaded
        self._seen: dict[int, int] = {}
        self._read: dict[str, None] = {}  # attributes that the code so far reads of anything
        self._looked_up: dict[int, int] = {}  # how many of them in a module or class

    def module(self, root: nn.Module, path: str) -> None:
        """Write down a module with all it holds."""
        if self._seen_before(root, path):
            return
        self._note(path, type(root))
        self._note(f"{path}.training", root.training)
        # Who stands before a cell's forward lets torch call the hooks on the cell itself, once a step.
        stood_before = path == "" and isinstance(root.__dict__.get("forward"), InstanceForward)
        hooks = torch_private.hooks_of(root, but_forward=stood_before)
        if hooks is not None:
            self._doubt(f"{_place(path)} has {hooks}")
        if closed := why_closed(root):
            self._doubt(f"{_place(path)} {closed}")
            return
        if torch_private.is_compiled(root):
            self._doubt(f"{_place(path)} is compiled")
        self._class(type(root), path)
        for name, parameter in (*torch_private.parameters_of(root).items(), *torch_private.buffers_of(root).items()):
            if parameter is None or id(root) in self._registered:
                self._weight(parameter, f"{path}.{name}")
            else:  # nobody hands its weights to a schedule, so a trace bakes them in
                self._closed_over(parameter, f"{path}.{name}")
        own = torch_private.own_attributes(root)
        self._note(path, tuple(name for name in own if name != "forward"))
        for name, value in own.items():
            while isinstance(value, InstanceForward):  # stands before what the cell's own code is
                value = value.own  # noqa: PLW2901
            if name != "forward" or value is not None:
                self.value(value, f"{path}.{name}")
        for name, child in torch_private.children_of(root).items():
            if child is None:
                self._note(f"{path}.{name}", None)
            else:
                self.module(child, f"{path}.{name}")

    def value(self, value: Any, path: str) -> None:
        """Write down any value."""
        while isinstance(value, InstanceForward):
            value = value.own
        kind = type(value)
        if kind is float:
            self._note(path, ("float", value.hex()))
        elif kind in _ATOMS:
            self._note(path, (kind, value))
        elif isinstance(value, Tensor):
            self._closed_over(value, path)
        elif isinstance(value, enum.Enum):
            self._identity(value, path)
        elif isinstance(value, (type, types.ModuleType)):
            self._members(value, path)
        elif isinstance(value, (types.BuiltinFunctionType, weakref.ReferenceType)):
            self._identity(value, path)
            self.value(value() if isinstance(value, weakref.ReferenceType) else value.__self__, path)
        elif isinstance(value, nn.Module):
            if id(value) in self._registered:  # written down in its own place
                self._identity(value, path)
            else:
                self.module(value, path)
        elif (contents := plain_contents(value)) is not None:
            self._note(path, contents)
        elif (contents := fixed_contents(value)) is not None:
            self.held += value.values() if kind is dict else value
            self._note(path, contents)
        elif self._seen_before(value, path):
            return
        elif isinstance(value, _CONTAINERS):
            self._container(value, path)
        elif isinstance(value, types.FunctionType):
            self.function(value, path)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, path)
            self.value(value.__self__, f"{path}.__self__")
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(part, path)
        elif hasattr(value, "__next__"):
            self._doubt(f"{_place(path)} is an iterator, which another step may find elsewhere")
        else:
            self._object(value, path)

    def function(self, function: types.FunctionType, path: str) -> None:
        """Write down what a function's code names: globals, closures, defaults."""
        self._identity(function.__code__, path)
        if is_library(function.__module__):
            self._draws(function.__module__)
            return
        named = names_of(function.__code__)
        self._read.update(dict.fromkeys(named.attributes_in_order))
        self.reads_sizes = self.reads_sizes or not _SIZE_NAMES.isdisjoint(named.attributes | named.globals)
        for k, default in enumerate(function.__defaults__ or ()):
            self.value(default, f"{path} default {k}")
        for name, value in ((function.__kwdefaults__ or {}) | function.__dict__).items():
            self.value(value, f"{path} {name}")
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                held = cell.cell_contents
            except ValueError:  # not yet filled
                continue
            if isinstance(held, nn.Module) and id(held) in self._registered:  # a copy's function reads this one's
                for tensor in (*held.parameters(), *held.buffers()):
                    self._identity(tensor, name)
            self.value(held, name)
        for name in named.ordered:
            if name in function.__globals__:
                self._global(name, function.__globals__[name], named)
        for name in imported(function):
            if name in self._loaded:
                self._global(name, self._loaded[name], named)

    def _global(self, name: str, value: Any, named: NamedByCode) -> None:
        if isinstance(value, types.ModuleType) and value.__name__ == "numpy" and "random" in named.attributes:
            self._draws("numpy.random")
        self.value(value, name)

    def _members(self, value: types.ModuleType | type, path: str) -> None:
        """Write down what a module or a class holds under names that the code so far reads of anything."""
        self._identity(value, path)
        home = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
        self._draws(home)
        if is_library(home):
            return
        while (start := self._looked_up.get(id(value), 0)) < len(self._read):  # what it holds may read further names
            self._looked_up[id(value)] = len(self._read)
            for name, member in members_of(value, tuple(islice(self._read, start, None))):
                if (function := function_of(member)) is None:
                    self.value(member, f"{path}.{name}")
                elif not self._seen_before(function, path):
                    self.function(function, f"{path}.{name}")

    def _class(self, kind: type, path: str) -> None:
        """Write down what classes hold beside their instances: class attributes, and methods that may be called."""
        if self._seen_before(kind, path):
            return
        versions: dict[str, list[types.FunctionType]] = {}
        held: dict[str, Any] = {}
        for base in own_bases(kind):
            for name, member in base.__dict__.items():
                held.setdefault(name, member)
                if name != "__init__" and (function := function_of(member)) is not None:
                    versions.setdefault(name, []).append(function)
        for name, member in held.items():
            if function_of(member) is None and not name.startswith("__"):
                self.value(member, f"{path}.{name}")
        narrow = issubclass(kind, nn.Module) and "forward" in versions  # then only what a call may reach
        first = [n for n in versions if not narrow or n == "forward" or n.startswith("__") or n in self._read]
        for function, name in called_from(first, versions).items():
            if not self._seen_before(function, path):
                self.function(function, f"{path}.{name}")

    def _weight(self, weight: Tensor | None, path: str) -> None:
        """Write down a parameter or buffer: its value is read at every call, so its kind counts and not its value."""
        if weight is None:
            self._note(path, None)
            return
        tied = self._seen.setdefault(id(weight), len(self._seen))
        self._note(path, (tied, weight.dtype, weight.device, weight.requires_grad, type(weight)))
        if isinstance(weight, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            self._doubt(f"{_place(path)} has no shape yet")
            return
        self._note(path, tuple(weight.shape))
        if type(weight) not in (Tensor, nn.Parameter, nn.Buffer):
            self._doubt(f"{_place(path)} is a {type(weight).__name__}")
        elif weight.layout is not torch.strided or weight.is_complex() or weight.is_quantized:
            self._doubt(f"{_place(path)} is complex, sparse or quantized")

    def _closed_over(self, tensor: Tensor, path: str) -> None:
        """Write down a tensor that is neither parameter nor buffer: a trace bakes it in."""
        version = None if tensor.is_inference() else tensor._version
        self._identity(tensor, path)
        self._note(path, (version, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, numbers_of(tensor)))
        if tensor.requires_grad:
            self._doubt(f"{_place(path)} wants a gradient and is no registered parameter")

    def _container(self, value: Any, path: str) -> None:
        self._note(path, (type(value), len(value)))
        if isinstance(value, dict):
            for key, item in tuple(value.items()):
                self.value(key, path)
                self.value(item, f"{path}[{key!r}]" if self._named else path)
        else:
            for k, item in enumerate(_sorted(value) if isinstance(value, (set, frozenset)) else tuple(value)):
                self.value(item, f"{path}[{k}]" if self._named else path)
        if type(value) not in _CONTAINERS:
            for name, item in attributes_of(value):
                self.value(item, f"{path}.{name}")

    def _object(self, value: Any, path: str) -> None:
        self._identity(value, path)
        kind: Any = type(value)
        if is_fixed(kind):
            return
        self._draws(kind.__module__)
        if kind.__module__ == "numpy":
            if getattr(value, "nbytes", 0) > _SMALL_ARRAY_BYTES:
                self._doubt(f"{_place(path)} is a large array of numpy, whose changes are not seen; make it a buffer")
            else:
                self._note(path, value.tobytes() if hasattr(value, "tobytes") else repr(value))
            return
        self._class(kind, path)
        held = dict(attributes_of(value))
        if not hasattr(value, "__dict__") and any(hasattr(kind, name) for name in _CHANGED_BY) and not held:
            self._doubt(f"what {_place(path)} holds can not be seen, and may change")
        self._note(path, tuple(held))
        for name, item in held.items():
            self.value(item, f"{path}.{name}")

    def _seen_before(self, value: Any, path: str) -> bool:
        """Tell whether a value was written down already; if not, it is marked now."""
        first = self._seen.get(id(value))
        if first is not None:
            self._note(path, ("again", first))
            return True
        self._seen[id(value)] = len(self._seen)
        self._identity(value, path)
        return False

    def _identity(self, value: Any, path: str) -> None:
        self.held.append(value)
        self._note(path, id(value))

    def _note(self, path: str, value: Any) -> None:
        self.values.append(value)
        if self._named:
            self.names.append(path.lstrip("."))
        if len(self.values) == _MOST_VALUES:
            raise TooManyValuesError("its code reaches too many values to watch all of them")

    def _draws(self, name: str) -> None:
        if name in _OWN_DRAWS or name.startswith("numpy.random."):
            self._doubt(f"its code uses the module {name!r}, whose results differ from call to call")

    def _doubt(self, reason: str) -> None:
        self.doubt = self.doubt or reason


class TooManyValuesError(Exception):
    """A cell's code reaches more than can be watched."""


def _place(path: str) -> str:
    return f"`{path.lstrip('.')}`" if path.strip(".") else "it"


def _sorted(values: Any) -> list[Any]:
    return sorted(values, key=lambda v: (type(v).__name__, repr(v)))
