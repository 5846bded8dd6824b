"""How parameters lie in memory: found once, and good for as long as their memory is."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_accel.projection.balls.norm_pyramid import MaxPyramid, Pyramid, check_levels, pyramid
from lightning_accel.projection.sharded import GatheredPyramid, ShardedMaxPyramid
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.targets import Target

Place = tuple[int, torch.Size, tuple[int, ...]]


class Layouts:
    """Pyramids of targets for a ball; norms are taken anew each time.

    Args:
        ball: Whose norms they have.
    """

    def __init__(self, ball: Ball) -> None:
        self._ball = ball
        self._known: dict[str, tuple[nn.Parameter, Place, MaxPyramid]] = {}

    def of(self, x: Tensor, target: Target) -> Pyramid:
        """Lay out a target, whose data is ``x``."""
        known = self.known(target)
        if known is not None:
            return known
        built = self._build(x, target)
        parameter = target.parameter
        if parameter is not None and isinstance(built, MaxPyramid) and built.blocks.copied_dims is None:
            self._known[target.name] = parameter, _place_of(parameter), built
        return built

    def known(self, target: Target) -> MaxPyramid | None:
        """Return the layout of a plain parameter that still is where it was."""
        known = self._known.get(target.name)
        if known is None:
            return None
        parameter, place, layout = known
        if target.module._parameters.get(target.leaf) is not parameter or _place_of(parameter) != place:
            return None
        return layout

    def forget_all_but(self, targets: Iterable[Target]) -> None:
        """Let go of the parameters of all other targets."""
        names = {target.name for target in targets}
        self._known = {name: known for name, known in self._known.items() if name in names}

    def _build(self, x: Tensor, target: Target) -> Pyramid:
        dims = self._ball.dims or (target.group_dims, target.rest_dims)
        levels = check_levels(self._ball.norms, dims, x.ndim)
        if isinstance(x, DTensor):
            if len(levels) == 2 and levels[1][0] == "linf":
                return ShardedMaxPyramid(x, levels[0][1])
            return GatheredPyramid(x, lambda whole: pyramid(whole, levels, whole))
        return pyramid(x, levels, x)


def _place_of(x: Tensor) -> Place:
    """Return what stays the same as long as a tensor's layout is good."""
    return x.data_ptr(), x.shape, x.stride()
