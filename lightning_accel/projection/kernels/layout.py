"""How the groups of a tensor lie in memory: everything fast works on one shape, ``(before, groups, after)``."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


def normalize_dims(dims: Sequence[int], ndim: int, *, name: str = "group_dims") -> tuple[int, ...]:
    """Return ``dims`` as sorted non-negative dimensions.

    Raises:
        ValueError: If a dimension is out of range or stands twice.
    """
    if isinstance(dims, int):
        dims = (dims,)
    found = []
    for dim in dims:
        if not -ndim <= dim < ndim:
            raise ValueError(f"`{name}` must be dimensions of a {ndim}-dimensional tensor, got {tuple(dims)}.")
        found.append(dim % ndim)
    if len(set(found)) != len(found):
        raise ValueError(f"`{name}` must not name a dimension twice, got {tuple(dims)}.")
    return tuple(sorted(found))


def dense_blocks(x: Tensor, group_dims: tuple[int, ...]) -> Tensor | None:
    """View ``x`` as contiguous ``(before, groups, after)``, or return ``None`` where memory does not allow it.

    Dimensions are taken in the order of their strides, so a transposed or channels-last tensor is as good as a
    contiguous one. Groups must follow each other in memory in the order of ``group_dims``.
    """
    if len(group_dims) == 1 and x.is_contiguous():  # most tensors; the same without looking at strides
        dim = group_dims[0]
        return x.view(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))
    found = dense_order(x.shape, x.stride(), group_dims)
    return None if found is None else x.permute(found[0]).reshape(found[1])


def dense_order(
    shape: Sequence[int], strides: Sequence[int], group_dims: tuple[int, ...]
) -> tuple[list[int], tuple[int, int, int]] | None:
    """Return in which order dimensions lie in memory, and ``(before, groups, after)``, see `dense_blocks`."""
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
    step = 1
    for d in reversed(order):
        if shape[d] != 1 and strides[d] != step and 0 not in shape:
            return None
        step *= shape[d]
    positions = [i for i, d in enumerate(order) if d in group_dims and shape[d] > 1]
    if positions and (
        positions != list(range(positions[0], positions[-1] + 1))
        or [order[i] for i in positions] != sorted(order[i] for i in positions)
    ):
        return None
    first, last = (positions[0], positions[-1] + 1) if positions else (0, 0)
    sizes = [shape[d] for d in order]
    return order, (math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:]))


def copied_blocks(x: Tensor, group_dims: tuple[int, ...]) -> Tensor:
    """Copy ``x`` to contiguous ``(1, groups, after)``, for tensors that `dense_blocks` cannot view."""
    rest = [d for d in range(x.ndim) if d not in group_dims]
    groups = math.prod(x.shape[d] for d in group_dims)
    y = x.permute(*group_dims, *rest).reshape(1, groups, math.prod(x.shape[d] for d in rest))
    return y.clone() if y.data_ptr() == x.data_ptr() else y


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor; without importing what those need where nobody has one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def overlap(x: Tensor, out: Tensor) -> bool:
    """Whether two tensors share memory without being the same view of it, so that writing one may change the other."""
    if x is out or not x.numel() or x.device != out.device:
        return False
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return False
    if (x.data_ptr(), x.shape, x.stride()) == (out.data_ptr(), out.shape, out.stride()):
        return False
    begins, ends = zip(*(_reach(t) for t in (x, out)), strict=True)
    return max(begins) < min(ends)


def _reach(x: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor, and the first behind it."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


@dataclass
class Blocks:
    """The groups of a tensor, ready for the kernels, and the way back.

    Attributes:
        source: ``(before, groups, after)``, contiguous; to read.
        target: As ``source``; to write. The same tensor when the projection is in place.
        out: Tensor that gets the result.
        copied_dims: Group dimensions, if ``target`` is a copy that must be written back to ``out``.
    """

    source: Tensor
    target: Tensor
    out: Tensor
    copied_dims: tuple[int, ...] | None

    @classmethod
    def of(cls, x: Tensor, group_dims: tuple[int, ...], out: Tensor) -> "Blocks":
        """Lay out ``x`` for a projection that writes to ``out`` (possibly ``x`` itself)."""
        source = dense_blocks(x, group_dims) if x.stride() == out.stride() else None
        target = source if out is x or source is None else dense_blocks(out, group_dims)
        if source is None or target is None:
            source = copied_blocks(x, group_dims)
            return cls(source, source, out, group_dims)
        return cls(source, target, out, None)

    def finish(self) -> Tensor:
        """Return ``out``, after writing a copied result back."""
        if self.copied_dims is not None:
            rest = [d for d in range(self.out.ndim) if d not in self.copied_dims]
            order = (*self.copied_dims, *rest)
            back = self.target.reshape([self.out.shape[d] for d in order])
            self.out.copy_(back.permute([order.index(d) for d in range(self.out.ndim)]))
        return self.out

    def leave(self) -> Tensor:
        """Return ``out`` holding the input unchanged."""
        if self.copied_dims is not None:
            return self.finish()
        if self.target.data_ptr() != self.source.data_ptr():
            self.target.copy_(self.source)
        return self.out
