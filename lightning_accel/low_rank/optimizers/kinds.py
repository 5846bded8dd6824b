"""What an optimizer keeps of its parameters, and others like it for single layers."""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_PLAIN = (bool, int, float, complex, str, type(None))
_EVERY_OPTIMIZERS = frozenset(vars(torch.optim.SGD([torch.zeros(1)], lr=0.0))) | {"step", "zero_grad"}
_NOT_IN_TIME = ("params", "lr", "initial_lr", "max_lr", "min_lr", "eps", "param_names")
_DEPTH = 4


def why_not_followed(optimizer: torch.optim.Optimizer) -> str | None:
    """Say why parameters of an optimizer can not be replaced by others; None if they can.

    Parameter lists are changed in place and states are kept by parameter, so an optimizer that looks there follows.
    Others keep parameters, or tensors for each of them, in attributes of their own (wrappers, L-BFGS, averages).
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        return f"{name} keeps directions over all its parameters together"
    for attribute, value in vars(optimizer).items():
        if attribute not in _EVERY_OPTIMIZERS and _holds_tensors(value, _DEPTH):
            return f"{name} keeps tensors of its own in `{attribute}`, which would go on with the dense weights"
    for group in optimizer.param_groups:
        for option, value in group.items():
            if option != "params" and not _is_number(value) and _holds_tensors(value, _DEPTH):
                return f"{name} keeps tensors in the option `{option}` of its groups"
    for parameter, state in optimizer.state.items():
        for entry, value in state.items() if isinstance(state, Mapping) else ():
            if isinstance(value, Tensor) and value.numel() > max(1, parameter.numel()):
                return f"{name} keeps `{entry}` over several parameters"
    return _why_no_fresh_start(optimizer)


def _why_no_fresh_start(optimizer: torch.optim.Optimizer) -> str | None:
    """Step a parameter that the optimizer has no state for; some make all states when they are made."""
    for group in optimizer.param_groups:
        example = next((p for p in group["params"] if p.is_floating_point()), torch.zeros(1))
        parameter = nn.Parameter(torch.zeros(2, 2, dtype=example.dtype, device=example.device))
        parameter.grad = torch.full_like(parameter, 1e-3)
        try:
            like(optimizer, group)([parameter]).step()
        except Exception as problem:  # other people's code, for any reason
            return f"{type(optimizer).__name__} can not step a new parameter: {problem!r}"
    return None


def like(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> MakeOptimizer:
    """Return what makes optimizers of the class and the options of ``group``, without its parameters and states."""
    options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    plain = {name: value for name, value in vars(optimizer).items() if _is_plain(value)}
    kind, defaults = type(optimizer), dict(optimizer.defaults)

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        # constructors of other people's classes ask for anything; what they set is data, and the base sets the rest
        made: torch.optim.Optimizer = object.__new__(kind)
        made.__dict__.update(plain)
        torch.optim.Optimizer.__init__(made, [{**options, "params": parameters}], defaults)
        return made

    return make


def makers_by_layer(
    layers: Mapping[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, MakeOptimizer]:
    """Return for each layer whose weight an optimizer holds what makes optimizers like it; one a group."""
    of_weight = {
        parameter: maker
        for optimizer in optimizers
        for group in optimizer.param_groups
        for maker in [like(optimizer, group)]
        for parameter in group["params"]
    }
    weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
    return {name: of_weight[weight] for name, weight in weights.items() if weight is not None and weight in of_weight}


def description(make: MakeOptimizer, weight: Tensor) -> str | None:
    """Describe an optimizer by what its step's time depends on; None where that can not be told.

    Only torch's own classes are told apart by their names; the code of others may have changed since.
    """
    try:
        optimizer = make([nn.Parameter(torch.zeros(2, 2, dtype=weight.dtype, device=weight.device))])
    except Exception:  # whatever the user's function does not like about this parameter
        return None
    kind = type(optimizer)
    options = {name: value for name, value in optimizer.param_groups[0].items() if name not in _NOT_IN_TIME}
    if not kind.__module__.startswith("torch.optim") or not all(_is_plain(value) for value in options.values()):
        return None
    if isinstance(rate := optimizer.param_groups[0].get("lr"), Tensor):
        options["lr"] = f"tensor on {rate.device.type}"
    return f"{kind.__module__}.{kind.__qualname__} {sorted(options.items())}"


def _is_number(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _holds_tensors(value: object, depth: int) -> bool:
    """Say whether tensors, modules or optimizers can be reached through ``value``."""
    if isinstance(value, (Tensor, torch.optim.Optimizer, nn.Module)):
        return True
    if depth == 0 or isinstance(value, (*_PLAIN, type)):
        return False
    inner: list[object] = []
    if isinstance(value, Mapping):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    elif isinstance(value, FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
    elif hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    return any(_holds_tensors(part, depth - 1) for part in inner)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # empty cells raise
    except ValueError:
        return False
    return True
