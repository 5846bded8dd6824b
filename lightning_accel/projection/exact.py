"""The nearest point of the l1,inf ball, by a joint Newton iteration on all groups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_accel.projection.cuts import Cut
from lightning_accel.projection.kernels import clamp, excess, group_norms, quick_group_norms
from lightning_accel.projection.layout import Blocks
from lightning_accel.projection.rounding import inner_radius, require_finite, round_bound

_MAX_ITERATIONS = 100
_COARSE = 1e-6  # relative change of the bounds at which float32 sums have nothing more to say
_PRECISE = 1e-14  # and float64 sums
_FLOAT32_SUMS = 1e37  # l1 norms up to here surely do not overflow float32
_FEW = 4  # one column of so many is worth moving
_TINY = torch.finfo(torch.float64).tiny


@dataclass
class ExactState:
    """Where the last projection ended; the next one of nearly the same tensors starts there.

    Attributes:
        mu: float64 ``(groups,)``, bounds of all groups.
        iterations: Of the last call, for those who watch.
    """

    mu: Tensor | None = None
    iterations: int = field(default=0, compare=False)


def project_exact(
    parts: Sequence[tuple[Tensor, tuple[int, ...], Tensor]],
    radius: Tensor,
    *,
    nonfinite: str = "raise",
    state: ExactState | None = None,
    dead: Sequence[Tensor | None] = (),
    name: str = "x",
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
        radius: float64 ``(1,)``, >= 0.
        nonfinite: ``"raise"`` or ``"skip"``.
        state: Start and updated end of a sequence of similar projections.
        dead: For each tensor a boolean ``(groups,)`` of groups to clear whatever their norm, or ``None``.
        name: For errors.

    Raises:
        ValueError: If there is NaN or infinity and ``nonfinite`` is ``"raise"``; nothing was written then.

    References:
        Chu, Zhang, Sun, Tao, "Semismooth Newton algorithm for efficient projections onto l1,inf-norm ball", ICML 2020.
        *Deviations*: all groups share a pass; dead groups are dropped; the result is feasible without slack.
    """
    blocks = [Blocks.of(x, dims, out) for x, dims, out in parts]
    norms = [quick_group_norms(b.source) for b in blocks]
    sizes = [len(n[0]) for n in norms]
    largest, totals = (_joined([n[i] for n in norms]) for i in (0, 1))
    clear = joined_mask(dead, sizes, largest)
    if clear is not None:
        clear &= torch.isfinite(largest)
        largest, totals = largest.masked_fill(clear, 0.0), totals.masked_fill(clear, 0.0)
    norm = largest.sum()
    both = torch.stack((norm, totals.sum()))
    size, l1 = both.tolist()
    if math.isinf(l1) and math.isfinite(size):  # sums of float32 overflow
        totals = _joined([group_norms(b.source)[1] for b in blocks])
        totals = totals if clear is None else totals.masked_fill(clear, 0.0)
        both = torch.stack((norm, totals.sum()))
        size, l1 = both.tolist()
    finite = math.isfinite(size + l1)
    if nonfinite == "raise" and not finite:
        require_finite(both, name)
    theta, unchanged = torch.zeros_like(norm), not finite or size <= float(radius)
    if unchanged:
        bounds = torch.full_like(largest, torch.inf)
        if state is not None:
            state.mu, state.iterations = None, 0
    else:
        entries = [largest.new_full((n,), b.source.numel() // n) for n, b in zip(sizes, blocks, strict=True)]
        target = inner_radius(float(radius), len(largest))
        solver = _Solver([b.source for b in blocks], sizes, largest, totals, _joined(entries), target)
        bounds, theta = solver.solve(None if state is None else state.mu)
        if state is not None:
            state.mu, state.iterations = bounds, solver.iterations
    if clear is not None and finite:
        bounds = bounds.masked_fill(clear, 0.0)
    pieces = list(bounds.split(sizes))
    for block, bound in zip(blocks, pieces, strict=True):
        if unchanged and bool(torch.isinf(bound).all()):
            block.leave()
        else:
            clamp(block.source, round_bound(bound, block.source.dtype), block.target, one_shape=True)
            block.finish()
    return Cut(norm, theta, pieces)


@dataclass
class _Solver:
    """Newton's method on the groups that can still survive; vectors are float64 over the groups of all tensors."""

    sources: list[Tensor]
    sizes: list[int]
    largest: Tensor
    totals: Tensor
    entries: Tensor
    target: float
    iterations: int = 0
    _packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def solve(self, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return bounds (feasible without slack) and theta."""
        if self.target <= 0.0:
            return torch.zeros_like(self.largest), self.totals.max()
        coarse = all(s.dtype != torch.float64 for s in self.sources) and float(self.totals.max()) < _FLOAT32_SUMS
        tolerance = _COARSE if coarse else _PRECISE
        at_zero = torch.zeros_like(self.totals), self.totals, self.entries
        moved = len(self.totals)
        if start is not None and start.shape == self.totals.shape:
            # those with the largest l1 norms live: as many as last time, and some that may have joined them
            chosen = self.totals.topk(_more_than(int(torch.count_nonzero(start)), len(start))).indices.sort().values
            moved = len(chosen)
            found = self._excess(chosen, torch.minimum(start, self.largest)[chosen], precise=not coarse)
            at, above, count = (zero.index_copy(0, chosen, new) for zero, new in zip(at_zero, found, strict=True))
            theta, mu = solve_tangents(at, above, count, self.target, self.totals, guess=self.totals[chosen].min())
        else:
            theta, mu = solve_tangents(*at_zero, self.target)
        # theta is a lower bound: nothing below it can survive
        alive = torch.nonzero(self.totals > theta)[:, 0]
        if len(alive) > moved:
            self._packed.clear()  # they live without having been chosen
        mu, totals = mu[alive], self.totals[alive]
        for self.iterations in range(1, _MAX_ITERATIONS + 1):
            at, above, count = self._excess(alive, torch.minimum(mu, self.largest[alive]), precise=not coarse)
            theta, update = solve_tangents(at, above, count, self.target, totals, guess=theta)
            # sums of magnitudes around mu + theta / count can be told apart to this much
            settled = (update - at).abs().max() <= tolerance * (update + theta / count).max()
            mu = update
            if bool(settled):
                break
            keep = totals > theta
            alive, mu, totals = alive[keep], mu[keep], totals[keep]
        mu = mu * (self.target / mu.sum().clamp_min(_TINY)).clamp_max(1.0)
        bounds = torch.zeros_like(self.largest)
        bounds[alive] = mu
        return bounds, theta

    def _excess(self, alive: Tensor, mu: Tensor, *, precise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate at ``mu``, which float32 sums round first; return that point, the sums and the counts (>= 1)."""
        at = mu if precise else mu.float().double()
        if len(self.sizes) == 1:
            above, count = excess(*self._pack(0, alive), at, precise=precise)
            return at, above, count.clamp_min_(1.0)
        sums, counts, start = [], [], 0
        for index, size in enumerate(self.sizes):
            first, last = torch.searchsorted(alive, torch.tensor([start, start + size], device=alive.device)).tolist()
            source, chosen = self._pack(index, alive[first:last] - start)
            above, count = excess(source, chosen, at[first:last], precise=precise)
            sums.append(above)
            counts.append(count)
            start += size
        return at, torch.cat(sums), torch.cat(counts).clamp_min_(1.0)

    def _pack(self, index: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tensor that holds the chosen groups, and where they are in it.

        Few columns of many are moved together: later iterations, with fewer still, then read nothing else. (Rows need
        not be: reading some of them reads no others.)
        """
        source, kept = self._packed.get(index, (self.sources[index], None))
        place = chosen if kept is None else torch.searchsorted(kept, chosen)
        if len(source) > 1 and source.device.type == "cpu" and 0 < _FEW * len(chosen) <= source.shape[1]:
            self._packed[index] = source.index_select(1, place), chosen
            return self._packed[index][0], torch.arange(len(chosen))
        return source, place


def solve_tangents(
    mu: Tensor,
    above: Tensor,
    count: Tensor,
    target: float,
    totals: Tensor | None = None,
    *,
    guess: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`\sum_j (\mu_j + (\phi_j - \theta) / k_j)_+ = \eta` for :math:`\theta`; return it and the terms.

    The sum is convex and falls, so Newton's method comes from below after the first step, wherever that starts; the
    terms that count only get fewer then.

    Args:
        mu: float64 ``(groups,)``, where the tangents touch.
        above: As ``mu``, values :math:`\phi_j` there.
        count: As ``mu``, negative slopes :math:`k_j` >= 1.
        target: > 0.
        totals: As ``mu``, l1 norms; groups that :math:`\theta` passes get 0.
        guess: float64 scalar near :math:`\theta`; by default 0.
    """
    at_zero = mu + above / count
    slope = 1.0 / count
    crossing = above + mu * count
    active = crossing > (0.0 if guess is None else guess)
    number = int(torch.count_nonzero(active))
    if number == 0:
        active = crossing > 0.0
        number = len(crossing)
    falls = False
    while True:
        among = active.to(at_zero.dtype)
        theta = (torch.dot(at_zero, among) - target) / torch.dot(slope, among)
        active = crossing > theta
        left = int(torch.count_nonzero(active))
        if left in (0, number) or (falls and left > number):
            break
        number, falls = left, True
    update = (at_zero - theta * slope).clamp_min_(0.0)
    if totals is not None:
        update.masked_fill_(totals <= theta, 0.0)
    return theta, update


def crossing_levels(sources: Sequence[Tensor], totals: Tensor, theta: Tensor) -> Tensor:
    r"""Return :math:`\mu_j(\theta)` with :math:`\sum_i (|y_{ij}| - \mu_j)_+ = \theta`; 0 where the l1 norm is less.

    Args:
        sources: Contiguous ``(before, groups, after)``.
        totals: float64 ``(groups,)``, l1 norms of the groups of all sources.
        theta: float64 scalar, > 0.
    """
    levels, start = torch.zeros_like(totals), 0
    for source in sources:
        end = start + source.shape[1]
        mine = torch.nonzero(totals[start:end] > theta)[:, 0]
        mu = torch.zeros(len(mine), dtype=torch.float64, device=source.device)
        for _ in range(_MAX_ITERATIONS):
            above, count = excess(source, mine, mu, precise=True)
            update = mu + (above - theta) / count.clamp_min_(1.0)
            settled = len(mine) == 0 or bool((update - mu).max() <= 1e-14 * (update + theta / count).max())
            mu = update
            if settled:
                break
        levels[start + mine] = mu
        start = end
    return levels


def _more_than(count: int, most: int) -> int:
    return min(count + count // 32 + 2, most)


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat([*vectors])


def joined_mask(masks: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> Tensor | None:
    """Join masks of groups; ``None`` where there is none."""
    if all(m is None for m in masks):  # true of none at all as well
        return None
    empty = [torch.zeros(n, dtype=torch.bool, device=like.device) for n in sizes]
    return torch.cat([e if m is None else m.clone() for e, m in zip(empty, masks, strict=True)])
