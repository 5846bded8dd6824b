"""A whole bi-level projection in one call of machine code, for which nothing but memory and sizes is looked at.

Small tensors take longer to look at than to project: each operation of torch and each view is a microsecond or more.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.projection.kernels import compiled
from lightning_accel.projection.kernels.c_thresholds import PROJECTED, WITHIN
from lightning_accel.projection.kernels.huge_pages import empty_like_dense
from lightning_accel.projection.kernels.layout import dense_order, normalize_dims
from lightning_accel.projection.kernels.rounding import EPSILON, KEEP_FLOAT, inner_radius


def project_in_one_call(x: Tensor, radius: float, group_dims: Sequence[int], out: Tensor | None) -> Tensor | None:
    """Project groups onto the ball of their largest magnitudes, in place or to a new tensor.

    Returns:
        The projection; ``None`` where that is not possible, arguments are not valid, ``x`` is not finite, or it lies
        so close to the ball that the order of a sum decides. Nothing was written then.
    """
    if not compiled.can_project(x) or not (out is None or out is x):
        return None
    if not isinstance(radius, float | int) or not radius >= 0.0 or not isinstance(group_dims, tuple | list):
        return None
    sizes = _sizes(x.shape, x.stride(), tuple(group_dims))
    if sizes is None:
        return None
    rounding = EPSILON * sizes[1]
    target = inner_radius(float(radius), sizes[1])
    result = empty_like_dense(x) if out is None else x
    done = compiled.project(x, result, sizes, (radius, target, target * (1.0 + rounding), rounding, KEEP_FLOAT))
    if done == WITHIN and result is not x:
        result.copy_(x.detach())
    return result if done in (PROJECTED, WITHIN) else None


@functools.lru_cache(maxsize=1024)
def _sizes(shape: torch.Size, strides: tuple[int, ...], group_dims: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return ``(before, groups, after)`` of a tensor that lies in memory like that and is not empty."""
    try:
        found = dense_order(shape, strides, normalize_dims(group_dims, len(shape)))
    except (TypeError, ValueError):  # the way that says so is another
        return None
    return None if found is None or 0 in shape else found[1]
