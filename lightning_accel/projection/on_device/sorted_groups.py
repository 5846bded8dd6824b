r"""The nearest point of the l1,inf ball without a look at a number: sorted groups, and a fixed number of Newton steps.

With the magnitudes of a group sorted from the largest down, :math:`S_k` the sum of the first k, the level that the
group is cut to is :math:`\mu(\theta) = \max_k (S_k - \theta) / k`, or 0. So :math:`\sum_j \mu_j(\theta)` is convex,
falls and is piecewise linear, and which k is the right one for a :math:`\theta` is a binary search in the group.
Newton's method from below passes no solution. Of each step, value over former value plus slope over former slope is at
most 1, so that their product falls at least four times a step: `newton_steps` are enough for all digits of float64,
whatever the data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_accel.projection.balls.floor import Floor
from lightning_accel.projection.balls.outcome import Cut
from lightning_accel.projection.kernels.eager import clamp
from lightning_accel.projection.kernels.layout import Blocks
from lightning_accel.projection.kernels.ordered_sums import running_sums
from lightning_accel.projection.kernels.rounding import inner_radius, require_finite, round_bound

_DIGITS = 56  # bits that the sum of the levels is to be right in
_TINY = torch.finfo(torch.float64).tiny


def newton_steps(groups: int, entries: int) -> int:
    """Return how many steps of Newton's method give all digits, for so many groups of at most so many entries."""
    return math.ceil((_DIGITS + math.log2(max(groups * entries, 2))) / 2.0) + 1


@dataclass
class SortedGroups:
    r"""The groups of one tensor, sorted.

    Attributes:
        sums: float64 ``(groups, entries)``, sums of the largest 1, 2, ... magnitudes.
        corners: As ``sums``: from this :math:`\theta` down, one entry more is cut.
    """

    sums: Tensor
    corners: Tensor

    @classmethod
    def of(cls, source: Tensor) -> "SortedGroups":
        """Sort ``source``, contiguous ``(before, groups, after)``; memory of four times a float32 tensor's is taken."""
        before, groups, after = source.shape
        rows = source.abs().transpose(0, 1).reshape(groups, before * after)
        ordered = rows.sort(-1, descending=True).values.double()
        sums = running_sums(ordered)
        count = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=source.device)
        following = torch.nn.functional.pad(ordered[:, 1:], (0, 1))  # after the last entry there is 0
        # rounding must not disturb the order that a binary search needs
        corners = (sums - count * following).cummax(-1).values
        return cls(sums, corners)

    @property
    def totals(self) -> Tensor:
        """The l1 norms."""
        return self.sums[:, -1]

    @property
    def largest(self) -> Tensor:
        """The largest magnitudes."""
        return self.sums[:, 0]

    def levels(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels of all groups for a float64 scalar ``theta``, and by how much each falls with it."""
        wanted = theta.reshape(1, 1).expand(len(self.sums), 1)
        place = torch.searchsorted(self.corners, wanted.contiguous()).clamp_max_(self.sums.shape[1] - 1)
        count = place + 1.0
        level = (self.sums.gather(1, place) - theta) / count
        alive = (self.totals > theta).unsqueeze(1)
        return (level.clamp_min_(0.0) * alive)[:, 0], (alive / count)[:, 0]


def solve_radius(parts: Sequence[SortedGroups], target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the levels of all groups whose sum is ``target`` at most, and theta.

    Args:
        parts: Sorted tensors that share the ball.
        target: float64 scalar, >= 0, less than the sum of the largest magnitudes.
    """
    groups = sum(len(p.sums) for p in parts)
    entries = max(p.sums.shape[1] for p in parts)
    theta = target.new_zeros(())
    for _ in range(newton_steps(groups, entries)):
        found = [p.levels(theta) for p in parts]
        total, slope = (sum(f[i].sum() for f in found) for i in (0, 1))
        theta = theta + ((total - target) / slope.clamp_min(_TINY)).clamp_min(0.0)  # type: ignore[union-attr]
    levels = torch.cat([p.levels(theta)[0] for p in parts])
    levels = levels * (target / levels.sum().clamp_min(_TINY)).clamp_max(1.0)
    # a radius that is lost beside the norms: the group of the largest gets all of it
    first = torch.cat([p.totals for p in parts]).argmax()
    alone = torch.zeros_like(levels).index_fill(0, first.reshape(1), 1.0) * target
    return torch.where((levels > 0.0).any(), levels, alone), theta


def project_exact_on_device(
    parts: Sequence[tuple[Tensor, tuple[int, ...], Tensor]],
    radius: Tensor | Callable[[Tensor], Tensor],
    *,
    nonfinite: str = "raise",
    dead: Sequence[Tensor | None] = (),
    name: str = "x",
    floor: Floor | None = None,
) -> Cut:
    """Do what `project_exact` does, in a number of operations that depends on shapes alone.

    Arguments and result are those of `project_exact`; no start is needed.

    Complexity: Sorting, then about 40 small steps; no host synchronization with ``nonfinite="skip"``, one otherwise.
    """
    blocks = [Blocks.of(x, dims, out) for x, dims, out in parts]
    sizes = [b.source.shape[1] for b in blocks]
    clear = _joined_mask(dead, blocks)
    sources = [b.source for b in blocks]
    if clear is not None:
        masks = clear.split(sizes)
        sources = [s.masked_fill(m.view(1, -1, 1) & s.isfinite(), 0.0) for s, m in zip(sources, masks, strict=True)]
    groups = [SortedGroups.of(s) for s in sources]
    largest, totals = (torch.cat([getattr(g, which) for g in groups]) for which in ("largest", "totals"))
    norm = largest.sum()
    both = norm + totals.sum()
    if nonfinite == "raise":
        require_finite(both, name)
    finite = both.isfinite()
    if callable(radius):
        theta = radius(totals)
        changed = finite & (theta > 0.0)
        bounds = torch.cat([g.levels(theta)[0] for g in groups])
    else:
        limit = radius.reshape(())
        changed = finite & (norm > limit)
        target = inner_radius(limit, len(largest))
        bounds, theta = solve_radius(groups, target)
        bounds = bounds * (target > 0.0)
    bounds = torch.where(changed, bounds, torch.inf)
    if floor is not None:
        bounds = floor.keep(largest if floor.sparsity is None else totals, bounds)
        bounds = torch.where(changed, bounds, torch.inf)
    if clear is not None:
        bounds = bounds.masked_fill(clear & finite, 0.0)
    pieces = list(bounds.split(sizes))
    for block, bound in zip(blocks, pieces, strict=True):
        clamp(block.source, round_bound(bound, block.source.dtype), block.target)
        block.finish()
    return Cut(norm, torch.where(changed, theta, 0.0), pieces, list(largest.split(sizes)))


def _joined_mask(masks: Sequence[Tensor | None], blocks: Sequence[Blocks]) -> Tensor | None:
    if all(m is None for m in masks):
        return None
    empty = [torch.zeros(b.source.shape[1], dtype=torch.bool, device=b.source.device) for b in blocks]
    return torch.cat([e if m is None else m for e, m in zip(empty, masks, strict=True)])
