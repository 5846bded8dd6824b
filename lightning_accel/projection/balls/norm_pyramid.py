"""Pyramids of norms: up by reducing, down by projecting every fibre onto the ball that the level above left for it."""

import math
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_accel.projection.balls.l1_thresholds import l1_thresholds
from lightning_accel.projection.kernels import compiled
from lightning_accel.projection.kernels.eager import clamp, group_max, small_matrices
from lightning_accel.projection.kernels.layout import Blocks, normalize_dims
from lightning_accel.projection.kernels.rounding import round_bound, round_toward_zero

Norm = Literal["l1", "l2", "linf"]
Level = tuple[Norm, tuple[int, ...]]
_TINY = torch.finfo(torch.float64).tiny


class Pyramid(Protocol):
    """A tensor whose outermost norms are known, and which can be cut down to bounds on them.

    Attributes:
        roundings: Upper bound on the roundings that one outermost norm of the result may suffer when it is summed.
    """

    roundings: int

    def tops(self) -> Tensor:
        """Return the norms below the outermost level, float64 ``(groups,)``."""
        ...

    def cut(self, bounds: Tensor, *, normal: bool = False) -> None:
        """Write the result for the bounds on `tops`, float64 ``(groups,)``; infinite leaves a group alone.

        ``normal`` says that every bound is 0 or far above the smallest normal number, which spares a look.
        """
        ...

    def leave(self) -> None:
        """Write the input unchanged."""
        ...


def check_levels(norms: Sequence[str], dims: Sequence[Sequence[int]], ndim: int) -> tuple[Level, ...]:
    """Return the levels from the outermost in, nested infinity norms merged (they are one infinity norm).

    Raises:
        ValueError: If there are not as many ``dims`` as ``norms``, a norm is unknown, or the levels do not take every
            dimension exactly once.
    """
    if len(norms) != len(dims) or not norms:
        raise ValueError(f"`norms` and `dims` must have one entry a level, got {len(norms)} and {len(dims)}.")
    unknown = [n for n in norms if n not in get_args(Norm)]
    if unknown:
        raise ValueError(f"`norms` must be of {get_args(Norm)}, got {unknown[0]!r}.")
    levels: list[Level] = []
    for norm, level_dims in zip(norms, dims, strict=True):
        level = normalize_dims(level_dims, ndim, name="dims")
        if levels and norm == "linf" == levels[-1][0]:
            levels[-1] = ("linf", tuple(sorted(levels[-1][1] + level)))
        else:
            levels.append((norm, level))  # type: ignore[arg-type]
    taken = sorted(d for _, level in levels for d in level)
    if taken != list(range(ndim)):
        raise ValueError(f"`dims` must name every dimension of the {ndim}-dimensional tensor once, got {list(dims)}.")
    return tuple(levels)


def pyramid(x: Tensor, levels: tuple[Level, ...], out: Tensor) -> Pyramid:
    """Return the pyramid of ``x`` that writes to ``out``; two levels with infinity norms inside take the fast way."""
    if len(levels) == 2 and levels[1][0] == "linf":
        return MaxPyramid(x, levels[0][1], out)
    return NormPyramid(x, levels, out)


class MaxPyramid:
    """Groups measured by their largest magnitude: one pass up, one pass down."""

    roundings = 0

    def __init__(self, x: Tensor, group_dims: tuple[int, ...], out: Tensor) -> None:
        self.blocks = Blocks.of(x, group_dims, out)
        matrices = small_matrices(self.blocks.source, self.blocks.target)
        self.small = None if matrices is None else (*matrices, x.new_zeros(()))

    def tops(self) -> Tensor:
        """Return the largest magnitudes."""
        if self.small is None:
            return group_max(self.blocks.source).double()
        source, _, dim, _ = self.small
        found = compiled.largest(self.blocks.source)
        return (source.abs().amax(dim) if found is None else found).double()

    def cut(self, bounds: Tensor, *, normal: bool = False) -> None:
        """Clamp every group to its bound, rounded toward zero."""
        high = round_bound(bounds, self.blocks.source.dtype, normal=normal)
        if self.small is None:
            clamp(self.blocks.source, high, self.blocks.target)
        elif not compiled.clamp(self.blocks.source, high, self.blocks.target):
            source, target, dim, zero = self.small
            low = torch.sub(zero, high)
            if dim == 0:
                torch.clamp(source, low, high, out=target)
            else:  # `clamp` with a broadcast column is three times slower than its two halves
                torch.minimum(source, high.unsqueeze(1), out=target)
                torch.maximum(target, low.unsqueeze(1), out=target)
        self.blocks.finish()

    def clear(self, dead: Tensor, indices: Tensor, *, if_finite: bool = False) -> bool:
        """Clear dead groups in place; say whether that was done.

        Args:
            dead: Boolean ``(groups,)``.
            indices: Theirs, int64 ``(dead groups,)``.
            if_finite: Leave everything as it is where an entry is NaN or infinite; also where their sum overflows.
        """
        if not self._in_place():
            return False
        source = self.blocks.source
        done = compiled.clear(source, dead, if_finite=if_finite)
        if done is not None:
            return done
        if if_finite and not math.isfinite(float(source.sum(dtype=torch.promote_types(source.dtype, torch.float32)))):
            return False
        if source.shape[0] > 1 and source.shape[2] == 1:  # single entries, one by one
            source.masked_fill_(dead.view(1, -1, 1), 0.0)
        else:
            source.index_fill_(1, indices, 0.0)
        return True

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Say whether it stands for a tensor's own memory on CPU, of a type, to be written in place."""
        source = self.blocks.source
        return self._in_place() and source.dtype == dtype and source.numel() > 0 and compiled.is_plain(source)

    def _in_place(self) -> bool:
        return self.blocks.target is self.blocks.source and self.blocks.copied_dims is None

    def leave(self) -> None:
        """Write the input unchanged."""
        self.blocks.leave()


