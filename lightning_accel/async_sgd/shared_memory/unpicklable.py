"""Which attribute of what goes to another process cannot be pickled."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import Tensor

_PARTS = ("_modules", "_parameters", "_buffers")  # where `nn.Module` keeps what is reached by a plain name


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


class _Probe(ForkingPickler):
    """Pickle into nothing, and no tensor: only one that is part of a graph is refused, as by torch."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        if obj.requires_grad and not obj.is_leaf:
            raise TypeError("a tensor of a graph")
        return str, ("",)


def what_cannot_be_pickled(value: Any) -> str | None:
    """Return the path to the innermost part of ``value`` that cannot be pickled, with its type; None if all can be.

    A path begins with the type of the object that the last attributes belong to, such as ``Data.stream (generator)``.
    """
    if _can_be_pickled(value):
        return None
    return _search(value, type(value).__name__, {id(value)}) or f"{type(value).__name__} ({_type_name(value)})"


def _search(value: Any, path: str, seen: set[int]) -> str | None:
    """Return the path to a part all of whose own parts can be pickled; None where all ways lead back."""
    parts = [found for found in _parts(value) if not _can_be_pickled(found[1])]
    if not parts:
        return f"{path} ({_type_name(value)})"
    for name, part, begins in parts:
        if id(part) not in seen:
            seen.add(id(part))
            if (found := _search(part, type(part).__name__ if begins else path + name, seen)) is not None:
                return found
    return None


def _type_name(value: Any) -> str:
    """Return the name of a type; of one that was made in a function, which is why it cannot go, with that function."""
    kind = type(value)
    return kind.__qualname__ if "<locals>" in kind.__qualname__ else kind.__name__


def _can_be_pickled(value: Any) -> bool:
    try:
        _Probe(_Nowhere()).dump(value)
    except Exception:  # whatever it is, it cannot go
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield name and value of each part, and whether a path should begin anew with it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f"[{key!r}]", part, _has_attributes(part)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for number, part in enumerate(value):
            yield f"[{number}]", part, _has_attributes(part)
    elif inspect.ismethod(value):
        yield "", value.__self__, True
    elif isinstance(value, functools.partial):
        yield ".func", value.func, False
        yield ".args", value.args, False
        yield ".keywords", value.keywords, False
    elif _has_attributes(value):
        for name, part in vars(value).items():
            if name in _PARTS and isinstance(part, Mapping):
                for inner, found in part.items():
                    yield f".{inner}", found, False
            else:
                yield f".{name}", part, False


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") and not inspect.isroutine(value) and not inspect.isclass(value)
