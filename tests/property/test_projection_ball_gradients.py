"""Gradients of the differentiable balls are those of finite differences, wherever the projection has a derivative."""

import copy
import io
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrize

from lightning_accel.projection import L1InfBall, MultilevelBall

STEP = 1e-6
BALLS = {
    "bilevel rows": lambda r: L1InfBall(r),
    "bilevel columns": lambda r: L1InfBall(r, (1,)),
    "exact rows": lambda r: L1InfBall(r, method="exact"),
    "exact columns": lambda r: L1InfBall(r, (1,), method="exact"),
    "all groups": lambda r: L1InfBall(r, (0, 1)),
    "exact all groups": lambda r: L1InfBall(r, (0, 1), method="exact"),
    "l1": lambda r: MultilevelBall(r, ("l1",), ((0, 1),)),
    "l2": lambda r: MultilevelBall(r, ("l2",), ((0, 1),)),
    "linf": lambda r: MultilevelBall(r, ("linf",), ((0, 1),)),
    "l1, l2": lambda r: MultilevelBall(r, ("l1", "l2")),
    "l1, l1": lambda r: MultilevelBall(r, ("l1", "l1")),
    "linf, l1": lambda r: MultilevelBall(r, ("linf", "l1")),
    "l2, linf": lambda r: MultilevelBall(r, ("l2", "linf")),
    "l2, l1": lambda r: MultilevelBall(r, ("l2", "l1")),
}


def example(seed, *, zeros, dead):
    """Return ``(5, 4)`` with zero entries and zero groups."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    x[torch.rand(5, 4, generator=generator) < zeros] = 0.0
    x[torch.rand(5, generator=generator) < dead] = 0.0
    return x, torch.randn(5, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", BALLS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.02, 1.4),
    zeros=st.sampled_from([0.0, 0.3, 0.7]),
    dead=st.sampled_from([0.0, 0.4]),
)
def test_gradient_is_that_of_finite_differences(name, seed, share, zeros, dead):
    x, weight = example(seed, zeros=zeros, dead=dead)
    ball = BALLS[name](share * 4.0)
    leaf = x.clone().requires_grad_()
    (ball(leaf) * weight).sum().backward()
    steps = STEP * torch.eye(20, dtype=torch.float64).view(20, 5, 4)
    here = (ball(x) * weight).sum()
    ahead = torch.stack([((ball(x + s) * weight).sum() - here) / STEP for s in steps]).view(5, 4)
    behind = torch.stack([(here - (ball(x - s) * weight).sum()) / STEP for s in steps]).view(5, 4)
    smooth = (ahead - behind).abs() < 1e-3  # elsewhere the two sides have different slopes: no derivative
    if name.startswith("l2,"):  # a group of zeros that is scaled down by a norm of its own is a corner
        smooth &= (x != 0).any(1, keepdim=True)
    torch.testing.assert_close(leaf.grad[smooth], 0.5 * (ahead + behind)[smooth], rtol=1e-4, atol=1e-4)
    assert bool(torch.isfinite(leaf.grad).all())


@pytest.mark.parametrize("name", BALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cleared_groups_get_no_gradient_and_the_rest_a_finite_one(name, dtype):
    for seed in range(5):
        x, weight = example(seed, zeros=0.4, dead=0.4)
        for radius in (0.0, 1e-30, 1e-3, 0.5, 2.0, math.inf):
            leaf = x.to(dtype).clone().requires_grad_()
            y = BALLS[name](radius)(leaf)
            (y * weight.to(dtype)).sum().backward()
            assert bool(torch.isfinite(leaf.grad).all())
            if radius == 0.0:
                assert not bool(leaf.grad.any())
            if radius == math.inf:
                torch.testing.assert_close(leaf.grad, weight.to(dtype))
    group = {"rows": 1, "columns": 0}.get(name.rpartition(" ")[2])
    if group is not None:
        leaf = x.to(dtype).clone().requires_grad_()
        y = BALLS[name](0.5)(leaf)
        y.sum().backward()
        cleared = (y == 0).all(group)
        assert bool(cleared.any())
        assert not bool(leaf.grad.movedim(1 - group, 0)[cleared].any())


@pytest.mark.parametrize("name", BALLS)
def test_derivatives_forward_are_those_backward(name):
    x, weight = example(0, zeros=0.0, dead=0.0)
    ball = BALLS[name](3.0)
    backward = torch.func.jacrev(ball)(x)
    assert bool(backward.any())
    torch.testing.assert_close(torch.func.jacfwd(ball)(x), backward)
    value, tangent = torch.func.jvp(ball, (x,), (weight,))
    assert torch.equal(value, ball(x))
    torch.testing.assert_close(tangent, torch.einsum("ijkl,kl->ij", backward, weight))


def test_zeros_inside_of_the_ball_are_free_to_move():
    x = torch.zeros(3, 4, dtype=torch.float64)
    x[0] = 0.5
    for make in BALLS.values():
        leaf = x.clone().requires_grad_()
        make(100.0)(leaf).sum().backward()
        assert torch.equal(leaf.grad, torch.ones_like(x))


@pytest.mark.parametrize("name", BALLS)
def test_balls_survive_copies_files_and_parametrizations(name):
    ball = BALLS[name](1.5)
    file = io.BytesIO()
    torch.save(ball, file)
    file.seek(0)
    x, _ = example(0, zeros=0.0, dead=0.0)
    for other in (copy.deepcopy(ball), torch.load(file, weights_only=False)):
        assert repr(other) == repr(ball)
        assert torch.equal(other(x), ball(x))
    assert ball.state_dict() == {}
    torch.manual_seed(0)
    layer = nn.Linear(4, 5).double()
    parametrize.register_parametrization(layer, "weight", ball)
    layer(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    assert bool(torch.isfinite(layer.parametrizations.weight.original.grad).all())
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
