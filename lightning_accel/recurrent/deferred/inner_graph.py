"""The graph inside a loop that is computed at once, apart from the model's."""

from collections.abc import Sequence

import torch
from torch import Tensor


def twin(tensor: Tensor, twice: bool) -> Tensor:
    """Return a stand-in whose gradient is not seen by hooks on the tensor; part of its graph for second derivatives."""
    if twice and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_(tensor.requires_grad)


def gradients_of(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    *,
    keep: bool = False,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Return the gradients of leaves from those of outputs, ``None`` where there is none."""
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return [None] * len(leaves)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            retain_graph=keep or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def without_autocast(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of a tensor."""
    return torch.autocast(like.device.type, enabled=False)
