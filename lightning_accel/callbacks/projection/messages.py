"""What a projection callback says where it has nothing to project, or can not."""

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

_SHOWN = 6  # names in a message


def nothing_found(
    callback: str, module: nn.Module, parameters: Sequence[str], module_types: Sequence[str] | None, groups: object
) -> str:
    """Say what was looked for, which names come close, and what to do.

    Args:
        callback: Name of the callback's class.
        module: What was searched.
        parameters: Patterns of names.
        module_types: Class names of the owners; ``None`` for any.
        groups: As the user gave them.
    """
    owners = dict(module.named_modules(remove_duplicate=False))
    known = {
        name.replace("_orig_mod.", ""): (parameter, owners[name.rpartition(".")[0]])
        for name, parameter in module.named_parameters()
    }
    searched = (
        f"{callback} found no parameter to project in {type(module).__name__}: looked for trained parameters named "
        f"{_words(parameters)} of modules {_words(module_types) if module_types is not None else 'of any type'}, with "
        f"groups {groups!r}."
    )
    matching = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in parameters)]
    if not matching:
        close = [n for p in parameters for n in difflib.get_close_matches(p, known, n=3, cutoff=0.6)]
        shown = list(dict.fromkeys(close)) or [name for name, (p, _) in known.items() if p.ndim > 1] or list(known)
        there = f"There are {_some(shown)}." if shown else "It has no parameters."
        return f"{searched} No name fits. {there} Pass `parameters` that fit."
    types = {name: type(known[name][1]).__name__ for name in matching}
    if module_types is not None:
        wrong = [n for n in matching if not _is_of(known[n][1], module_types)]
        if len(wrong) == len(matching):
            found = _some([f"{name} of a {types[name]}" for name in wrong])
            return f"{searched} Names fit, but not the modules: {found}. Pass `module_types`, or null (None) for any."
    if not any(known[name][0].requires_grad for name in matching):
        return f"{searched} All of those are frozen: {_some(matching)}. Thaw them, or leave the callback out."
    shapes = _some([f"{name} {tuple(known[name][0].shape)}" for name in matching])
    return (
        f"{searched} Names fit, but no optimizer trains them, or they have too few dimensions for the groups: {shapes}."
    )


def takes_apart(callback: str, strategy: str) -> str:
    """Say why a strategy is refused."""
    return (
        f"{callback} needs parameters in their own shapes, which {strategy} takes apart. Use 'ddp', or "
        "FSDP2 through ModelParallelStrategy, whose shards can be projected."
    )


def _is_of(module: nn.Module, types: Sequence[str]) -> bool:
    return any(base.__name__ in types for base in type(module).__mro__)


def _words(words: Sequence[str]) -> str:
    return ", ".join(f"'{word}'" for word in words) or "(none)"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
