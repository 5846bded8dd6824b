"""The nearest point of the l1,inf ball, by a joint Newton iteration on all groups."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_accel.projection.balls.floor import Floor
from lightning_accel.projection.balls.newton import SMALL_RADIUS, Newton, joined
from lightning_accel.projection.balls.outcome import Cut
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.kernels.eager import clamp, group_norms, quick_group_norms
from lightning_accel.projection.kernels.layout import Blocks
from lightning_accel.projection.kernels.rounding import inner_radius, require_finite, round_bound

_MEASURES = quick_group_norms, group_norms


@dataclass
class ExactState:
    """Where the last projection ended; the next one of nearly the same tensors starts there.

    Attributes:
        mu: float64 ``(groups,)``, bounds of all groups.
        iterations: Of the last call, for those who watch.

    Example:
        >>> import torch
        >>> from lightning_accel.projection import ExactState, project_l1inf
        >>> state = ExactState()  # remembers the bounds, from which the next projection starts
        >>> weight = torch.randn(4, 3)
        >>> for _ in range(3):
        ...     weight = project_l1inf(weight, 1.0, group_dims=(0,), method="exact", state=state)
    """

    mu: Tensor | None = None
    iterations: int = field(default=0, compare=False)


def project_exact(
    parts: Sequence[tuple[Tensor, tuple[int, ...], Tensor]],
    radius: Tensor | Callable[[Tensor], Tensor],
    *,
    nonfinite: str = "raise",
    state: ExactState | None = None,
    dead: Sequence[Tensor | None] = (),
    name: str = "x",
    floor: Floor | None = None,
) -> Cut:
    r"""Project tensors together onto one l1,inf ball, exactly.

    Every iteration replaces :math:`\phi_j(\mu) = \sum_i (|y_{ij}| - \mu)_+` by its tangent at :math:`\mu_j`, and solves
    for :math:`\theta` and all :math:`\mu_j` at once. Tangents lie below the convex :math:`\phi_j`, so :math:`\theta`
    rises to its solution and groups whose l1 norm it has passed are out for good. It starts where tangents at
    :math:`\mu = 0` lead, or at the last solution. Bounds are found to 1e-14 for float64 data; for 16- and 32-bit data,
    whose magnitudes are summed in float32 within a piece of a few rows and in float64 across pieces, to a unit in the
    last place of the largest float32 entry.

    Args:
        parts: Tensor, group dimensions and output of each; all of one device.
        radius: float64 ``(1,)``, >= 0; or what makes :math:`\theta` of the groups' l1 norms, float64 ``(groups,)``
            (0 for dead ones), for the ball that it belongs to: then each :math:`\mu_j` is found by itself.
        nonfinite: ``"raise"`` or ``"skip"``.
        state: Start and updated end of a sequence of similar projections.
        dead: For each tensor a boolean ``(groups,)`` of groups to clear whatever their norm, or ``None``.
        name: For errors.
        floor: Groups that stay; none by default.

    Raises:
        ValueError: If there is NaN or infinity and ``nonfinite`` is ``"raise"``; nothing was written then.

    References:
        Chu, Zhang, Sun, Tao, "Semismooth Newton algorithm for efficient projections onto l1,inf-norm ball", ICML 2020.
        *Deviations*: all groups share a pass; dead groups are dropped; the result is feasible without slack.
    """
    if placement.is_far(parts[0][0]):
        from lightning_accel.projection.on_device.sorted_groups import project_exact_on_device

        return project_exact_on_device(parts, radius, nonfinite=nonfinite, dead=dead, name=name, floor=floor)
    blocks = [Blocks.of(x, dims, out) for x, dims, out in parts]
    sources = [b.source for b in blocks]
    clear = _joined_mask(dead, sources)
    limit = None if callable(radius) else float(radius)
    precise = clear is None and limit is not None and _is_small(limit, sources)
    largest, totals, both = _norms(sources, clear, (_precise_group_norms,) if precise else _MEASURES)
    norm, size = both[0], float(both[0])
    finite = math.isfinite(float(both.sum()))
    if nonfinite == "raise" and not finite:
        require_finite(both, name)
    bounds, theta, iterations = None, torch.zeros_like(norm), 0
    if finite:
        if not precise and limit is not None and 0.0 < limit < SMALL_RADIUS * float(totals.max()):
            largest, totals, _ = _norms(sources, clear, (_precise_group_norms,))
        newton, start = Newton(sources, largest, totals), None if state is None else state.mu
        if callable(radius):
            level = radius(totals)
            if bool(level > 0.0):
                theta, bounds = level, newton.levels(level, start)
        elif limit is not None and size > limit:
            bounds, theta = newton.solve(inner_radius(limit, len(largest)), start)
        iterations = newton.iterations
    if state is not None:
        state.mu, state.iterations = bounds, iterations
    unchanged = bounds is None
    if bounds is None:
        bounds = torch.full_like(largest, torch.inf)
    elif floor is not None:
        bounds = floor.keep(largest if floor.sparsity is None else totals, bounds)
    if clear is not None and finite:
        bounds = bounds.masked_fill(clear, 0.0)
    pieces = list(bounds.split([s.shape[1] for s in sources]))
    for block, bound in zip(blocks, pieces, strict=True):
        if unchanged and bool(torch.isinf(bound).all()):
            block.leave()
        else:
            clamp(block.source, round_bound(bound, block.source.dtype), block.target)
            block.finish()
    return Cut(norm, theta, pieces, list(largest.split([s.shape[1] for s in sources])))


def _norms(
    sources: Sequence[Tensor],
    clear: Tensor | None,
    measures: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest magnitudes and the l1 norms of all groups, 0 for those to clear, and the sums of both."""
    for measure in measures:
        norms = [measure(s) for s in sources]
        largest, totals = (joined([n[i] for n in norms]) for i in (0, 1))
        if clear is not None:
            gone = clear & torch.isfinite(largest)
            largest, totals = largest.masked_fill(gone, 0.0), totals.masked_fill(gone, 0.0)
        both = torch.stack((largest.sum(), totals.sum()))
        size, l1 = both.tolist()
        if not (math.isinf(l1) and math.isfinite(size)):  # sums of float32 overflow
            break
    return largest, totals, both


def _precise_group_norms(x: Tensor) -> tuple[Tensor, Tensor]:
    return quick_group_norms(x, precise=True)


def _is_small(radius: float, sources: Sequence[Tensor]) -> bool:
    """Whether a radius surely is too small for sums of float32, as one group tells, most often."""
    return 0.0 < radius < 0.999 * SMALL_RADIUS * float(sources[0][:, 0].abs().sum(dtype=torch.float64))


def _joined_mask(masks: Sequence[Tensor | None], sources: Sequence[Tensor]) -> Tensor | None:
    """Join masks of groups; ``None`` where there is none."""
    if all(m is None for m in masks):  # true of none at all as well
        return None
    empty = [torch.zeros(s.shape[1], dtype=torch.bool, device=s.device) for s in sources]
    return torch.cat([e if m is None else m for e, m in zip(empty, masks, strict=True)])
