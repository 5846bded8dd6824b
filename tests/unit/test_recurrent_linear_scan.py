"""`linear_scan` is the recurrence, whatever the numbers are, with machine code and without."""

import math

import pytest
import torch

from lightning_accel.recurrent import linear_scan, scan


@pytest.fixture(params=["machine code where it pays", "chunks"], autouse=True)
def _kinds(request, monkeypatch):
    torch.manual_seed(0)
    if request.param == "chunks":
        monkeypatch.setattr(scan, "_machine", lambda *_: None)


def stepwise(a, b, h0=None):
    h, states = torch.zeros_like(b[0]) if h0 is None else h0, []
    for a_t, b_t in zip(a, b, strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states)


def assert_equal(a, b, h0=None, tolerance=1e-9):
    leaves = [t.clone().requires_grad_() for t in (a, b, h0) if t is not None]
    found = []
    for function in (linear_scan, stepwise):
        h = function(*leaves)
        given = torch.linspace(0.5, 1.5, len(h), dtype=torch.double).to(h.dtype).view(-1, *[1] * (h.dim() - 1))
        found.append([h, *torch.autograd.grad(h, leaves, given.expand_as(h).contiguous())])
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("steps", [1, 2, 37, 300])
@pytest.mark.parametrize("dtype", [torch.double, torch.complex128])
def test_real_and_complex_numbers(steps, dtype):
    a, b, h0 = (0.6 * torch.randn(*size, dtype=dtype) for size in ((steps, 120), (steps, 120), (120,)))
    assert_equal(a, b)
    assert_equal(a, b, h0)


def test_complex_gradients_of_gradients():
    a, b = (0.5 * torch.randn(6, 2, dtype=torch.complex128) for _ in range(2))
    h0 = torch.randn(2, dtype=torch.complex128)
    leaves = tuple(t.requires_grad_() for t in (a, b, h0))
    assert torch.autograd.gradcheck(linear_scan, leaves)
    assert torch.autograd.gradgradcheck(linear_scan, leaves)


def test_no_nan_where_the_recurrence_has_none():
    late = torch.zeros(400, 90)
    late[-3:] = 1.0
    assert_equal(torch.full((400, 90), 100.0), late, tolerance=1e-5)
    up_and_down = torch.cat([torch.full((60, 4), 10.0), torch.full((60, 4), 0.1)])
    early = torch.zeros(120, 4)
    early[0] = 1e-3
    assert_equal(up_and_down, early, tolerance=1e-4)
    a, b = 0.5 * torch.rand(300, 120), torch.randn(300, 120)
    a[::7], a[50, :5], b[100, 3] = 0.0, math.inf, -math.inf
    assert_equal(a, b, torch.randn(120), tolerance=1e-4)
    a[0] = math.inf
    assert_equal(a, b, tolerance=1e-4)


def test_other_types_of_numbers():
    for dtype in (torch.bfloat16, torch.float16):
        assert_equal((0.9 * torch.rand(80, 9)).to(dtype), torch.randn(80, 9).to(dtype), tolerance=0.05)
    assert_equal(torch.rand(20, 3), torch.randn(20, 3, dtype=torch.double))
    whole = torch.full((5, 2), 2)
    assert torch.equal(linear_scan(whole, whole), stepwise(whole, whole))
    assert linear_scan(torch.rand(3, 0), torch.rand(3, 0)).shape == (3, 0)
    assert linear_scan(torch.rand(3, 2, device="meta"), torch.rand(3, 2, device="meta")).shape == (3, 2)


def test_transforms():
    a, b = torch.rand(5, 2, dtype=torch.double), torch.rand(5, 2, dtype=torch.double)
    batch = torch.stack([a, 2 * a])
    torch.testing.assert_close(torch.func.vmap(linear_scan, (0, None))(batch, b)[1], linear_scan(2 * a, b))
    torch.testing.assert_close(torch.func.jacrev(linear_scan, 1)(a, b), torch.func.jacrev(stepwise, 1)(a, b))
    expected = torch.func.jvp(stepwise, (a, b), (b, a))[1]
    torch.testing.assert_close(torch.func.jvp(linear_scan, (a, b), (b, a))[1], expected)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="`h0` must be of the shape of a step"):
        linear_scan(torch.ones(3, 2), torch.ones(3, 2), torch.ones(1))
    with pytest.raises(ValueError, match="must be of one shape"):
        linear_scan(torch.ones(0, 2), torch.ones(0, 2))
