"""Tensors inside whatever a module is called with, or returns: tuples, dicts, dataclasses, objects of any class."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

T = TypeVar("T")


def tensors_in(value: object) -> list[Tensor]:
    """Return all tensors in ``value``, in a fixed order, each once.

    Looks into sequences, mappings, dataclasses, and objects with attributes; of a packed sequence only at its data,
    since the rest says how they lie in memory. Modules are not looked into.
    """
    found: dict[int, Tensor] = {}
    for tensor in _walk(value, set()):
        found.setdefault(id(tensor), tensor)
    return list(found.values())


def _walk(value: object, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None or isinstance(value, str | bytes | int | float | complex | nn.Module | type) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item, seen)
    elif isinstance(value, Sequence | Set):
        for item in value:
            yield from _walk(item, seen)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name, None), seen)
    else:
        for item in list(getattr(value, "__dict__", {}).values()):
            yield from _walk(item, seen)


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of ``value`` in which ``change(tensor)`` stands for every tensor that `tensors_in` finds."""
    tensors = tensors_in(value)
    changed = {id(tensor): change(tensor) for tensor in tensors}
    memo: dict[int, Any] = dict(changed)
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError):  # an object that cannot be copied, such as a lock or a generator
        copied: T = pytree.tree_map(lambda x: changed.get(id(x), x), value)
        return copied
