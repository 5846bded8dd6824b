"""Which channels of dependent layers can go, and what they leave behind."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRUNABLE = (nn.Linear, *CONVOLUTIONS)
# layers that treat every channel by itself
_CHANNELWISE = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    nn.PReLU,
)


class SelectedFeatures(nn.Module):
    """A linear layer that reads only some features of its input.

    Args:
        index: Features to read, ``(kept,)``.
        layer: Linear layer with ``kept`` inputs.
    """

    index: Tensor

    def __init__(self, index: Tensor, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., features)`` to ``(..., outputs)``."""
        return self.layer(x.index_select(-1, self.index))


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


def removable_channels(
    uses: Sequence[Use], channels: int, observed: Sequence[dict[nn.Module, Tensor]]
) -> tuple[Tensor, dict[int, Tensor], str]:
    """Decide which channels of a group can go.

    Args:
        uses: All modules of the group.
        channels: Of the group.
        observed: For each probe the inputs of the layers.

    Returns:
        Boolean ``(channels,)``; for each reading use, by its place in ``uses``, the constants of ``own`` to fold in;
        and why zero channels stay, or ``""``.
    """
    nothing = torch.zeros(channels, dtype=torch.bool), dict[int, Tensor]()
    for use in uses:
        why = _obstacle(use)
        if why:
            return (*nothing, why)
    silent = torch.ones(channels, dtype=torch.bool)  # nobody writes
    unheard = torch.ones(channels, dtype=torch.bool)  # nobody reads
    steady = torch.ones(channels, dtype=torch.bool)  # what is read is a constant that can be folded
    constants: dict[int, Tensor] = {}
    readers = [i for i, use in enumerate(uses) if use.reads]
    for i, use in enumerate(uses):
        weight = _weight(use.module)
        if weight is None or _is_depthwise(use.module):
            continue
        if not use.reads:
            _mark(silent, use, (weight[use.own] == 0).flatten(1).all(1))
            continue
        columns = weight.transpose(0, 1)[use.own].flatten(1)
        _mark(unheard, use, (columns == 0).all(1))
        values, constant = _constants(use, observed)
        foldable = constant & ((values == 0) | ~torch.tensor(_is_padded(use.module)))
        _mark(steady, use, foldable | (columns == 0).all(1))
        constants[i] = values
    if not readers:
        return (*nothing, "it is an output of the network" if bool(silent.any()) else "")
    gone = unheard | (silent & steady)
    stays = silent & ~gone
    if bool(gone.all()):
        gone[0] = False  # a layer cannot be empty
    return gone, constants, _why_constants_stay(uses, observed) if bool(stays.any()) else ""


def _why_constants_stay(uses: Sequence[Use], observed: Sequence[dict[nn.Module, Tensor]]) -> str:
    unseen = [u.name for u in uses if u.reads and isinstance(u.module, PRUNABLE) and u.module not in observed[0]]
    if unseen:
        return f"`{unseen[0]}`, which reads it, is called more than once, or not as a module"
    return "its constant is not the same everywhere, or meets the border of a convolution"


def fold_constants(uses: Sequence[Use], gone: Tensor, constants: dict[int, Tensor]) -> None:
    """Add what removed channels contributed to the biases of the layers that read them."""
    for i, values in constants.items():
        use = uses[i]
        going = gone[use.root]
        weight = _weight(use.module)
        if weight is None or not bool((values[going] != 0).any()):
            continue
        columns = weight.transpose(0, 1)[use.own[going]].flatten(2) if weight.ndim > 2 else None
        per_channel = columns.sum(2) if columns is not None else weight.t()[use.own[going]]
        held = values[going].to(per_channel.device, torch.float64)
        share = (per_channel.double() * held.unsqueeze(1)).sum(0).to(weight.dtype)
        bias = getattr(use.module, "bias", None)
        if bias is None:
            use.module.bias = nn.Parameter(share)
        else:
            bias.data += share


def observe_inputs(model: nn.Module, inputs: tuple[object, ...]) -> dict[nn.Module, Tensor]:
    """Run ``model`` and return what linear and convolution layers read; not those that are called twice."""
    seen: dict[nn.Module, Tensor] = {}
    twice: set[nn.Module] = set()

    def look(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if module in seen:
            twice.add(module)
        seen[module] = (arguments[0] if arguments else named["input"]).detach().clone()

    layers = [m for m in model.modules() if isinstance(m, PRUNABLE)]
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            model(*copied(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {module: x for module, x in seen.items() if module not in twice}


def copied(inputs: tuple[object, ...]) -> tuple[object, ...]:
    """Return copies of all tensors, for a model that writes into what it is given."""
    copies: tuple[object, ...] = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    return copies


def dead_inputs(layer: nn.Linear) -> Tensor:
    """Return a boolean ``(in_features,)`` of the features that no output reads."""
    return (layer.weight == 0).all(0)


def shared_modules(model: nn.Module) -> set[nn.Module]:
    """Return modules that own a parameter which another module owns as well."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def without(indices: Tensor, gone: Tensor) -> Tensor:
    """Return ``indices`` without those at the positions ``gone``."""
    keep = torch.ones(len(indices), dtype=torch.bool)
    keep[gone] = False
    return indices[keep]


def _obstacle(use: Use) -> str:
    module = use.module
    if is_parametrized(module):
        return f"`{use.name}` computes its weight from other parameters"
    if isinstance(module, PRUNABLE):
        groups = getattr(module, "groups", 1)
        return "" if groups == 1 or _is_depthwise(module) else f"`{use.name}` is a grouped convolution"
    kind = type(module).__name__
    if isinstance(module, _CHANNELWISE) or kind in ("_ElementWiseOp", "_ReshapeOp", "_ConcatOp"):
        return ""
    if kind in ("_UnbindOp", "_SplitOp"):
        return "its channels are split, as among attention heads"
    if kind == "Parameter":
        return "a parameter outside of layers has its channels as well"
    if kind.startswith("_"):  # an operation, not a layer
        return "an operation that is not known to keep channels apart reads it"
    return f"a {kind} mixes its channels"


def _weight(module: nn.Module) -> Tensor | None:
    if isinstance(module, PRUNABLE):
        return module.weight.detach()
    return None


def _is_depthwise(module: nn.Module) -> bool:
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


def _constants(use: Use, observed: Sequence[dict[nn.Module, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return what the module reads in each of its channels, and whether that is the same at every place and sample."""
    values, constant = torch.zeros(len(use.own)), torch.ones(len(use.own), dtype=torch.bool)
    for i, inputs in enumerate(observed):
        x = inputs.get(use.module)
        if x is None:
            return values, torch.zeros_like(constant)
        rows = (x.movedim(1, -1) if isinstance(use.module, CONVOLUTIONS) else x).flatten(0, -2)[:, use.own.to(x.device)]
        low, high = rows.amin(0).cpu(), rows.amax(0).cpu()
        close = high - low <= 1e-6 * torch.maximum(high.abs(), low.abs())
        if i == 0:
            values = rows[0].cpu()
        else:
            close &= (rows[0].cpu() - values).abs() <= 1e-6 * values.abs()
        constant &= close
    return values, constant