class NormPyramid:
    """Any levels, in float64: the tensor, then the norms of its innermost fibres, then their norms, and so on."""

    def __init__(self, x: Tensor, levels: tuple[Level, ...], out: Tensor) -> None:
        self.x, self.levels, self.out = x, levels, out
        self.roundings = sum(_size(x, dims) for _, dims in levels[1:])
        self.floors = [x.detach().double()]
        for norm, dims in reversed(levels[1:]):
            self.floors.append(fibre_norms(self.floors[-1], norm, dims))

    def tops(self) -> Tensor:
        """Return the norms below the outermost level."""
        top = self.floors[-1].flatten()
        return top.abs() if len(self.floors) == 1 else top

    def cut(self, bounds: Tensor, *, normal: bool = False) -> None:  # noqa: ARG002
        """Project fibre by fibre, from the outermost level in."""
        allowed = bounds.view(self.floors[-1].shape)
        for (norm, dims), floor in zip(self.levels[1:], reversed(self.floors[:-1]), strict=True):
            allowed = project_fibres(floor, allowed, norm, dims)
        if len(self.floors) == 1:
            kept = torch.minimum(self.floors[0].abs(), allowed)
            allowed = torch.copysign(kept, self.floors[0])
        self.out.copy_(round_toward_zero(allowed, self.x.dtype))

    def leave(self) -> None:
        """Write the input unchanged."""
        if self.out is not self.x:
            self.out.copy_(self.x)


def fibre_norms(y: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    """Return norms over ``dims``, which stay as dimensions of size 1."""
    if not dims:  # torch takes that for all dimensions
        return y.abs()
    if norm == "linf":
        return y.abs().amax(dims, keepdim=True)
    if norm == "l1":
        return y.abs().sum(dims, keepdim=True)
    largest = y.abs().amax(dims, keepdim=True).clamp_min(_TINY)
    # squares of very large and very small numbers leave float64; a power of two in front is exact
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp(-1000, 1000))
    return (y / scale).square_().sum(dims, keepdim=True).sqrt_() * scale


def project_fibres(y: Tensor, bounds: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    """Project every fibre of ``y`` along ``dims`` onto the ball of its bound; infinite bounds leave it alone.

    Args:
        y: float64.
        bounds: float64, as ``y`` with size 1 in ``dims``.
        norm: Of the balls.
        dims: Of the fibres.
    """
    if norm == "linf":
        return torch.clamp(y, -bounds, bounds)
    if norm == "l2":
        return y * (bounds / fibre_norms(y, "l2", dims).clamp_min(_TINY)).clamp_max(1.0)
    rest = [d for d in range(y.ndim) if d not in dims]
    order = (*rest, *dims)
    moved = y.abs().permute(order)
    fibres = moved.reshape(-1, _size(y, dims))
    kept = l1_thresholds(fibres, bounds.permute(order).reshape(-1)).bounds
    kept = torch.minimum(kept, fibres).view(moved.shape)
    return torch.copysign(kept.permute([order.index(d) for d in range(y.ndim)]), y)


def _size(x: Tensor, dims: Sequence[int]) -> int:
    size = 1
    for d in dims:
        size *= x.shape[d]
    return size
