"""Nonlinear cells with a diagonal Jacobian: the schedule's program, and Newton's method as the bench measures it."""

import copy

import pytest
import torch

from lightning_accel.bench.recurrent.diagonal_cells import DiagonalGRUCell, NewtonOverTime
from lightning_accel.machine.c_functions import refusal
from lightning_accel.recurrent import Recurrent


def gradients(layer, x, start):
    x, start = x.clone().requires_grad_(), start.clone()
    states, last = layer(x, start)
    ((states * torch.linspace(-1, 1, states.numel(), dtype=x.dtype).view_as(states)).sum() + last.sum()).backward()
    return [states, last, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (7, 3), (512, 1)])
def test_newton_and_the_schedule_compute_what_the_loop_does(steps, batch):
    torch.manual_seed(0)
    cell = DiagonalGRUCell(5).double()
    x, start = torch.randn(steps, batch, 5, dtype=torch.float64), torch.zeros(batch, 5, dtype=torch.float64)
    loop = gradients(Recurrent(copy.deepcopy(cell), schedule="loop"), x, start)
    newton = NewtonOverTime(copy.deepcopy(cell))
    torch.testing.assert_close(gradients(newton, x, start), loop, rtol=1e-5, atol=1e-6)  # the residual that it ends at
    assert newton.iterations <= 8, "it converges quadratically"
    scheduled = Recurrent(copy.deepcopy(cell), schedule="intra_stream" if refusal() else "compiled")
    torch.testing.assert_close(gradients(scheduled, x, start), loop, rtol=1e-12, atol=1e-12)


def test_newton_says_when_it_does_not_converge():
    cell = DiagonalGRUCell(2).double()
    with torch.no_grad():
        cell.recurrent.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="did not converge in 50"):
        NewtonOverTime(cell)(torch.randn(4, 1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
