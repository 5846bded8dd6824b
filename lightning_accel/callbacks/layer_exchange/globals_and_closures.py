"""Global variables and closures that hold a weight, where no search through the module would come by."""

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, FunctionType, ModuleType
from typing import Any

from torch import nn

from lightning_accel.callbacks.layer_exchange.holders import LIBRARIES


def held_out_of_sight(weights: Mapping[str, nn.Parameter | None], known: Iterable[object]) -> dict[str, str]:
    """Return the weights that a global variable, a container or object in one, or a closure holds, and which.

    Python's garbage collector knows what refers to an object, in some hundredths of a second for all of them together.
    What local variables of running functions hold is left out: whoever trains a model has it at hand.

    Args:
        weights: Name of a layer to its weight.
        known: What may hold weights: the parameters of modules, the lists and states of optimizers.
    """
    names = {id(weight): name for name, weight in weights.items()}
    expected = {id(holder) for holder in known} | {id(weights)}
    holders = [holder for holder in gc.get_referrers(*weights.values()) if id(holder) not in expected]
    places = dict(_places()) if any(not isinstance(holder, CellType) for holder in holders) else {}
    found: dict[str, str] = {}
    for holder in holders:
        owner = "a closure" if isinstance(holder, CellType) else places.get(id(holder))
        for value in _values(holder) if owner is not None else ():
            if id(value) in names:
                found.setdefault(names[id(value)], f"{owner} holds its weight")
    return found


def _places() -> Iterator[tuple[int, str]]:
    """Yield the identity of what can hold a weight on behalf of a user's global variable, and its name."""
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or f"{name}.".startswith(LIBRARIES):
            continue
        variables = vars(module)
        yield id(variables), f"a global variable of `{name}`"
        for variable, value in list(variables.items()):
            if isinstance(value, (nn.Module, ModuleType, FunctionType, type)):
                continue
            place = f"`{variable}` of `{name}`"
            yield id(value), place
            if hasattr(value, "__dict__"):
                yield id(vars(value)), place


def _values(holder: Any) -> list[Any]:
    if isinstance(holder, CellType):
        return [holder.cell_contents]
    if isinstance(holder, Mapping):
        return [*holder.values(), *holder.keys()]
    if isinstance(holder, (list, tuple, set, frozenset)):
        return list(holder)
    return list(vars(holder).values()) if hasattr(holder, "__dict__") else []
