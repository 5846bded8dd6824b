"""Thresholds that keep their promise: float64 inside, rounded toward zero on the way out."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from lightning_accel.projection.kernels.layout import is_sharded

EPSILON = 2.0**-52  # unit roundoff of float64, doubled
# unit roundoff and smallest normal number; both types have exponents that float64 holds with ease
_ROUNDOFF = {torch.float32: (2.0**-24, 2.0**-126), torch.bfloat16: (2.0**-8, 2.0**-126)}
KEEP_FLOAT = 1.0 - 2.0**-24  # of a bound, before it is rounded to float32
_NORMAL = 1e-307  # parts of a float64 number as large round to nearly as many digits as any
Radius = TypeVar("Radius", float, Tensor)
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def round_toward_zero(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 values to ``dtype`` so that no magnitude grows.

    Rounding to nearest would let a projected tensor leave its ball (by 17.9 % in bfloat16), so that projecting it once
    more would change it again.

    Args:
        value: float64 tensor, any shape; infinite values stay infinite.
        dtype: A floating-point type.

    Complexity: Five elementwise passes, no host synchronization.
    """
    if dtype == torch.float64:
        return value
    rounded = value.to(dtype)
    grew = rounded.double().abs() > value.abs()
    return torch.where(grew, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def round_bound(bound: Tensor, dtype: torch.dtype, *, normal: bool = False) -> Tensor:
    """Do what `round_toward_zero` does to bounds (>= 0), in fewer operations; bounds too small to be normal become 0.

    Rounding to nearest adds less than one unit roundoff to a normal number, so as much is taken off first. Bounds that
    ``dtype`` holds may end one step lower for it. ``normal`` says that none is that small but 0.
    """
    if dtype not in _ROUNDOFF:
        return round_toward_zero(bound, dtype)
    roundoff, tiny = _ROUNDOFF[dtype]
    lower = bound * (1.0 - roundoff)
    return (lower if normal else torch.threshold_(lower, tiny, 0.0)).to(dtype)


def inner_radius(radius: Radius, terms: int) -> Radius:
    """Return the radius to aim at, so that a float64 sum of ``terms`` norms stays below ``radius`` in any order.

    A sum of n float64 numbers is off by at most n - 1 roundings whatever its order; twice that is taken off. Radii so
    small that their parts are no normal numbers, which round by more, become 0.
    """
    inner = radius * (1.0 - min(2.0 * EPSILON * (terms + 16), 0.5))
    if isinstance(inner, Tensor):
        return torch.threshold(inner, _NORMAL, 0.0)
    return inner if inner > _NORMAL else 0.0


def check_input(x: Tensor) -> None:
    """Refuse what no projection here can work on.

    Raises:
        TypeError: If ``x`` is no floating-point tensor of 16, 32 or 64 bits.
    """
    if not isinstance(x, Tensor) or x.dtype not in FLOAT_TYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`x` must be a float16, bfloat16, float32 or float64 tensor, got {kind}; convert it first.")


def check_radius(radius: float) -> float:
    """Return ``radius`` as a float.

    Raises:
        ValueError: If it is negative or not a number.
    """
    value = float(radius)
    if math.isnan(value) or value < 0.0:
        raise ValueError(f"`radius` must be >= 0, got {value}. Use 0 to clear the tensor, infinity to leave it alone.")
    return value


def check_nonfinite(nonfinite: str) -> None:
    """Refuse an unknown rule for NaN and infinity.

    Raises:
        ValueError: If it is neither ``"raise"`` nor ``"skip"``.
    """
    if nonfinite not in ("raise", "skip"):
        raise ValueError(f"`nonfinite` must be 'raise' or 'skip', got {nonfinite!r}.")


def require_finite(norm: Tensor, name: str = "x") -> None:
    """Raise if a norm is not finite, which shows NaN or infinity in the data, or a float64 overflow.

    Raises:
        ValueError: If any norm is NaN or infinite.

    Complexity: One host synchronization.
    """
    finite = math.isfinite(float(norm)) if norm.numel() == 1 else bool(torch.isfinite(norm).all())
    if not finite:
        raise ValueError(
            f"`{name}` holds NaN or infinity (or its norm overflows float64), so it has no projection. Find out where "
            "they come from, or pass nonfinite='skip' to leave such a tensor unchanged."
        )


def check_out(x: Tensor, out: Tensor | None) -> None:
    """Refuse an ``out`` that cannot hold the result.

    Raises:
        ValueError: If its shape, type or device differ from those of ``x``, or several of its entries share memory.
    """
    if out is None:
        return
    if is_sharded(out):
        raise ValueError("`out` is a DTensor and `x` is not: pass a tensor like `x`, or distribute `x` as `out` is.")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"`out` must be like `x` ({tuple(x.shape)}, {x.dtype}, {x.device}), got {tuple(out.shape)}, {out.dtype}, "
            f"{out.device}."
        )
    if not out.is_contiguous() and _entries_share_memory(out):
        raise ValueError("`out` is an expanded view: several entries share memory. Pass `out=None`, or clone it first.")


def _entries_share_memory(x: Tensor) -> bool:
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
