"""Which channels of dependent layers can go, and what they leave behind."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_accel.projection.shrink.readings import CONVOLUTIONS, PRUNABLE, Run, constants

# layers that treat every channel by itself
_CHANNELWISE = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    nn.PReLU,
)
_OPERATIONS = {
    "_UnbindOp": "its channels are split, as among attention heads",
    "_SplitOp": "its channels are split, as among attention heads",
    "_OutputOp": "it is an output of the network",
    "Parameter": "a parameter outside of layers has its channels as well",
}


@dataclass(frozen=True)
class Use:
    """How one module takes part in a group of channels.

    Attributes:
        name: Of the module.
        module: It.
        reads: Whether channels are its inputs (else its outputs).
        own: Its channel indices.
        root: For each of ``own`` the channel of the group.
    """

    name: str
    module: nn.Module
    reads: bool
    own: Tensor
    root: Tensor


@dataclass(frozen=True)
class Removal:
    """What can go of a group.

    Attributes:
        gone: Boolean ``(channels,)``.
        folds: For each reading use, by its place among the uses, the constants of its channels to fold in.
        why: Zero channels stay, or ``""``.
    """

    gone: Tensor
    folds: dict[int, Tensor]
    why: str


def find_removal(root: nn.Module, uses: Sequence[Use], runs: Sequence[Run], fixed: Sequence[str]) -> Removal:
    """Decide which channels of a group can go.

    Args:
        root: The layer whose outputs number the channels of the group.
        uses: All modules of the group.
        runs: Of the model, on each probe.
        fixed: Inputs that no probe varies.
    """
    dead = zero_rows(root)
    nothing = torch.zeros_like(dead)
    for use in uses:
        why = obstacle(use)
        if why:
            return Removal(nothing, {}, why)
    silent = torch.ones_like(nothing)  # nobody writes
    unheard = torch.ones_like(nothing)  # nobody reads
    steady = torch.ones_like(nothing)  # what is read is a constant that can be folded
    folds: dict[int, Tensor] = {}
    readers = [use for use in uses if use.reads]
    for i, use in enumerate(uses):
        weight = _weight(use.module)
        if weight is None or is_depthwise(use.module):
            continue
        if not use.reads:
            _mark(silent, use, (weight[use.own] == 0).flatten(1).all(1))
            continue
        unread = (weight.transpose(0, 1)[use.own].flatten(1) == 0).all(1)
        _mark(unheard, use, unread)
        values, constant = constants(runs, use.name, use.own)
        if fixed:
            constant = torch.zeros_like(constant)
        foldable = constant & ((values == 0) | (not _is_padded(use.module)))
        _mark(steady, use, foldable | unread.cpu())
        folds[i] = values
    if not readers:
        return Removal(nothing, {}, _OPERATIONS["_OutputOp"])
    gone = unheard | (silent & steady)
    why = ""
    if bool((silent & ~gone).any()):
        why = _why_constants_stay(uses, runs, fixed)
    elif bool((dead & ~gone).any()):
        why = _who_else_writes(root, uses, dead & ~gone)
    if bool(gone.all()):
        gone[0] = False
        why = "one channel stays, for a layer can not be empty"
    return Removal(gone, folds, why)


def fold_constants(uses: Sequence[Use], removal: Removal) -> None:
    """Add what removed channels contributed to the biases of the layers that read them."""
    for i, values in removal.folds.items():
        use = uses[i]
        going = removal.gone[use.root]
        weight = _weight(use.module)
        if weight is None or not bool((values[going] != 0).any()):
            continue
        columns = weight.transpose(0, 1)[use.own[going]]
        per_channel = columns.flatten(2).sum(2) if columns.dim() > 2 else columns
        held = values[going].to(per_channel.device, torch.float64)
        # a product of 0 and what is not finite is no number, yet nobody reads it
        per_channel = per_channel.double()
        share = torch.where(per_channel == 0, 0.0, per_channel * held.unsqueeze(1)).sum(0)
        bias = getattr(use.module, "bias", None)
        if bias is None:
            use.module.bias = nn.Parameter(share.to(weight.dtype))
        else:
            bias.data += share.to(bias.dtype)


def zero_rows(layer: nn.Module) -> Tensor:
    """Return boolean ``(outputs,)``, on CPU, of the channels whose weights are all zero."""
    weight = _weight(layer)
    assert weight is not None
    return (weight == 0).flatten(1).all(1).cpu()


def shared_modules(model: nn.Module) -> set[nn.Module]:
    """Return modules that own a parameter which another module, or another name, owns as well."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def without(indices: Tensor, gone: Tensor) -> Tensor:
    """Return ``indices`` without those at the positions ``gone``."""
    keep = torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    keep[gone] = False
    return indices[keep]


