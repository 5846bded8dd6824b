"""Groups that stay whatever a ball asks for: a layer without any output is dead, and so is what follows it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_accel.projection.kernels import placement


def count_to_clear(sizes: Sequence[int], least: int, sparsity: float) -> int:
    """Return how many groups of tensors go for a sparsity, in [0, 1], of all of them if ``least`` of each stay."""
    most = sum(max(size - least, 0) for size in sizes)
    return min(round(sparsity * sum(sizes)), most)


class Floor(NamedTuple):
    """How many groups a projection may clear, and which it may not.

    Attributes:
        sizes: Groups of each tensor that shares the budget.
        least: Groups of each that stay, >= 0.
        sparsity: Fraction of all groups to clear; ``None`` where a radius decides.
        radius: Of the ball; read only without a sparsity.
        zeros_only: Clear what the projection clears and leave all other groups as they are; for a sparsity.
    """

    sizes: Sequence[int]
    least: int
    sparsity: float | None = None
    radius: float = math.inf
    zeros_only: bool = False

    @property
    def cleared(self) -> int:
        """Groups to clear for the sparsity, as far as the floor allows."""
        return count_to_clear(self.sizes, self.least, self.sparsity or 0.0)

    def protected(self, norms: Tensor) -> Tensor | None:
        """Return which groups no budget may clear, boolean ``(..., groups)``: the largest of each tensor.

        ``None`` where the number of groups to clear sees to that: for one tensor and a sparsity.
        """
        if self.least == 0 or (len(self.sizes) == 1 and self.sparsity is not None):
            return None
        mask = torch.zeros_like(norms, dtype=torch.bool)
        for part, marks in zip(norms.split(list(self.sizes), -1), mask.split(list(self.sizes), -1), strict=True):
            marks.scatter_(-1, part.argsort(dim=-1, descending=True, stable=True)[..., : self.least], True)
        return mask

    def smallest(self, norms: Tensor) -> tuple[Tensor, float]:
        """Return what is left of the norms of one tensor on CPU when the smallest are cleared, of equal ones the first.

        Args:
            norms: float64 ``(groups,)``, finite; `cleared`, at least one of them, go.

        Returns:
            0 or infinity for each, float64 ``(groups,)``, and the middle between the two kinds; 0 where only zeros go.
        """
        cleared = self.cleared
        low = float(norms.kthvalue(cleared).values)
        left = torch.full_like(norms, math.inf)
        if low == 0.0:
            return left, 0.0
        goes = norms <= low
        if int(goes.sum()) > cleared:
            goes = torch.zeros_like(goes).index_fill(0, norms.argsort(stable=True)[:cleared], True)
        high = low if cleared == len(norms) else float(norms.kthvalue(cleared + 1).values)
        return left.masked_fill_(goes, 0.0), low + 0.5 * (high - low)

    def tau(self, norms: Tensor) -> Tensor:
        """Return what to take off each norm, float64, so that `cleared` groups go; without a synchronization.

        It is the middle between the largest norm to go and the smallest to stay.

        Args:
            norms: float64 ``(..., groups)``; each row has a floor and a result of its own.
        """
        cleared = self.cleared
        if cleared == 0:
            return norms.new_zeros(norms.shape[:-1])
        mask = self.protected(norms)
        values = norms if mask is None else norms.masked_fill(mask, torch.inf)
        if cleared == values.shape[-1]:
            return values.amax(-1)
        if not placement.is_far(values):  # finds one of 10,000 in a sixth of the time of sorting them
            low, high = values.kthvalue(cleared).values, values.kthvalue(cleared + 1).values
        else:
            low, high = values.sort(-1).values[..., cleared - 1 : cleared + 1].unbind(-1)
        middle = torch.where(torch.isinf(high), low, low + 0.5 * (high - low))
        return torch.where(low > 0.0, middle, 0.0)

    def radii(self, norms: Tensor) -> Tensor:
        """Return the radius of the ball of each row of norms, float64 ``(..., groups)``; without a synchronization."""
        if self.sparsity is None:
            return torch.full(norms.shape[:-1], self.radius, dtype=torch.float64, device=norms.device)
        return (norms - self.tau(norms).unsqueeze(-1)).clamp_min_(0.0).sum(-1)

    def idle(self, radius: float) -> bool:
        """Whether all that a projection onto the ball of a radius clears may go."""
        if self.sparsity is not None or self.zeros_only:
            return False
        # the largest norm of a ball of some radius is never cleared
        return self.least == 0 or (self.least == 1 and len(self.sizes) == 1 and radius > 0.0)

    def keep(self, norms: Tensor, bounds: Tensor) -> Tensor:
        """Return bounds that let live what has to: groups beyond the number to clear (ties), and those of the floor.

        Args:
            norms: float64 ``(..., groups)``, before; each row has a floor of its own.
            bounds: As ``norms``, what a projection would leave of each; infinite where it leaves a group alone.

        Groups of the floor stay as they are for a sparsity. For a radius they keep a share of it, in proportion to
        their norms, and all others make room for that.
        """
        if self.zeros_only:
            bounds = bounds.masked_fill(bounds > 0.0, torch.inf)
        gone = (bounds == 0.0) & (norms > 0.0)
        if self.sparsity is not None:
            if not placement.is_far(norms) and int((bounds == 0.0).sum()) <= self.cleared and len(self.sizes) == 1:
                return bounds
            mask = self.protected(norms)
            order = (norms if mask is None else norms.masked_fill(mask, torch.inf)).argsort(dim=-1, stable=True)
            stays = torch.ones_like(gone).scatter_(-1, order[..., : self.cleared], False)
            return bounds.masked_fill(gone & stays, torch.inf)
        if self.idle(self.radius):
            return bounds
        mask = self.protected(norms)
        lost = gone if mask is None else gone & mask
        if self.radius == 0.0:
            return bounds.masked_fill(lost, torch.inf)
        share = self.radius / norms.sum(-1, keepdim=True)
        reserve = torch.where(lost, norms * share, 0.0)
        rest = torch.where(
            torch.isinf(bounds), bounds, bounds * (1.0 - reserve.sum(-1, keepdim=True) / self.radius).clamp_min(0.0)
        )
        return torch.where(lost, reserve, rest)
