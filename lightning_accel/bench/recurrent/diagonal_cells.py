"""A nonlinear cell with a diagonal Jacobian, and Newton's method over all of its time steps: for the recurrent rows.

States that know no other entry of the state before them can be found for all time steps at once: linearized around a
guess they are a linear recurrence, which `linear_scan` solves, and again around what came out (Lim et al., DEER,
arXiv:2309.12252; ParaRNN, arXiv:2508.16817). It is here to be measured beside the schedules, which are exact.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.recurrent.scan import linear_scan

_TOLERANCE = 1e-6  # largest residual of a state, absolute: states are within -1 and 1
_MOST = 50  # iterations


class DiagonalGRUCell(nn.Module):
    """A GRU whose recurrent weights are diagonal.

    Args:
        size: Of input and state.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(size, 3 * size)
        self.recurrent = nn.Parameter(torch.rand(3, size) - 0.5)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Make one step of x, (B, D)."""
        update, reset, new = self.inputs(x).chunk(3, -1)
        by_update, by_reset, by_new = self.recurrent
        reset = torch.sigmoid(reset + by_reset * h)
        new = torch.tanh(new + by_new * (reset * h))
        h = h + torch.sigmoid(update + by_update * h) * (new - h)
        return h, h


class NewtonOverTime(nn.Module):
    """Find all states of a `DiagonalGRUCell` at once; the backward is one linear recurrence.

    Args:
        cell: Whose parameters it shares.
    """

    def __init__(self, cell: DiagonalGRUCell) -> None:
        super().__init__()
        self.cell = cell
        self.iterations = 0  # of the latest call

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Map x, (T, B, D), and the first state, (B, D), to all states and the last one."""
        states, iterations = _Newton.apply(self.cell.inputs(x), self.cell.recurrent, h)
        self.iterations = int(iterations)
        return states, states[-1]


class _Newton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, recurrent: Tensor, start: Tensor) -> tuple[Tensor, int]:
        update_in, reset_in, new_in = inputs.chunk(3, -1)
        by_update, by_reset, by_new = recurrent
        states = torch.zeros_like(update_in)
        iterations = 0
        while True:
            iterations += 1
            before = torch.cat([start[None], states[:-1]])
            update, reset = torch.sigmoid(update_in + by_update * before), torch.sigmoid(reset_in + by_reset * before)
            new = torch.tanh(new_in + by_new * (reset * before))
            found = before + update * (new - before)
            d_update = (new - before) * update * (1 - update)
            d_new = update * (1 - new * new)
            d_reset = d_new * by_new * before * reset * (1 - reset)
            jacobian = 1 - update + d_update * by_update + d_reset * by_reset + d_new * by_new * reset
            if (found - states).abs().max() <= _TOLERANCE:
                break
            if iterations == _MOST:
                raise RuntimeError(f"Newton's method did not converge in {_MOST} iterations.")
            states = linear_scan(jacobian, found - jacobian * before, start)
        ctx.save_for_backward(before, reset, jacobian, d_update, d_new, d_reset)
        return found, iterations

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
        before, reset, jacobian, d_update, d_new, d_reset = ctx.saved_tensors
        after = torch.cat([jacobian[1:], torch.zeros_like(jacobian[:1])])
        adjoint = linear_scan(after.flip(0), gradient.flip(0)).flip(0)
        parts = [adjoint * d for d in (d_update, d_reset, d_new)]
        by = [(part * factor).sum((0, 1)) for part, factor in zip(parts, (before, before, reset * before), strict=True)]
        return torch.cat(parts, -1), torch.stack(by), None
