"""Groups that a projection has cleared and that stay so: neither momentum nor gradients bring them back."""

import torch
from torch import Tensor

from lightning_accel.projection.balls.norm_pyramid import MaxPyramid
from lightning_accel.projection.balls.outcome import NothingNew
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.sharded import alike
from lightning_accel.projection.training.layouts import Layouts
from lightning_accel.projection.training.parameter_state import Memory
from lightning_accel.projection.training.targets import Target


class HeldGroups:
    """Clears what is dead, again and again.

    Args:
        layouts: Of the targets.
    """

    def __init__(self, layouts: Layouts) -> None:
        self._layouts = layouts
        self._indices: dict[str, tuple[Tensor, Tensor]] = {}  # masks, and what they name

    def clear_again(self, target: Target, dead: Tensor | None, cleared: int) -> NothingNew | None:
        """Clear what is dead and look for nothing more, where as many groups are as are to go, ``cleared`` of them.

        Most steps of a fit are like that: groups that a sparsity asks for die one by one, and stay dead.

        Returns:
            ``None`` where more are to go, or the parameter may not be finite: nothing was written then.
        """
        layout = self._layouts.known(target)
        if layout is None or dead is None or placement.is_far(dead):  # counting them would wait for it
            return None
        indices = self._of(target, dead)
        done = len(indices) >= cleared and layout.clear(dead, indices, if_finite=True)
        return NothingNew(layout, dead) if done else None

    def hold(self, target: Target, memory: Memory) -> None:
        """Clear what a mask or a frozen group keeps cleared."""
        if memory.kept is not None:
            parameter = target.parameter
            if parameter is not None:
                memory.kept = alike(memory.kept, parameter)  # a mask from a checkpoint is whole
                parameter.masked_fill_(~memory.kept, 0.0)
        elif memory.dead is not None:
            whole = self._layouts.of(target.view(), target)
            if (
                isinstance(whole, MaxPyramid)
                and not placement.is_far(memory.dead)  # indices would wait for it
                and whole.clear(memory.dead, self._of(target, memory.dead))
            ):
                return
            infinite = torch.full(memory.dead.shape, torch.inf, dtype=torch.float64, device=memory.dead.device)
            whole.cut(infinite.masked_fill_(memory.dead, 0.0))

    def _of(self, target: Target, dead: Tensor) -> Tensor:
        """Return the indices of a target's dead groups, int64 ``(dead groups,)``."""
        known = self._indices.get(target.name)
        if known is None or known[0] is not dead:
            known = self._indices[target.name] = dead, dead.nonzero().flatten()
        return known[1]
