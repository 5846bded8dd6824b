"""The names that a function's code reads, and which code is nobody's to change."""

import dis
import functools
import sys
import types
from dataclasses import dataclass
from importlib.util import resolve_name
from typing import Any

# Their code does not change while a program runs, and what it does depends on its arguments.
_LIBRARIES = frozenset({"torch", "numpy", "einops", "lightning", "pytorch_lightning", "lightning_fabric"})
_GRAPH = f"{__name__.rpartition('.exactness')[0]}.graph"
_OWN = frozenset({_GRAPH, f"{_GRAPH}_rnn"})  # how a graph computes is not configured by patching this package
_GLOBAL_READS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})


@dataclass(frozen=True)
class NamedByCode:
    """Names in a function and in the functions that it defines.

    Attributes:
        ordered: Globals, in order of appearance.
        globals: The same, as a set.
        attributes_in_order: Attributes that are read of anything.
        attributes: The same, as a set.
        imports: Modules that are imported in it; with a dot for each level, if relative.
    """

    ordered: tuple[str, ...]
    globals: frozenset[str]
    attributes_in_order: tuple[str, ...]
    attributes: frozenset[str]
    imports: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> NamedByCode:
    """Read the names out of compiled code."""
    read: dict[str, None] = {}
    attributes: dict[str, None] = {}
    imports: dict[str, None] = {}
    pending = [code]
    while pending:
        current = pending.pop()
        before: tuple[Any, Any] = None, None  # the level of an import is loaded before what it is to take
        for instruction in dis.get_instructions(current):
            if instruction.opname in _GLOBAL_READS:
                read.setdefault(str(instruction.argval))
            elif instruction.opname == "IMPORT_NAME":
                level = before[0] if isinstance(before[0], int) else 0
                imports.setdefault("." * level + str(instruction.argval))
            before = before[1], instruction.argval
        attributes.update(dict.fromkeys(current.co_names))
        pending += [c for c in current.co_consts if isinstance(c, types.CodeType)]
    return NamedByCode(tuple(read), frozenset(read), tuple(attributes), frozenset(attributes), tuple(imports))


def imported(function: types.FunctionType) -> list[str]:
    """Return the full names of the modules that a function imports."""
    package = function.__globals__.get("__package__") or ""
    names = names_of(function.__code__).imports
    return [resolve_name(name, package) for name in names if package or not name.startswith(".")]


@functools.lru_cache(maxsize=4096)
def is_library(module: str | None) -> bool:
    """Tell whether a module is torch's, the standard library's, or another whose code nobody changes at run time."""
    top = (module or "").partition(".")[0]
    return module in _OWN or top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


@functools.lru_cache(maxsize=4096)
def is_fixed(kind: type[object]) -> bool:
    """Tell whether objects of a class stay what they are: the frozen nodes and edges of a `RecurrentGraph`."""
    parameters = kind.__dict__.get("__dataclass_params__")
    return parameters is not None and parameters.frozen and kind.__module__ == _GRAPH
