"""Deferred cells: what a user's loop may do with a cell's results, and what it may not."""

import copy
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_accel.recurrent import linear_scan
from lightning_accel.recurrent.deferred.call_layout import flatten, learn_layout
from lightning_accel.recurrent.deferred.call_reader import call_reader, result_writer
from lightning_accel.recurrent.deferred.find_cells import DeferredCells

T, B, F, H = 8, 2, 3, 4


class Pair(NamedTuple):
    y: torch.Tensor
    s: torch.Tensor


@dataclass
class Held:
    y: torch.Tensor
    s: torch.Tensor


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Model(nn.Module):
    """Run `use(cell, x)`, which returns a tensor."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.use = nn.LSTMCell(F, H).double(), use

    def forward(self, x):
        return self.use(self.cell, x)


def unroll(cell, x, each=lambda t, h, c: (h, c)):
    state, hidden = None, []
    for t in range(len(x)):
        state = each(t, *cell(x[t], state))
        hidden.append(state[0])
    return hidden


def scale_in_place(t, h, c):
    if t == 4:
        h.mul_(0.5)
    return h, c


def detach(t, h, c):
    return (h.detach(), c.detach()) if t == 4 else (h, c)


def shrink(cell, x):
    h, c = cell(x[0])
    for t in range(1, 5):
        h, c = cell(x[t], (h, c))
    h, c = cell(x[5, :1], (h[:1], c[:1]))
    for t in range(6, T):
        h, c = cell(x[t, :1], (h, c))
    return h


def both_directions(cell, x):
    forward = backward = None
    for t in range(T):
        forward, backward = cell(x[t], forward), cell(x[T - 1 - t], backward)
    return torch.cat([forward[0], backward[0]])


def inner_memory(cell, x):
    state, memory = None, []
    for t in range(T):
        state = cell(x[t], state)
        memory.append(state[1])
    return torch.stack(memory) + state[0] + memory[2]


def hooked(cell, x):
    hidden = unroll(cell, x)
    hidden[3].register_hook(lambda g: g * 2)
    return torch.stack(hidden)


USES = {
    "stack": lambda cell, x: torch.stack(unroll(cell, x), 1),
    "last": lambda cell, x: unroll(cell, x)[-1],
    "early exit": lambda cell, x: unroll(cell, x[:5])[-1],
    "in place": lambda cell, x: torch.stack(unroll(cell, x, scale_in_place)),
    "detach": lambda cell, x: torch.stack(unroll(cell, x, detach)),
    "two chains": both_directions,
    "inner memory": inner_memory,
    "hook": hooked,
    "custom function": lambda cell, x: Double.apply(unroll(cell, x)[-1]),
    "batch first": lambda cell, x: torch.stack(unroll(cell, x.transpose(0, 1).contiguous().transpose(0, 1))),
    "unbind": lambda cell, x: torch.stack(unroll(cell, x.unbind(0))),
    "shapes": lambda cell, x: torch.stack([h * h.shape[-1] * float(h.requires_grad) for h in unroll(cell, x)]),
}


def gradients(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])]


def sequence():
    torch.manual_seed(1)
    return torch.randn(T, B, F, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_loops_compute_what_they_computed(use):
    model, x = Model(use), sequence()
    expected = gradients(model, x)
    cells = DeferredCells(model, "native")
    with cells.watch():
        gradients(model, x)
    with cells.active():
        actual = gradients(model, x)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    assert cells.cells["cell"].chains >= 1
    cells.remove()
    assert "forward" not in model.cell.__dict__


PLAIN_USES = {
    "smaller batches": shrink,
    "inputs made one by one": lambda cell, x: torch.stack(unroll(cell, [s * 1.0 for s in x])),
}


@pytest.mark.parametrize("use", PLAIN_USES.values(), ids=PLAIN_USES)
def test_inputs_that_can_not_be_foretold_leave_the_loop_plain_with_a_reason(use):
    model, x = Model(use), sequence()
    expected = gradients(model, x)
    cells = DeferredCells(model, "native")
    with cells.watch():
        gradients(model, x)
    with cells.active():
        actual = gradients(model, x)
    assert "inputs are made between the steps" in cells.reasons["cell"]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def deferred(use):
    model = Model(lambda cell, x: torch.stack(unroll(cell, x)))
    cells = DeferredCells(model, "native")
    with cells.watch():
        model(sequence())
    model.use = use
    return model, cells


def change_parameter(cell, x):
    hidden = unroll(cell, x)
    with torch.no_grad():
        cell.weight_hh.add_(1.0)
    return torch.stack(hidden)


def test_a_parameter_that_changes_before_the_backward_is_an_error_as_in_the_loop():
    model, cells = deferred(change_parameter)
    with cells.active(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(sequence()).sum().backward()


def test_results_are_ordinary_tensors_of_their_own():
    seen = []
    model, cells = deferred(lambda cell, x: torch.stack(seen.append(h := unroll(cell, x)) or h))
    with cells.active():
        model(sequence())
    assert cells.cells["cell"].chains == 1
    assert all(type(h) is torch.Tensor and h.is_contiguous() and h._base is None for h in seen[0])
    assert len({h.untyped_storage().data_ptr() for h in seen[0]}) == T


def test_copies_and_pickles_of_a_deferred_model_are_plain():
    model, cells = deferred(None)
    del model.use
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with cells.active():
            h, _ = twin.cell(torch.ones(1, F, dtype=torch.double))
        assert type(h) is torch.Tensor
        assert twin.cell is not model.cell
        torch.testing.assert_close(h, model.cell(torch.ones(1, F, dtype=torch.double))[0])


@pytest.mark.parametrize(
    ("args", "kwargs", "result"),
    [
        ((1,), {}, lambda y, s: (y, s)),
        ((2,), {"gain": 2.0}, lambda y, s: {"out": y, "state": [s, None]}),
        ((3,), {"named": True}, lambda y, s: Pair(y, s)),
        ((4,), {"data": True}, lambda y, s: Held(y, s)),
        ((5,), {}, lambda y, s: s),
    ],
)
def test_calls_are_read_and_answered_in_their_own_form(args, kwargs, result):
    x, h, y = (torch.randn(B, H) for _ in range(3))
    before = result(y, h)
    leaves = []
    flatten(before, leaves)
    call = (({"x": x}, *args, before), kwargs)
    layout = learn_layout(*call, result(torch.randn(B, H), torch.randn(B, H)), leaves)
    read = call_reader(layout)
    assert all(a is b for a, b in zip(read(*call)[1], [t for t in leaves if t is not None], strict=True))
    assert read(*call)[0] == (x,)
    for other in (((x, *args, before), kwargs), (call[0], {**kwargs, "more": 1}), (call[0][:-1], kwargs)):
        assert read(*other) is None
    assert read(({"x": x}, args[0] + 1, before), kwargs) is None
    assert read(({"x": x[0]}, *args, before), kwargs) is None
    outputs = [torch.ones(B, H), torch.zeros(B, H)][: layout.num_outputs]
    made = []
    assert flatten(result_writer(layout)(outputs), made) == layout.results
    assert [None if m is None else layout.unique[k] for k, m in enumerate(made)] == [
        None if slot < 0 else slot for slot in layout.unique
    ]


def test_a_state_that_is_no_number_is_no_write():
    model, cells = deferred(lambda cell, x: torch.stack(unroll(cell, x)))
    with torch.no_grad():
        model.cell.bias_hh.fill_(float("nan"))
    with cells.active():
        y = model(sequence())
    assert y.isnan().all()
    assert cells.cells["cell"].steps == T
    assert not cells.cells["cell"].reason


def test_a_state_whose_memory_is_exchanged_ends_the_loop_with_the_values_of_the_plain_one():
    def exchange(t, h, c):
        if t == 3:
            h.data = h.data.flip(0).contiguous()
        return h, c

    model, cells = deferred(lambda cell, x: torch.stack(unroll(cell, x, exchange)))
    x = sequence()
    with cells.active():
        y = model(x)
    cells.remove()
    torch.testing.assert_close(y, model(x))
    assert "written to past autograd" in cells.cells["cell"].reason


def test_a_forward_that_is_replaced_within_a_step_counts():
    def replaced(cell, x):
        inner = cell.forward
        cell.forward = lambda x, hx=None: tuple(value * 0.5 for value in inner(x, hx))
        return torch.stack(unroll(cell, x))

    model, cells = deferred(replaced)
    x, plain = sequence(), Model(replaced)
    with cells.active():
        y = model(x)
    torch.testing.assert_close(y, plain(x))
    assert not cells.cells["cell"].reason


def test_cells_with_backward_hooks_are_left_alone():
    model = Model(lambda cell, x: torch.stack(unroll(cell, x)))
    model.cell.register_full_backward_hook(lambda *_: None)
    cells = DeferredCells(model)
    with cells.watch():
        model(sequence())
    assert not cells.cells


def test_scans_of_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="`a` and `b` must be of one shape"):
        linear_scan(torch.ones(3, 1), torch.ones(2, 1))


def test_scan_with_a_start_and_its_second_derivative():
    torch.manual_seed(0)
    a, b = (torch.rand(9, 2, dtype=torch.double, requires_grad=True) for _ in range(2))
    h0 = torch.rand(2, dtype=torch.double, requires_grad=True)
    state, expected = h0, []
    for t in range(9):
        state = a[t] * state + b[t]
        expected.append(state)
    torch.testing.assert_close(linear_scan(a, b, h0), torch.stack(expected))
    assert torch.autograd.gradcheck(linear_scan, (a, b, h0))
    assert torch.autograd.gradgradcheck(linear_scan, (a, b, h0))
