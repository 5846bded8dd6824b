"""Parameters that are sharded over processes (FSDP2, tensor parallelism): only group norms travel."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from lightning_accel.projection.balls.norm_pyramid import Level, Pyramid, pyramid
from lightning_accel.projection.kernels.rounding import round_bound


class ShardedMaxPyramid:
    """Groups measured by their largest magnitude, over the shards of a tensor.

    A maximum does not depend on the order it is taken in, so the result equals that of the whole tensor bit for bit.
    In place only.

    Args:
        x: Sharded or replicated along each dimension of its mesh.
        group_dims: Dimensions that number the groups.

    Raises:
        ValueError: If a placement is neither a `Shard` nor a `Replicate`.

    Complexity: One collective over ``groups`` numbers a sharded mesh dimension.
    """

    roundings = 0

    def __init__(self, x: DTensor, group_dims: tuple[int, ...]) -> None:
        check_placements(x.placements)
        self.x, self.group_dims = x, group_dims
        self.rest = tuple(d for d in range(x.ndim) if d not in group_dims)

    def tops(self) -> Tensor:
        """Return the largest magnitudes of whole groups, on every process."""
        local = self.x.to_local().detach()
        shape = [1 if d in self.rest else n for d, n in enumerate(local.shape)]
        if local.numel():
            local = local.abs().amax(self.rest, keepdim=True) if self.rest else local.abs()
        else:  # a process may hold no part of a small tensor
            local = local.new_zeros(shape)
        placements = [Partial("max") if isinstance(p, Shard) and p.dim in self.rest else p for p in self.x.placements]
        whole = torch.Size(1 if d in self.rest else n for d, n in enumerate(self.x.shape))
        stride = torch.empty(whole, device="meta").stride()
        norms = DTensor.from_local(local, self.x.device_mesh, placements, shape=whole, stride=stride)
        return norms.full_tensor().flatten().double()

    def cut(self, bounds: Tensor, *, normal: bool = False) -> None:
        """Clamp the local shard."""
        shape = [1 if d in self.rest else n for d, n in enumerate(self.x.shape)]
        bound = round_bound(bounds, self.x.dtype, normal=normal).view(shape)
        mesh = self.x.device_mesh
        placements = [Replicate() if isinstance(p, Shard) and p.dim in self.rest else p for p in self.x.placements]
        whole = DTensor.from_local(bound, mesh, [Replicate()] * mesh.ndim)
        mine = whole.redistribute(mesh, placements).to_local()
        local = self.x.to_local()
        torch.clamp(local, 0.0 - mine, mine, out=local)

    def leave(self) -> None:
        """Do nothing: the projection is in place."""


class GatheredPyramid:
    """Any other norms of a sharded tensor: every process works on the whole of it and keeps its part. In place only.

    Args:
        x: As in `ShardedMaxPyramid`.
        build: Makes the pyramid of the whole tensor that writes to it.
    """

    def __init__(self, x: DTensor, build: Callable[[Tensor], Pyramid]) -> None:
        check_placements(x.placements)
        self.x, self.whole = x, x.full_tensor().detach()
        self.pyramid = build(self.whole)
        self.roundings = self.pyramid.roundings

    def tops(self) -> Tensor:
        """Return the norms below the outermost level."""
        return self.pyramid.tops()

    def cut(self, bounds: Tensor, *, normal: bool = False) -> None:
        """Cut the whole tensor and keep this process's part."""
        self.pyramid.cut(bounds, normal=normal)
        scatter(self.whole, self.x)

    def leave(self) -> None:
        """Do nothing: the projection is in place."""


def sharded_pyramid(x: DTensor, levels: tuple[Level, ...]) -> Pyramid:
    """Return the pyramid that projects a sharded tensor in place."""
    if len(levels) == 2 and levels[1][0] == "linf":
        return ShardedMaxPyramid(x, levels[0][1])
    return GatheredPyramid(x, lambda whole: pyramid(whole, levels, whole))


def in_place_copy(x: Tensor, out: Tensor | None) -> DTensor:
    """Return what to project in place so that ``x`` changes only if it is ``out``; `deliver` ends that.

    Raises:
        ValueError: If ``x`` can not be projected, or ``out`` is not sharded as it is.
    """
    assert isinstance(x, DTensor)
    check_placements(x.placements)
    if out is not None and (
        not isinstance(out, DTensor)
        or (out.shape, out.dtype, out.device_mesh) != (x.shape, x.dtype, x.device_mesh)
        or tuple(out.placements) != tuple(x.placements)
    ):
        raise ValueError(
            f"`out` must be a DTensor like `x` ({tuple(x.shape)}, {x.dtype}, {x.placements}), got "
            f"{type(out).__name__} of {tuple(out.shape)}, {out.dtype}. Pass `out=None`, or `x` itself."
        )
    if out is x:
        return x
    copied = x.detach().clone()
    assert isinstance(copied, DTensor)
    return copied


def deliver(result: DTensor, out: Tensor | None) -> DTensor:
    """Write a result to ``out``, if there is one, and return where it is."""
    if not isinstance(out, DTensor) or out is result:
        return result
    out.to_local().copy_(result.to_local())
    return out


def gather(x: Tensor) -> Tensor:
    """Return the whole tensor on every process; ``x`` itself if it is not sharded."""
    if not isinstance(x, DTensor):
        return x
    mesh = x.device_mesh
    local = x.to_local().to(mesh.device_type)
    return DTensor.from_local(local, mesh, x.placements, shape=x.shape, stride=x.stride()).full_tensor()


def alike(whole: Tensor, x: Tensor) -> Tensor:
    """Return ``whole`` on the device of ``x``, and sharded as ``x`` is; what is sharded already stays so."""
    if not isinstance(x, DTensor) or isinstance(whole, DTensor):
        return whole.to(x.device)
    mesh = x.device_mesh
    replicated = DTensor.from_local(whole.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim)
    return replicated.redistribute(mesh, x.placements)


def as_whole(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a differentiable function of the whole tensor to a sharded one; the result is sharded as ``x`` is."""
    assert isinstance(x, DTensor)
    check_placements(x.placements)
    mesh = x.device_mesh
    result = DTensor.from_local(function(x.full_tensor()), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return result.redistribute(mesh, x.placements)


def scatter(whole: Tensor, x: Tensor) -> None:
    """Write this process's part of ``whole`` to the sharded ``x``; nothing to do where `gather` returned ``x``."""
    if isinstance(x, DTensor):
        mesh = x.device_mesh
        replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)
        x.to_local().copy_(replicated.redistribute(mesh, x.placements).to_local())


def check_placements(placements: Sequence[Placement]) -> None:
    """Refuse what cannot be projected shard by shard.

    Raises:
        ValueError: If a placement is neither a `Shard` nor a `Replicate`.
    """
    strange = [p for p in placements if type(p) not in (Shard, Replicate)]
    if strange:
        raise ValueError(
            f"a sharded tensor must be placed by Shard and Replicate, got {strange[0]}; take one kind of parallelism a "
            "dimension, or project before sharding."
        )
