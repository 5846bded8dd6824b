"""Which layers of a model can be factored, and why the others can not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_accel import torch_private
from lightning_accel.low_rank.copies import find_copies
from lightning_accel.low_rank.factors.factored import DenseLayer
from lightning_accel.low_rank.factors.layers import LOW_RANK_TYPES, LowRankLayer

_DENSE_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d)

LEFT_ALONE = "left alone: "
"""How the reason begins where a layer could be factored, but the model does something with it that factors would break.
"""

LAZY = "lazy: "
"""How it begins where the first batch, which a layer waits for, makes a random one of it."""


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Return the factored layers of ``model`` by name, whoever made them.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import LowRankLinear, low_rank_layers
        >>> list(low_rank_layers(nn.Sequential(LowRankLinear(8, 8, 2), nn.ReLU())))
        ['0']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, LOW_RANK_TYPES)}


def eligible_layers(
    model: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> tuple[dict[str, DenseLayer], dict[str, str]]:
    """Sort the linear and convolutional layers of a model into those that can be factored and those that can not.

    Args:
        model: Searched with all its submodules; not changed.
        include: Shell patterns of module names; a layer must match one.
        exclude: Shell patterns of module names; a layer must match none.

    Returns:
        Name to dense layer, and name to the reason why a layer is left alone.

    Example:
        >>> from torch import nn
        >>> from lightning_accel.low_rank import eligible_layers
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> layers, reasons = eligible_layers(model)
        >>> sorted(layers)
        ['0', '2']
    """
    names_of_module: Counter[int] = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    parents = dict(model.named_modules())
    eligible: dict[str, DenseLayer] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (*_DENSE_TYPES, nn.modules.conv._ConvNd, *LOW_RANK_TYPES)):
            continue
        parent = parents.get(name.rpartition(".")[0]) if name else None
        reason = _reason(module, name, parent)
        if reason is None and names_of_module[id(module)] > 1:
            reason = "shared: the module stands under several names"
        if reason is None and owners[id(module.weight)] > 1:
            reason = "tied: another module uses the same weight"
        if reason is None and not any(fnmatchcase(name, pattern) for pattern in include):
            reason = "not matched by `include`"
        if reason is None and any(fnmatchcase(name, pattern) for pattern in exclude):
            reason = "matched by `exclude`"
        if reason is None and isinstance(module, _DENSE_TYPES):
            eligible[name] = module
        elif reason is not None:
            skipped[name] = reason
    everything = {name: layer for name, layer in parents.items() if _can_be_copied(layer)}
    for name, other in find_copies(everything).items():
        if eligible.pop(name, None) is not None:
            skipped[name] = (
                f"{LEFT_ALONE}it and `{other}` look like a network and a copy that follows it (a target network, a "
                "momentum encoder); averages of factors are no averages of weights"
            )
    return eligible, skipped


def left_alone(skipped: Mapping[str, str]) -> bool:
    """Say whether a layer could be factored but for what the model does with it."""
    return any(reason.startswith(LEFT_ALONE) for reason in skipped.values())


def lazy(skipped: Mapping[str, str]) -> bool:
    """Say whether a layer may be one that can be factored once it has a shape."""
    return any(reason.startswith(LAZY) for reason in skipped.values())


def _reason(module: nn.Module, name: str, parent: nn.Module | None) -> str | None:
    if isinstance(module, LOW_RANK_TYPES):
        return "already low rank"
    if name == "":
        return "the model itself is the layer: it has no parent to hold a replacement"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{LAZY}its shape is not known before the first batch"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized: its weight is computed"
    if isinstance(parent, nn.TransformerEncoderLayer) and name.rpartition(".")[2] in {"linear1", "linear2"}:
        return "fast path: nn.TransformerEncoderLayer reads its weight directly"
    if isinstance(parent, nn.MultiheadAttention):
        return "fast path: nn.MultiheadAttention reads its weight directly"
    if type(module) not in _DENSE_TYPES:
        return f"{type(module).__name__}: only plain nn.Linear, nn.Conv1d and nn.Conv2d are factored"
    return _weight_reason(module)


def _weight_reason(module: nn.Module) -> str | None:
    if getattr(module, "groups", 1) != 1:
        return "grouped convolution"
    weight = module._parameters.get("weight")
    if weight is None:
        return "parametrized: its weight is computed"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.device.type == "meta":
        return "its weight has no storage yet (meta device)"
    if "forward" in module.__dict__:
        return f"{LEFT_ALONE}its `forward` was replaced on this instance"
    if hooks := torch_private.gradient_hooks_of(weight):
        return f"{LEFT_ALONE}{hooks} is registered on its weight"
    return None


def _can_be_copied(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return type(module) in _DENSE_TYPES and weight is not None and weight.device.type != "meta"
