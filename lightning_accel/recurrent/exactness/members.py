"""What classes and objects hold, and which functions of a class a call may reach."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import FunctionType, ModuleType
from typing import Any

import torch

from lightning_accel.recurrent.exactness.code_names import is_library, names_of


def function_of(member: Any) -> FunctionType | None:
    """Return the Python function behind a method, a static method or a property."""
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    elif isinstance(member, cached_property):
        member = member.func
    return member if isinstance(member, FunctionType) else None


def own_bases(kind: type) -> list[type]:
    """Return a class and its bases as far as they are no library's, in the order in which they are asked."""
    return [base for base in kind.__mro__ if base is not object and not is_library(base.__module__)]


def members_of(holder: ModuleType | type, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield what a module or a class holds under some names; a library's class holds what it always held.

    Of a function with a backward of its own, which torch calls and no code names, everything.
    """
    if isinstance(holder, type):
        spaces: list[Mapping[str, Any]] = [base.__dict__ for base in own_bases(holder)]
        if issubclass(holder, torch.autograd.Function):
            names = {name: None for space in spaces for name in space if not name.startswith("__")}
    else:
        spaces = [holder.__dict__]
    for name in names:
        for space in spaces:
            if name in space:
                yield name, space[name]
                break


def called_from(first: Iterable[str], versions: Mapping[str, Sequence[FunctionType]]) -> dict[FunctionType, str]:
    """Return the functions, with their names, that calls of some methods may reach, by the names in their code.

    Args:
        first: Names of the methods.
        versions: For each name the functions that it may stand for, the one of the class itself first. Code with
            ``super`` may mean any of them, and code with ``getattr`` any name.
    """
    found: dict[FunctionType, str] = {}
    pending = [(name, function) for name in first for function in versions[name][:1]]
    while pending:
        name, function = pending.pop()
        if function in found:
            continue
        found[function] = name
        named = names_of(function.__code__)
        reached = versions if "getattr" in named.globals else named.attributes & versions.keys()
        count = None if "super" in named.globals else 1
        pending += [(n, version) for n in reached for version in versions[n][:count]]
    return found


def attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds; objects of torch and of C hold what Python can not see."""
    yield from tuple(getattr(value, "__dict__", {}).items())
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)
