"""Emitted Triton kernels, interpreted: they compute what the plain loop computes, forward and backward."""

import pytest
import torch
from recurrent_emitted import CELLS, Case, largest_error, round_as_chips_do
from torch import nn
from torch.nn import functional

from lightning_accel.recurrent import linear_scan
from lightning_accel.recurrent.compiler.emit_triton import scan_kernel, triton_code
from lightning_accel.recurrent.compiler.emit_triton.triton_code import LaunchPlan
from lightning_accel.recurrent.compiler.trace import CannotScheduleError

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numbers beyond a row's end
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the largest number of each tensor
EPSILON = 2.0**-8  # of bfloat16


@pytest.fixture(autouse=True)
def _rounding(monkeypatch):
    round_as_chips_do(monkeypatch)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_a_kernel_equals_the_loop(name, dtype):
    case = Case(name, 5, 20, steps=4, streams=3, dtype=dtype)
    assert largest_error(case.scheduled(), case.loop()) <= LIMITS[dtype]
    assert case.schedule.failure is None
    assert len(case.code().kernels) == 2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", CELLS)
def test_a_kernel_in_bfloat16_is_as_near_to_float32_as_the_loop(name, autocast):
    case = Case(name, 5, 20, steps=4, streams=3, dtype=torch.float32 if autocast else torch.bfloat16, autocast=autocast)
    actual, plain, exact = case.scheduled(), case.loop(), case.loop(torch.float32)
    assert case.schedule.failure is None
    assert [a if a is None else a.dtype for a in actual] == [p if p is None else p.dtype for p in plain]
    if name == "odd":  # which of two numbers is the larger decides its derivative, and rounding decides that
        actual, plain, exact = actual[:3], plain[:3], exact[:3]
    for a, p, e in zip(actual, plain, exact, strict=True):
        if e is not None:
            scale = e.abs().max().clamp_min(1e-3)
            error, usual = ((v.float() - e).abs().max() / scale for v in (a, p))
            assert error <= 3.0 * usual + 4.0 * EPSILON


@pytest.mark.parametrize("name", ["lstm", "layer norm", "odd"])
def test_more_streams_than_a_program_takes_and_rows_wider_than_a_tile(name):
    case = Case(name, 3, 140, steps=2, streams=18)
    assert largest_error(case.scheduled(), case.loop()) <= LIMITS[torch.float32]


@pytest.mark.parametrize("name", CELLS)
def test_programs_that_share_a_block_of_streams_equal_the_loop(name, monkeypatch):
    launched = []

    def plan(streams, streamed, device):
        return LaunchPlan(-(-streams // 16), 3, 16, at_once=False)

    def launch(kernel, grid, arguments, constants):
        launched.append((grid, constants["PHASE"]))
        plain_launch(kernel, grid, arguments, constants)

    plain_launch = triton_code.launch
    monkeypatch.setattr(triton_code, "plan_launch", plan)
    monkeypatch.setattr(triton_code, "launch", launch)
    case = Case(name, 5, 40, steps=3, streams=2)
    assert largest_error(case.scheduled(), case.loop()) <= LIMITS[torch.float32]
    assert {grid for grid, _ in launched} == {(1, 3)}
    assert {phase for _, phase in launched} >= {0}


class SortingCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x, state):
        h = torch.softmax(self.mix(x + state[0]), -1)
        return h, (h,)


def test_what_has_no_triton_form_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(CELLS, "sorting", lambda features, hidden: SortingCell())
    case = Case("sorting", 4, 4, steps=3, streams=2)
    with pytest.raises(CannotScheduleError, match=r"none of its loops can be written in Triton: .*softmax"):
        case.code()


def test_without_triton_the_reason_is_the_extra(monkeypatch):
    monkeypatch.setattr(triton_code.importlib.util, "find_spec", lambda name: None)
    assert triton_code.triton_refusal() is not None
    with pytest.raises(CannotScheduleError, match="extra `gpu`"):
        Case("lstm", 3, 4, steps=2, streams=2)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("steps", [1, 8, 13])
def test_the_scan_kernel_equals_the_recurrence(steps, dtype, reverse):
    torch.manual_seed(0)
    a, b, first = (torch.randn(*shape, dtype=dtype) for shape in ((steps, 150), (steps, 150), (150,)))
    a[0, 0], b[0, 1] = torch.inf, torch.nan
    h, state, expected = torch.empty_like(a), first, torch.empty_like(a)
    for t in reversed(range(steps)) if reverse else range(steps):
        state = expected[t] = a[t] * state + b[t]
    scan_kernel.scan_rows(h, a, b, first, reverse=reverse)
    torch.testing.assert_close(h, expected, rtol=LIMITS[dtype], atol=LIMITS[dtype], equal_nan=True)


def test_a_scan_on_a_device_is_the_kernel(monkeypatch):
    monkeypatch.setattr(scan_kernel, "can_scan", lambda *tensors: True)
    torch.manual_seed(0)
    a, b = (torch.rand(9, 2, 3, dtype=torch.double, requires_grad=True) for _ in range(2))
    h0 = torch.rand(2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(linear_scan, (a, b, h0))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0 * EPSILON)], ids=str)
