"""One budget over the groups of one tensor or of many."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_accel.projection.pyramid import Norm, Pyramid, fibre_norms, project_fibres
from lightning_accel.projection.rounding import inner_radius, require_finite
from lightning_accel.projection.thresholds import Thresholds, l1_thresholds


class Cut(NamedTuple):
    """What a projection found.

    Attributes:
        norm: float64 scalar, the norm before.
        tau: float64 scalar, what was taken off the norm of each group (0 where nothing was done).
        bounds: float64 ``(groups,)`` for each tensor; infinite where a group was left alone.
    """

    norm: Tensor
    tau: Tensor
    bounds: list[Tensor]


def cut_jointly(
    pyramids: Sequence[Pyramid],
    radius: Tensor,
    *,
    outer: Norm = "l1",
    nonfinite: str = "raise",
    dead: Sequence[Tensor | None] = (),
) -> Cut:
    """Project the tensors of ``pyramids`` together onto one ball of the outermost norm, and write the results.

    Args:
        pyramids: One a tensor, all of one device.
        radius: float64 ``(1,)``, >= 0.
        outer: The outermost norm.
        nonfinite: ``"raise"`` or ``"skip"``.
        dead: For each tensor a boolean ``(groups,)`` of groups to clear whatever their norm, or ``None``.

    Raises:
        ValueError: If there is NaN or infinity and ``nonfinite`` is ``"raise"``; nothing was written then.
    """
    tops = [p.tops() for p in pyramids]
    masks = [*dead, *[None] * (len(tops) - len(dead))]
    tops = [t if m is None else t.masked_fill(m & torch.isfinite(t), 0.0) for t, m in zip(tops, masks, strict=True)]
    together = torch.cat(tops) if len(tops) > 1 else tops[0]
    found = _outer_bounds(together.unsqueeze(0), radius, outer, len(together) + max(p.roundings for p in pyramids))
    if nonfinite == "raise":
        require_finite(found.norm)
    bounds = list(found.bounds[0].split([len(t) for t in tops]))
    finite = torch.isfinite(found.norm)
    bounds = [b if m is None else b.masked_fill(m & finite, 0.0) for b, m in zip(bounds, masks, strict=True)]
    alone = together.device.type == "cpu" and all(m is None for m in masks) and bool(torch.isinf(found.bounds[0, 0]))
    for part, bound in zip(pyramids, bounds, strict=True):
        if alone:
            part.leave()
        else:
            part.cut(bound)
    return Cut(found.norm[0], found.tau[0], bounds)


def _outer_bounds(norms: Tensor, radius: Tensor, outer: Norm, terms: int) -> Thresholds:
    """Project the vector of norms ``(1, n)`` onto the ball of the outermost norm."""
    if outer == "l1":
        return l1_thresholds(norms, radius, terms=terms)
    norm = fibre_norms(norms, outer, (1,))[:, 0]
    unchanged = ~((norm > radius) & torch.isfinite(norm))
    target = inner_radius(radius, terms).unsqueeze(1)
    bounds = torch.minimum(project_fibres(norms, target, outer, (1,)), norms)
    return Thresholds(bounds.masked_fill(unchanged.unsqueeze(1), torch.inf), torch.zeros_like(norm), norm)
