"""What projections found."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_accel.projection.balls.norm_pyramid import MaxPyramid


class Cut(NamedTuple):
    """What a projection found.

    Attributes:
        norm: float64 scalar, the norm before.
        tau: float64 scalar, what was taken off the norm of each group (the exact method: off its l1 norm); 0 where
            nothing was done.
        bounds: float64 ``(groups,)`` for each tensor; infinite where a group was left alone.
        tops: As ``bounds``, the norms of the groups before.
    """

    norm: Tensor
    tau: Tensor
    bounds: list[Tensor]
    tops: list[Tensor]


class LoneCut(NamedTuple):
    """What a projection of one tensor found, before any of it is made a tensor; see `Cut`.

    The next projection of the same tensor may write over it.

    Attributes:
        tops: float64 ``(groups,)``, norms of the groups before.
        tau: Taken off each of them; 0 where nothing was done.
        left: float64 ``(groups,)``, what is left of each; infinite where a group was left alone.
    """

    tops: Tensor
    tau: float
    left: Tensor

    def cut(self) -> Cut:
        """Return the same as a `Cut`, in memory of its own."""
        return Cut(self.tops.sum(), self.tops.new_full((), self.tau), [self.left.clone()], [self.tops.clone()])


class NothingNew(NamedTuple):
    """What a projection found that had only to clear dead groups again; the norms are taken when they are asked for.

    Attributes:
        part: The tensor; its groups that live are as they were before.
        dead: Boolean ``(groups,)``.
    """

    part: "MaxPyramid"
    dead: Tensor

    def cut(self) -> Cut:
        """Return the same as a `Cut`, as long as nobody has written to the tensor since."""
        tops = self.part.tops().masked_fill(self.dead, 0.0)
        left = torch.full_like(tops, math.inf).masked_fill_(self.dead, 0.0)
        return Cut(tops.sum(), tops.new_zeros(()), [left], [tops])
