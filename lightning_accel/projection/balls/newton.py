"""Newton's method for the bounds of groups in the l1,inf ball."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_accel.projection.kernels import compiled, placement
from lightning_accel.projection.kernels.eager import excess

_MAX_ITERATIONS = 100
_COARSE = 1e-6  # relative change of the bounds at which float32 sums have nothing more to say
_PRECISE = 1e-14  # and float64 sums
_FLOAT32_SUMS = 1e37  # l1 norms up to here surely do not overflow float32
SMALL_RADIUS = 1e-4  # of the largest l1 norm: below it, sums of float32 say too little about what is left
_FEW = 4  # one column of so many is worth moving
_LITTLE = 1 << 17  # entries
_TINY = torch.finfo(torch.float64).tiny


@dataclass
class Newton:
    """Newton's method on the groups that can still survive, for the bounds of all groups.

    Attributes:
        sources: Contiguous ``(before, groups, after)``.
        largest: float64 ``(groups,)``, of all tensors' groups: their largest magnitudes.
        totals: As ``largest``, their l1 norms.
        iterations: Of the last call.
    """

    sources: Sequence[Tensor]
    largest: Tensor
    totals: Tensor
    iterations: int = 0
    _packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def solve(self, target: float, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return bounds whose sum is ``target`` at most, without slack, and theta.

        Args:
            target: >= 0.
            start: float64 ``(groups,)``, bounds of nearly the same tensors.
        """
        if target <= 0.0:
            return torch.zeros_like(self.largest), self.totals.max()
        coarse, tolerance = self._precision(target)
        entries = [self.totals.new_full((s.shape[1],), s.numel() // s.shape[1]) for s in self.sources]
        at_zero = torch.zeros_like(self.totals), self.totals, joined(entries)
        moved = len(self.totals)
        if start is not None and start.shape == self.totals.shape:
            # those with the largest l1 norms live: as many as last time, and some that may have joined them
            chosen = self.totals.topk(_more_than(int(torch.count_nonzero(start)), len(start))).indices.sort().values
            moved = len(chosen)
            found = self._excess(chosen, torch.minimum(start, self.largest)[chosen], precise=not coarse)
            at, above, count = (zero.index_copy(0, chosen, new) for zero, new in zip(at_zero, found, strict=True))
            theta, mu = solve_tangents(at, above, count, target, self.totals, guess=self.totals[chosen].min())
        else:
            theta, mu = solve_tangents(*at_zero, target)
        # theta is a lower bound: nothing below it can survive
        alive = torch.nonzero(self.totals > theta)[:, 0]
        if len(alive) > moved:
            self._packed.clear()  # they live without having been chosen
        mu, totals = mu[alive], self.totals[alive]
        for self.iterations in range(1, _MAX_ITERATIONS + 1):
            if len(alive) == 0:  # theta and the largest l1 norm are the same number
                break
            at, above, count = self._excess(alive, torch.minimum(mu, self.largest[alive]), precise=not coarse)
            theta, update = solve_tangents(at, above, count, target, totals, guess=theta)
            settled = _has_settled(update, at, count, float(theta), tolerance)
            mu = update
            if settled:
                break
            keep = totals > theta
            if not bool(keep.all()):
                alive, mu, totals = alive[keep], mu[keep], totals[keep]
        mu = mu * (target / mu.sum().clamp_min(_TINY)).clamp_max(1.0)
        bounds = torch.zeros_like(self.largest)
        bounds[alive] = mu
        if not bool(bounds.any()):  # the radius is lost beside the norms: the group of the largest gets all of it
            bounds[self.totals.argmax()] = target
        return bounds, theta

    def levels(self, theta: Tensor, start: Tensor | None = None, *, precise: bool = False) -> Tensor:
        r"""Return :math:`\mu_j(\theta)` with :math:`\sum_i (|y_{ij}| - \mu_j)_+ = \theta`; 0 where the l1 norm is less.

        A step of Newton's method for a convex, falling function ends at or below the solution, wherever it begins
        within the range of the magnitudes; all others come from below.

        Args:
            theta: float64 scalar, > 0.
            start: As in `solve`.
            precise: To 1e-14, whatever the type.
        """
        coarse, tolerance = (False, _PRECISE) if precise else self._precision()
        alive = torch.nonzero(self.totals > theta)[:, 0]
        bounds = torch.zeros_like(self.largest)
        if len(alive) == 0:
            return bounds
        if start is None or start.shape != bounds.shape:
            start = bounds
        mu = torch.minimum(start, self.largest)[alive]
        for self.iterations in range(1, _MAX_ITERATIONS + 1):
            at, above, count = self._excess(alive, mu, precise=not coarse)
            mu = (at + (above - theta) / count).clamp_min_(0.0)
            if _has_settled(mu, at, count, float(theta), tolerance):
                break
        bounds[alive] = mu
        return bounds

    def _precision(self, target: float = math.inf) -> tuple[bool, float]:
        """Return whether sums of float32 are as good as the data, and where to stop."""
        most = float(self.totals.max())
        coarse = all(s.dtype != torch.float64 for s in self.sources) and most < _FLOAT32_SUMS
        coarse = coarse and target > SMALL_RADIUS * most
        return coarse, _COARSE if coarse else _PRECISE

    def _excess(self, alive: Tensor, mu: Tensor, *, precise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate at ``mu``, which float32 sums round first; return that point, the sums and the counts (>= 1)."""
        at = mu if precise else mu.float().double()
        if len(self.sources) == 1:
            above, count = excess(*self._pack(0, alive), at, precise=precise)
            return at, above, count.clamp_min_(1.0)
        sums, counts, start = [], [], 0
        for index, size in enumerate(s.shape[1] for s in self.sources):
            first, last = torch.searchsorted(alive, torch.tensor([start, start + size], device=alive.device)).tolist()
            source, chosen = self._pack(index, alive[first:last] - start)
            above, count = excess(source, chosen, at[first:last], precise=precise)
            sums.append(above)
            counts.append(count)
            start += size
        return at, torch.cat(sums), torch.cat(counts).clamp_min_(1.0)

    def _pack(self, index: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tensor that holds the chosen groups, and where they are in it.

        Few columns of many are moved together, each in one piece where that is little work: later iterations, with
        fewer still, then read nothing else. (Rows need not be: reading some of them reads no others.)
        """
        source, kept = self._packed.get(index, (self.sources[index], None))
        place = chosen if kept is None else torch.searchsorted(kept, chosen)
        if len(source) > 1 and not placement.is_far(source) and 0 < _FEW * len(chosen) <= source.shape[1]:
            together = source.index_select(1, place)
            if together.numel() <= _LITTLE:
                together = together.transpose(0, 1).reshape(1, len(chosen), -1).contiguous()
            self._packed[index] = together, chosen
            return together, torch.arange(len(chosen), device=source.device)
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
    start = 0.0 if guess is None else float(guess)
    found = compiled.solve_tangents((mu, above, count), target, totals, start)
    if found is not None:
        return mu.new_tensor(found[0]), found[1]
    at_zero = mu + above / count
    slope = 1.0 / count
    crossing = above + mu * count
    active = crossing > start
    number = int(torch.count_nonzero(active))
    if number == 0:
        active = crossing > 0.0
        number = len(crossing)
    falls = False
    while True:
        theta = (_ordered_sum(at_zero, active) - target) / _ordered_sum(slope, active)
        active = crossing > theta
        left = int(torch.count_nonzero(active))
        if left in (0, number) or (falls and left > number):
            break
        number, falls = left, True
    update = (at_zero - theta * slope).clamp_min_(0.0)
    if totals is not None:
        update.masked_fill_(totals <= theta, 0.0)
    return theta, update


def _ordered_sum(values: Tensor, active: Tensor) -> Tensor:
    """Add up what is active from the first to the last, as machine code does."""
    return torch.where(active, values, 0.0).cumsum(0)[-1]


def _has_settled(update: Tensor, at: Tensor, count: Tensor, theta: float, tolerance: float) -> bool:
    """Whether bounds have moved by no more than what sums of magnitudes around them can be told apart by."""
    found = compiled.has_settled((update, at, count), theta, tolerance)
    if found is None:
        found = bool((update - at).abs().max() <= tolerance * (update + theta / count).max())
    return found


def _more_than(count: int, most: int) -> int:
    return min(count + count // 16 + 4, most)


def joined(vectors: Sequence[Tensor]) -> Tensor:
    """Join vectors; one stays as it is."""
    return vectors[0] if len(vectors) == 1 else torch.cat([*vectors])
