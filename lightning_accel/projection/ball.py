"""Projections as differentiable layers: balls that a weight or an activation is kept in."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_accel.projection.balls.norm_pyramid import Level, check_levels
from lightning_accel.projection.kernels.layout import is_sharded, normalize_dims
from lightning_accel.projection.kernels.ordered_sums import running_sums
from lightning_accel.projection.kernels.rounding import check_radius
from lightning_accel.projection.multilevel import Method, project_l1inf, project_multilevel


class MultilevelBall(nn.Module):
    r"""Project the input onto a ball of nested norms, differentiably.

    Use it on activations, or keep a weight in the ball with
    ``torch.nn.utils.parametrize.register_parametrization(linear, "weight", MultilevelBall(...))``. The value is that
    of `project_multilevel`, rounding included; the derivative is that of the projection in exact arithmetic, which
    exists away from ties (groups or entries that lie right on a threshold). It has derivatives of any order.

    Args:
        radius: As in `project_multilevel`.
        norms: As in `project_multilevel`.
        dims: As in `project_multilevel`.

    Raises:
        ValueError: If ``radius`` is negative or NaN, or, at the first call, the levels do not fit the input.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import MultilevelBall
        >>> ball = MultilevelBall(1.0, norms=("l1", "linf"), dims=((0,), (1,)))
        >>> ball(torch.randn(4, 3)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        radius: float,
        norms: Sequence[str] = ("l1", "linf"),
        dims: Sequence[Sequence[int]] = ((0,), (1,)),
    ) -> None:
        super().__init__()
        self.radius = check_radius(radius)
        self.norms = tuple(norms)
        self.dims = tuple(tuple(d) for d in dims)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of ``x``."""
        if is_sharded(x):
            return _as_whole(x, self.forward)
        levels = check_levels(self.norms, self.dims, x.ndim)
        value = project_multilevel(x.detach(), self.radius, self.norms, self.dims)
        return _same_value(value, _smooth_levels(x, self.radius, levels)) if _wants_gradient(x) else value

    def extra_repr(self) -> str:
        """Show the ball."""
        return f"radius={self.radius}, norms={self.norms}, dims={self.dims}"


class L1InfBall(nn.Module):
    r"""Project the input onto the l1,inf ball, differentiably; see `MultilevelBall`.

    Args:
        radius: As in `project_l1inf`.
        group_dims: As in `project_l1inf`.
        method: As in `project_l1inf`.

    Raises:
        ValueError: If ``radius`` is negative or NaN, ``method`` is unknown, or, at the first call, ``group_dims`` do
            not fit the input.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import L1InfBall
        >>> ball = L1InfBall(1.0)
        >>> float(ball(torch.randn(4, 3)).abs().amax(1).sum()) <= 1.0
        True
    """

    def __init__(self, radius: float, group_dims: Sequence[int] = (0,), method: Method = "bilevel") -> None:
        super().__init__()
        if method not in ("bilevel", "exact"):
            raise ValueError(f"`method` must be 'bilevel' or 'exact', got {method!r}.")
        self.radius = check_radius(radius)
        self.group_dims = tuple(group_dims)
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of ``x``."""
        if is_sharded(x):
            return _as_whole(x, self.forward)
        value = project_l1inf(x.detach(), self.radius, self.group_dims, self.method)
        if not _wants_gradient(x):
            return value
        group = normalize_dims(self.group_dims, x.ndim)
        rest = tuple(d for d in range(x.ndim) if d not in group)
        if self.method == "exact":
            return _same_value(value, _smooth_exact(x, value, self.radius, rest))
        return _same_value(value, _smooth_levels(x, self.radius, (("l1", group), ("linf", rest))))

    def extra_repr(self) -> str:
        """Show the ball."""
        return f"radius={self.radius}, group_dims={self.group_dims}, method={self.method!r}"


