"""Parts of parameters that are spread over the ranks of a replica (DTensor), and wholes made of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:  # it imports much that only replicas need
    from torch.distributed.tensor import DTensor as _Spread

Part = tuple[slice, ...]


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is one of several processes together."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of a spread one, all its ranks must ask for it."""
    return cast("_Spread", tensor).full_tensor() if is_spread(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor, the same memory."""
    return cast("_Spread", tensor).to_local() if is_spread(tensor) else tensor


def part_of(tensor: Tensor) -> Part | None:
    """Return which part of the whole this rank has; None: all of it.

    Raises:
        ValueError: If the tensor is spread in another way than by slices or copies.
    """
    if not is_spread(tensor):
        return None
    placements = tensor.placements  # type: ignore[attr-defined]
    if not all(type(p).__name__ in ("Shard", "Replicate") for p in placements):
        raise ValueError(
            f"a parameter is placed as {placements}; only `Shard` and `Replicate` can be served, so spread it by "
            "`parallelize_module` with `ColwiseParallel`, `RowwiseParallel` or the like."
        )
    if all(p.is_replicate() for p in placements):
        return None
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    spans = [(0, length) for length in tensor.shape]
    for dimension, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        begin, length = spans[placement.dim]
        each = -(-length // mesh.size(dimension))  # as `torch.chunk` shares out
        first = min(length, mesh.get_local_rank(dimension) * each)
        spans[placement.dim] = begin + first, min(each, length - first)
    return tuple(slice(begin, begin + length) for begin, length in spans)


def as_spread(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return what this rank has of a gradient, spread as its parameter is; all ranks must ask for it."""
    if is_spread(gradient):
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(gradient).detach()


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, which takes its part of it."""
    part = part_of(tensor)
    local(tensor).copy_(value if part is None else value[part])


def parts_of(tensors: Sequence[Tensor]) -> list[Part | None]:
    """Return `part_of` each."""
    return [part_of(tensor) for tensor in tensors]


def spread_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return a whole value spread as ``tensor`` is, without a word to the other ranks, who have the same value."""
    from torch.distributed.tensor import DTensor

    part = part_of(tensor)
    mine = value if part is None else value[part]
    spread: Tensor = DTensor.from_local(
        mine.contiguous(),
        tensor.device_mesh,  # type: ignore[attr-defined]
        tensor.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=value.shape,
        stride=value.contiguous().stride(),
    )
    return spread
