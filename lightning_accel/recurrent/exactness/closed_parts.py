"""Parts of a cell that nobody looks into: they are compiled by others, or choose how their own steps run."""

import torch
from torch import nn

_LAYER = f"{__name__.rpartition('.exactness')[0]}.module"


def why_closed(part: nn.Module) -> str | None:
    """Say what a part is if it is not looked into, so that its cell runs the plain loop; ``None`` of any other part."""
    if isinstance(part, torch.jit.ScriptModule):
        return "is TorchScript"
    if any(base.__module__ == _LAYER for base in type(part).__mro__):
        return "is a recurrent layer, which chooses a schedule of its own"
    return None