def _as_whole(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    from lightning_accel.projection.sharded import as_whole

    return as_whole(x, function)


def _same_value(value: Tensor, smooth: Tensor) -> Tensor:
    """Hand on one tensor's value and the other's derivatives."""
    return value + (smooth - smooth.detach())


def _wants_gradient(x: Tensor) -> bool:
    """Whether somebody differentiates: backward, or forward as ``jvp`` and ``jacfwd`` do."""
    return (torch.is_grad_enabled() and x.requires_grad) or forward_ad.unpack_dual(x).tangent is not None


def _smooth_levels(x: Tensor, radius: float, levels: tuple[Level, ...]) -> Tensor:
    """Write the projection in differentiable operations; sets (what survives, what is clipped) are constants."""
    if math.isinf(radius):
        return x
    floors = [x.double() if x.dtype in (torch.float16, torch.bfloat16) else x]
    for norm, dims in reversed(levels[1:]):
        floors.append(_norm(floors[-1], norm, dims))
    allowed = torch.full([1] * x.ndim, radius, dtype=floors[0].dtype, device=x.device)
    cleared = allowed == 0.0
    for (norm, dims), floor in zip(levels, reversed(floors), strict=True):
        allowed, cleared = _fibres(floor, allowed, cleared, norm, dims)
    return allowed.to(x.dtype)


def _norm(y: Tensor, norm: str, dims: tuple[int, ...]) -> Tensor:
    if not dims:  # torch takes that for all dimensions
        return y.abs()
    if norm == "linf":
        return y.abs().amax(dims, keepdim=True)
    if norm == "l1":
        return y.abs().sum(dims, keepdim=True)
    return torch.linalg.vector_norm(y, dim=dims, keepdim=True)


def _fibres(y: Tensor, bounds: Tensor, cleared: Tensor, norm: str, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Project fibres onto balls of ``bounds``; return them, and which are cleared whatever a small step makes of them.

    A bound of 0 alone does not say that: fibres of zeros inside of a ball are free to move.
    """
    if norm == "linf":
        return torch.where((y.abs() > bounds) | cleared, y.sign() * bounds, y), cleared
    size = _norm(y, norm, dims)
    outside = (size > bounds) | cleared
    if norm == "l2":
        return torch.where(outside, y * (bounds / torch.where(size > 0.0, size, 1.0)), y), cleared
    magnitude = y.abs()
    with torch.no_grad():
        rest = [d for d in range(y.ndim) if d not in dims]
        order = (*rest, *dims)
        flat = magnitude.permute(order).reshape(*[y.shape[d] for d in rest], -1)
        descending = flat.sort(-1, descending=True).values
        count = torch.arange(1, flat.shape[-1] + 1, dtype=y.dtype, device=y.device)
        limit = bounds.detach().permute(order).reshape(*[bounds.shape[d] for d in rest], 1)
        tau = ((running_sums(descending) - limit) / count).amax(-1).clamp_min(0.0)
        tau = tau.reshape([1 if d in dims else y.shape[d] for d in range(y.ndim)])
        above = (magnitude > tau) & ~cleared
    shift = ((magnitude * above).sum(dims, keepdim=True) - bounds) / above.sum(dims, keepdim=True).clamp_min(1)
    return torch.where(outside, torch.where(above, y - y.sign() * shift, 0.0), y), outside & ~above


def _smooth_exact(x: Tensor, value: Tensor, radius: float, rest: tuple[int, ...]) -> Tensor:
    r"""Differentiate the optimality conditions: :math:`\mu_j = (S_j - \theta) / k_j`, :math:`\sum_j \mu_j = \eta`."""
    y = x.double() if x.dtype in (torch.float16, torch.bfloat16) else x
    magnitude = y.abs()
    with torch.no_grad():
        clipped = x != value
        alive = (value != 0).amax(rest, keepdim=True) if rest else value != 0
        clipped |= ~alive & bool(clipped.any())  # zeros of a group that is cleared stay zeros
        count = _count(clipped & alive, rest, y.dtype)
    if not bool(clipped.any()):
        return x
    moving = alive & (count > 0)
    safe = torch.where(moving, count, 1.0)
    total = (magnitude * (clipped & alive)).sum(rest, keepdim=True) if rest else magnitude * (clipped & alive)
    inverse = moving / safe
    theta = ((total * inverse).sum() - radius) / torch.where(moving.any(), inverse.sum(), 1.0)
    mu = torch.where(moving, (total - theta) / safe, 0.0)
    return torch.where(clipped, y.sign() * mu, y).to(x.dtype)


def _count(mask: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return mask.sum(dims, keepdim=True).to(dtype) if dims else mask.to(dtype)
