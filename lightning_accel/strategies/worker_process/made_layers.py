"""Layers that a module makes for itself when a fit begins, in ``setup`` or ``configure_model``: they come back, too.

Workers make them in processes of their own, and the caller's module has never seen them: a state dict alone would find
no place there.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_accel.async_sgd import ParameterStore

_KEY = "layers made when the fit began"
Structure = Mapping[str, tuple[Any, ...]]


def announce_made(module: nn.Module, before: Structure, store: ParameterStore) -> list[str]:
    """Return the names of what a module has made since; the caller hears of it at once, for a run that may fail."""
    made = made_since(module, before)
    if made and store.is_coordinator and store.incarnation == 0 and (parts := packed(module, made)):
        store.kv(_KEY, parts)
    return made


def put_announced(module: nn.Module, kv: Mapping[str, bytes]) -> None:
    """Give a module what workers have announced, if anything."""
    put_in_place(module, kv.get(_KEY, b""))


def structure_of(module: nn.Module) -> Structure:
    """Return what each part of a module is: its type, and the names and shapes of its own parameters."""
    return {name: _outline(part) for name, part in module.named_modules()}


def _outline(part: nn.Module) -> tuple[Any, ...]:
    own = part.named_parameters(recurse=False)
    return type(part), *((name, None if is_lazy(p) else p.shape) for name, p in own)


def made_since(module: nn.Module, before: Structure) -> list[str]:
    """Return the names of the outermost parts that are new, or others than they were, and of new own parameters."""
    made: list[str] = []
    for name, part in module.named_modules():
        if name and not any(name.startswith(f"{outer}.") for outer in made) and before.get(name) != _outline(part):
            made.append(name)
    known = {leaf for leaf, _ in before.get("", ("",))[1:]}
    return made + [leaf for leaf, _ in module.named_parameters(recurse=False) if leaf not in known]


def packed(module: nn.Module, names: Sequence[str]) -> bytes:
    """Pickle parts of a module by name; nothing if they cannot be.

    What they share with the rest of the module will be shared where they are put in place as well.
    """
    rest: dict[int, tuple[str, str]] = {}
    for name, part in module.named_modules():
        if not any(name == outer or name.startswith(f"{outer}.") for outer in names):
            rest[id(part)] = "module", name
            for leaf, parameter in part.named_parameters(recurse=False):
                if leaf not in names:
                    rest[id(parameter)] = "parameter", f"{name}.{leaf}" if name else leaf
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, rest).dump({name: _get(module, name) for name in names})
    except Exception:  # anything may hang on a layer; what has no place in the caller's module is told there
        return b""
    return buffer.getvalue()


def put_in_place(module: nn.Module, parts: bytes) -> None:
    """Give a module the parts that `packed` took from another of its kind."""
    for name, part in _Unpickler(io.BytesIO(parts), module).load().items() if parts else ():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, part)


def _get(module: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, rest: Mapping[int, tuple[str, str]]) -> None:
        super().__init__(file)
        self._rest = rest

    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        return self._rest.get(id(obj))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, module: nn.Module) -> None:
        super().__init__(file)
        self._module = module

    def persistent_load(self, pid: tuple[str, str]) -> Any:
        kind, name = pid
        return self._module.get_submodule(name) if kind == "module" else self._module.get_parameter(name)