def test_a_scan_by_the_kernel_and_its_gradients_are_those_of_the_recurrence(dtype, limit, monkeypatch):
    """Numbers of 16 bits are scanned as float32, so that only the last rounding is theirs."""
    used = []
    plain = scan_kernel.scan_rows
    monkeypatch.setattr(scan_kernel, "can_scan", lambda *tensors: True)
    monkeypatch.setattr(
        scan_kernel, "scan_rows", lambda h, *rest, **how: used.append(h.dtype) or plain(h, *rest, **how)
    )
    torch.manual_seed(0)
    given = [torch.rand(12, 2, 70), torch.randn(12, 2, 70), torch.randn(2, 70)]
    given = [t.to(dtype) for t in given]
    found = []
    for kind, scan in ((dtype, linear_scan), (torch.float64, step_by_step)):
        leaves = [t.to(kind).requires_grad_() for t in given]
        h = scan(*leaves)
        found.append([h.detach(), *torch.autograd.grad(h.double().cos().sum(), leaves)])
    assert set(used) == {torch.float32}
    assert len(used) == 2
    for a, e in zip(*found, strict=True):
        assert float((a.double() - e).abs().max()) <= limit * float(e.abs().max())


def step_by_step(a, b, h):
    states = []
    for a_t, b_t in zip(a, b, strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states)


EXPRESSIONS = [
    *(torch.tanh, torch.sigmoid, torch.exp, torch.sin, torch.cos, torch.erf, torch.floor, torch.ceil, torch.trunc),
    *(torch.log1p, torch.expm1, torch.abs, torch.sign, torch.reciprocal, torch.square, torch.neg, torch.rsqrt),
    *(functional.silu, functional.gelu, functional.softplus, functional.elu, functional.celu, functional.hardtanh),
    *(functional.hardsigmoid, functional.leaky_relu, functional.softshrink, functional.hardshrink),
    *(functional.relu, functional.relu6, functional.logsigmoid, functional.mish),
    lambda v: functional.gelu(v, approximate="tanh"),
    lambda v: v.clamp(-0.7, 0.7),
    lambda v: torch.where(v > 0.1, v, 0.3 * v),
    lambda v: torch.maximum(v, 0.5 * v + 0.1),
    lambda v: v.masked_fill(v > 1.0, 2.0),
    lambda v: v**3,
]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, state):
        (h,) = state
        return self.function(x + 0.0 * h), (0.0 * h + x,)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("k", range(len(EXPRESSIONS)))
def test_an_expression_and_its_derivative_are_those_of_torch(k, dtype, monkeypatch):
    monkeypatch.setitem(CELLS, "function", lambda features, hidden: Function(EXPRESSIONS[k]))
    case = Case("function", 30, 30, steps=2, streams=2, dtype=dtype)
    grid = torch.cat([torch.linspace(-4.0, 4.0, 50), torch.tensor([0.0, -0.0, 0.5, 1e-6, -1e-6, 9.0, -9.0, 30.0])])
    case.xs = [grid.repeat(3)[:120].view(2, 2, 30).to(dtype).requires_grad_()]
    actual, expected = case.scheduled(), case.loop()
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-5 if dtype is torch.float32 else 1e-11, atol=1e-6, equal_nan=True)
