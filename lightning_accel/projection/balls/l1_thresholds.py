"""The l1 threshold, on which every projection here rests: how much to take off each norm to reach the radius."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_accel.projection.kernels import placement
from lightning_accel.projection.kernels.compiled import EVALUATIONS
from lightning_accel.projection.kernels.ordered_sums import running_sums
from lightning_accel.projection.kernels.rounding import EPSILON, inner_radius

SORT_UP_TO = 5_000  # groups; above, dropping what cannot survive is quicker than sorting
_TINY = torch.finfo(torch.float64).tiny


class Thresholds(NamedTuple):
    """What an l1 threshold found, for ``batch`` vectors of ``n`` norms each.

    Attributes:
        bounds: float64 ``(batch, n)``, what is left of each norm; infinite in vectors that stay as they are.
        tau: float64 ``(batch,)``, what is taken off each norm.
        norm: float64 ``(batch,)``, l1 norms before.
    """

    bounds: Tensor
    tau: Tensor
    norm: Tensor


def l1_thresholds(norms: Tensor, radius: Tensor, *, terms: int | None = None) -> Thresholds:
    r"""Project vectors of norms onto l1 balls.

    Solves :math:`\min_t \|t - v\|_2` subject to :math:`\sum_j t_j \le \eta,\ t \ge 0`, whose solution is
    :math:`t = (v - \tau)_+`. The largest norm is subtracted first: only norms within :math:`\eta` of it survive, and
    their differences to it are exact, so that small radii of large tensors lose no digits. The result is scaled down
    by what rounding left over, so :math:`\sum_j t_j \le \eta` holds in float64 and without slack.

    Args:
        norms: float64 ``(batch, n)``, non-negative.
        radius: float64 ``(batch,)``, >= 0.
        terms: Roundings in the norm that must stay below ``radius``; by default ``n``.

    Complexity: One vector on CPU: Newton's method, a few passes over the norms. Several: sorting up to 5,000 norms and
        on GPU (no host synchronization), Michelot's algorithm beyond.

    References:
        Condat, "Fast projection onto the simplex and the l1 ball", Math. Program. 158 (2016); Michelot (1986).
    """
    if norms.shape[0] == 1 and norms.shape[1] > 0 and not placement.is_far(norms):
        left, shift, size = single_threshold(norms[0], float(radius), terms or norms.shape[-1])
        return Thresholds(left.unsqueeze(0), norms.new_full((1,), shift), norms.new_full((1,), size))
    norm = norms.sum(-1)
    if norms.shape[-1] == 0:
        return Thresholds(norms, torch.zeros_like(norm), norm)
    unchanged = ~((norm > radius) & torch.isfinite(norm))
    target = inner_radius(radius, terms or norms.shape[-1])
    top = norms.amax(-1, keepdim=True)
    below = norms - top
    tau = simplex_threshold(below, target)
    kept = (below - tau.unsqueeze(-1)).clamp_min_(0.0)
    kept *= (target / kept.sum(-1).clamp_min_(_TINY)).clamp_max_(1.0).unsqueeze(-1)
    bounds = kept.masked_fill_(unchanged.unsqueeze(-1), torch.inf)
    return Thresholds(bounds, (tau + top.squeeze(-1)).masked_fill_(unchanged, 0.0), norm)


def single_threshold(norms: Tensor, radius: float, terms: int) -> tuple[Tensor, float, float]:
    """Do what `l1_thresholds` does for one vector on CPU, where small operations cost and looking at numbers is free.

    Newton's method from below drops norms that cannot survive until what is left sums to the radius, or until it drops
    no more; its last sum is the one that the result is scaled by.

    Args:
        norms: float64 ``(n,)``, n >= 1.
        radius: >= 0.
        terms: As in `l1_thresholds`.

    Returns:
        What `Thresholds` holds, without the dimension of the batch.
    """
    size = float(norms.sum())
    if not size > radius or not math.isfinite(size):
        return torch.full_like(norms, torch.inf), 0.0, size
    target = inner_radius(radius, terms)
    top = float(norms.max())
    below = norms - top
    # the largest is 0 here, and alone would be cut by `target`; the mean is off by no more than what is taken off it
    tau = max((_summed(norms) - target) / len(norms) - top - len(norms) * EPSILON * top, -target)
    enough = target * (1.0 + EPSILON * len(norms))
    previous = -1
    while True:
        kept = (below - tau).clamp_min_(0.0)
        rest = _summed(kept)
        if rest <= enough:
            break
        count = int(torch.count_nonzero(kept))
        if count == previous:
            break
        tau += (rest - target) / count
        previous = count
    if rest > target:
        kept *= target / rest
    return kept, top + tau, size


def threshold_near(norms: Tensor, radius: float, terms: int, start: float) -> tuple[Tensor, float] | None:
    """Find the threshold of a vector on CPU that has changed little since ``start`` was its threshold.

    Between the operations of a training step, whose data and code fill the caches, even a small operation takes 3 us
    or more; so there are as few here as can be: Newton's method needs two or three evaluations from a good start.

    Args:
        norms: float64 ``(n,)``, n >= 1.
        radius: >= 0.
        terms: As in `l1_thresholds`.
        start: > 0.

    Returns:
        What is left of each norm, float64 ``(n,)``, and the threshold; ``None`` where a more careful look is due:
        norms of the ball or not finite, a radius below the threshold (differences to the largest norm count), a start
        too far off.
    """
    if radius < start:
        return None
    target, low, slack = near_limits(len(norms), radius, terms)
    tau = start
    for _ in range(EVALUATIONS):
        kept = torch.nn.functional.softshrink(norms, tau)
        rest = _summed(kept)
        if low <= rest <= target:
            return kept, tau
        count = int(torch.count_nonzero(kept)) if math.isfinite(rest) else 0
        if count == 0:
            return None
        tau += (rest - target + slack) / count
        if not 0.0 < tau <= radius:
            return None
    return None


def _summed(norms: Tensor) -> float:
    """Return a sum that goes from the first to the last, as machine code adds up."""
    return float(norms.cumsum(0)[-1])


def near_limits(groups: int, radius: float, terms: int) -> tuple[float, float, float]:
    """Return the sum to reach, the least one that is close enough, and what rounding may add to it."""
    target = inner_radius(radius, terms)
    slack = 8.0 * EPSILON * groups * target
    return target, target - 2.0 * slack, slack


def simplex_threshold(values: Tensor, total: Tensor) -> Tensor:
    r"""Return :math:`\tau` with :math:`\sum_j (v_j - \tau)_+ = s` for each vector.

    Args:
        values: float64 ``(batch, n)``, any sign, n >= 1.
        total: float64 ``(batch,)``, >= 0.
    """
    if not placement.is_far(values) and values.shape[-1] > SORT_UP_TO:
        return torch.stack([_michelot(v, s) for v, s in zip(values, total, strict=True)])
    descending = values.sort(-1, descending=True).values
    count = torch.arange(1, values.shape[-1] + 1, dtype=values.dtype, device=values.device)
    return ((running_sums(descending) - total.unsqueeze(-1)) / count).amax(-1)


def _michelot(values: Tensor, total: Tensor) -> Tensor:
    """Michelot's algorithm on one vector; entries that cannot be above the threshold are dropped as it rises."""
    active = values[values >= values.max() - total]
    while True:
        tau = (active.sum() - total) / active.numel()
        remaining = active[active > tau]
        if remaining.numel() in (0, active.numel()):
            return tau
        active = remaining
