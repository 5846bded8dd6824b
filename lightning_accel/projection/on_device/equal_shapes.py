"""Parameters of one shape on an accelerator, projected as one tensor: with the launches of a single one.

A small parameter's projection is some forty launches, each of which takes longer than its work. Stacked, all
parameters of a shape share them. Stacking costs two more passes over their memory, so large parameters stay apart.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_accel.projection.balls.floor import Floor
from lightning_accel.projection.balls.l1_thresholds import l1_thresholds
from lightning_accel.projection.balls.outcome import Cut
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.kernels.layout import dense_blocks, is_sharded
from lightning_accel.projection.kernels.rounding import round_bound
from lightning_accel.projection.training.targets import Target

MOST_ELEMENTS = 1 << 22
"""Of a parameter that is stacked with others."""


def find_equal_shapes(
    targets: Sequence[Target], floor_of: Callable[[Target], Floor]
) -> list[tuple[list[Target], Floor]]:
    """Return parameters that can be stacked, two and more together, with the floor that they share."""
    equal: dict[object, tuple[list[Target], Floor]] = {}
    for target in targets:
        x = target.view()
        if is_sharded(x) or not placement.is_far(x) or x.numel() > MOST_ELEMENTS:
            continue
        if dense_blocks(x, target.group_dims) is not None:
            floor = floor_of(target)
            key = x.shape, x.stride(), x.dtype, x.device, target.group_dims, floor.radius
            equal.setdefault(key, ([], floor))[0].append(target)
    return [found for found in equal.values() if len(found[0]) > 1]


def cut_equal_shapes(
    targets: Sequence[Target], floor: Floor, dead: Sequence[Tensor | None] = ()
) -> tuple[list[Cut], Tensor]:
    """Project each parameter in place onto its own l1,inf ball, bi-level; NaN and infinity leave one as it is.

    Args:
        targets: As `find_equal_shapes` found them.
        floor: Of each of them: how many groups go, or the radius, and which stay.
        dead: For each a boolean ``(groups,)`` of groups to clear whatever their norm, or ``None``; none by default.

    Returns:
        What was found for each, as `cut` finds it; and which groups are cleared or dead, boolean ``(tensors, groups)``.

    Complexity: A fixed number of launches, and a copy of all tensors together; no host synchronization.
    """
    blocks = [dense_blocks(target.view(), target.group_dims) for target in targets]
    parts = [block for block in blocks if block is not None]
    stacked = torch.stack(parts)  # (targets, before, groups, after)
    tops = torch.linalg.vector_norm(stacked, torch.inf, (1, 3)).double()
    clear = _stacked_masks(dead, tops)
    if clear is not None:
        tops = tops.masked_fill(clear & torch.isfinite(tops), 0.0)
    found = l1_thresholds(tops, floor.radii(tops), terms=tops.shape[-1])
    bounds = floor.keep(tops, found.bounds)
    if clear is not None:
        bounds = bounds.masked_fill(clear & torch.isfinite(found.norm).unsqueeze(-1), 0.0)
    high = round_bound(bounds, stacked.dtype).view(len(bounds), 1, -1, 1)
    torch.clamp(stacked, 0.0 - high, high, out=stacked)
    torch._foreach_copy_(parts, list(stacked.unbind(0)))
    rows = zip(found.norm, found.tau, bounds, tops, strict=True)
    cuts = [Cut(norm, tau, [bound], [top]) for norm, tau, bound, top in rows]
    return cuts, bounds == 0.0 if clear is None else (bounds == 0.0) | clear


def _stacked_masks(masks: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    return torch.stack(
        [torch.zeros_like(row, dtype=torch.bool) if m is None else m for m, row in zip(masks, like, strict=True)]
    )
