"""Exchange what a module is while it stays the same object."""

import copy
from collections.abc import Iterator

from torch import nn

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_MEMBERS = ("_parameters", "_buffers", "_modules")


def become(place: nn.Module, other: nn.Module) -> nn.Module:
    """Give ``place`` class, parameters and settings of ``other``, and return a module that is what ``place`` was.

    Whoever holds the module (its parent, a list, a dict, a closure, another name) keeps holding it: what runs is what
    is registered. What the user has attached stays: hooks, whose handles go on working, and attributes, buffers,
    submodules and parameters beyond those that the class makes itself. ``become(place, <result>)`` takes it back.

    Args:
        place: Changed in place.
        other: Left as it is; its parameters are shared with ``place`` afterwards.
    """
    before = as_it_is(place)
    state = dict(other.__dict__)
    own = {name for kind in {type(place), type(other)} for name in _attributes_of(kind)}
    state |= {name: value for name, value in place.__dict__.items() if name not in own | state.keys() or name in _HOOKS}
    parts = set(_parameters_of(place)) | set(_parameters_of(other))
    for members in _MEMBERS:
        kept = {name: value for name, value in place.__dict__[members].items() if name not in parts}
        state[members] = kept | other.__dict__[members]
    object.__setattr__(place, "__class__", type(other))
    place.__dict__.clear()
    place.__dict__.update(state)
    return before


def as_it_is(module: nn.Module) -> nn.Module:
    """Return another module that is what ``module`` is now, parameters, buffers and hooks shared."""
    kept: nn.Module = object.__new__(type(module))
    kept.__dict__ = module.__dict__ | {name: dict(module.__dict__[name]) for name in _MEMBERS}
    return kept


def copy_without_hooks(module: nn.Module) -> nn.Module:
    """Return a deep copy that has no hooks: those may belong to anything, which can not always be copied."""
    bare = as_it_is(module)
    bare.__dict__ |= {name: type(hooks)() for name, hooks in bare.__dict__.items() if name in _HOOKS and hooks}
    return copy.deepcopy(bare)


def _parameters_of(module: nn.Module) -> Iterator[str]:
    """Yield the names of the parameters and submodules that the module's class makes itself."""
    yield from getattr(type(module), "factor_names", ("weight",))
    yield "bias"
    if not hasattr(type(module), "factor_names") and type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d):
        yield from module._modules


def _attributes_of(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the attributes that a new module of this class has."""
    plain: nn.Module = nn.Module()
    if kind is nn.Linear:
        plain = nn.Linear(1, 1, device="meta")
    elif kind in (nn.Conv1d, nn.Conv2d):
        plain = kind(1, 1, 1, device="meta")
    return frozenset(plain.__dict__) | frozenset(getattr(kind, "own_attributes", ()))