def obstacle(use: Use) -> str:
    """Return why channels that a module reads or writes have to stay, or ``""``."""
    module = use.module
    kind = type(module).__name__
    if isinstance(module, PRUNABLE):
        return _why_not_plain(use.name, module) or _why_out_of_range(use, module)
    if isinstance(module, nn.Module) and is_parametrized(module):
        return f"`{use.name}` computes its weight from other parameters"
    if isinstance(module, _CHANNELWISE):
        known = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
        own = {*module._parameters, *module._buffers} - known
        return f"`{use.name}` holds `{own.pop()}` as well" if own else ""
    if kind in ("_ElementWiseOp", "_ReshapeOp", "_ConcatOp"):
        return ""
    if kind in _OPERATIONS:
        return _OPERATIONS[kind]
    if kind.startswith("_"):  # an operation, not a layer
        return "an operation that is not known to keep channels apart reads it"
    return f"a {kind} mixes its channels"


def _why_not_plain(name: str, module: nn.Module) -> str:
    if is_parametrized(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return f"`{name}` computes its weight from other parameters"
    more = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if more:
        return f"`{name}` holds `{min(more)}` beside its weight and bias"
    plain = next(base for base in type(module).__mro__ if base in PRUNABLE)
    if type(module).forward is not plain.forward or "forward" in module.__dict__:
        return f"`{name}` has a forward of its own"
    if getattr(module, "groups", 1) != 1 and not is_depthwise(module):
        return f"`{name}` is a grouped convolution"
    return ""


def _why_out_of_range(use: Use, module: nn.Module) -> str:
    """Refuse indices that a layer does not have: channels were gated, split or repeated on the way."""
    weight = module._parameters["weight"]
    assert weight is not None
    there = weight.shape[1 if use.reads and not is_depthwise(module) else 0]
    if len(use.own) and int(use.own.max()) >= there:
        what = "reads" if use.reads else "writes"
        return f"`{use.name}` {what} {there} channels, which can not be told apart: they are gated or split on the way"
    return ""


def _why_constants_stay(uses: Sequence[Use], runs: Sequence[Run], fixed: Sequence[str]) -> str:
    if fixed:
        return f"what it emits may depend on {fixed[0]}, which can not be varied"
    seen = set(runs[0].readings)
    for run in runs:
        seen &= set(run.readings)
    unseen = [u.name for u in uses if u.reads and isinstance(u.module, PRUNABLE) and u.name not in seen]
    if unseen:
        return f"`{unseen[0]}`, which reads it, is called more than once, or not as a module"
    return "its constant is not the same everywhere, or meets the border of a convolution"


def _who_else_writes(root: nn.Module, uses: Sequence[Use], dead: Tensor) -> str:
    for use in uses:
        weight = _weight(use.module)
        if use.reads or use.module is root or weight is None or is_depthwise(use.module):
            continue
        alive = (weight[use.own] != 0).flatten(1).any(1).cpu()
        if bool((alive & dead[use.root]).any()):
            return f"`{use.name}` writes the same channels and is not zero there"
    return "other channels depend on it"


def _weight(module: nn.Module) -> Tensor | None:
    if isinstance(module, PRUNABLE):
        return module.weight.detach()
    return None


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution treats every channel by itself."""
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels > 1


def _is_padded(module: nn.Module) -> bool:
    if not isinstance(module, CONVOLUTIONS):
        return False
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return module.padding not in ("valid", 0, (0,) * module.weight[0, 0].ndim)
    return any(p > 0 for p in module.padding)


def _mark(flags: Tensor, use: Use, good: Tensor) -> None:
    """Clear the flags of channels for which not all of the module's indices are ``good``."""
    flags[use.root[~good.cpu()]] = False
