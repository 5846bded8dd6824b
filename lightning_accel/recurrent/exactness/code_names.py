"""The names that a function's code reads, and which code is nobody's to change."""

import dis
import functools
import sys
import types
from dataclasses import dataclass

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
    """

    ordered: tuple[str, ...]
    globals: frozenset[str]
    attributes_in_order: tuple[str, ...]
    attributes: frozenset[str]


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> NamedByCode:
    """Read the names out of compiled code."""
    read: dict[str, None] = {}
    attributes: dict[str, None] = {}
    pending = [code]
    while pending:
        current = pending.pop()
        for instruction in dis.get_instructions(current):
            if instruction.opname in _GLOBAL_READS:
                read.setdefault(str(instruction.argval))
        attributes.update(dict.fromkeys(current.co_names))
        pending += [c for c in current.co_consts if isinstance(c, types.CodeType)]
    return NamedByCode(tuple(read), frozenset(read), tuple(attributes), frozenset(attributes))


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
