"""Cells whose states are matrices: their loops are C functions with the results of the plain loop."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_accel.bench.recurrent.matrix_cells import (
    AttentionMemory,
    DeltaRule,
    DiagonalStateSpace,
    MatrixLSTM,
    matrix_states,
)
from lightning_accel.machine.c_functions import refusal
from lightning_accel.recurrent import Recurrent
from lightning_accel.recurrent.compiler.emit_c.emit_c_nest import NestWriter
from lightning_accel.recurrent.compiler.emit_python.generator import Wanted
from lightning_accel.recurrent.deferred.find_cells import DeferredCells

pytestmark = pytest.mark.skipif(refusal() is not None, reason="no C compiler")
F, T = 6, 7
CELLS = (DiagonalStateSpace, DeltaRule, MatrixLSTM, AttentionMemory)


class EveryNest(nn.Module):
    """Every kind of product, reduction and view that has a nest, on a state of shape (B, 2, 3)."""

    def __init__(self):
        super().__init__()
        self.mix, self.scale = nn.Linear(F, 6), nn.Parameter(torch.rand(2, 3))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        a = self.mix(x).view(-1, 2, 3)
        square = state @ state.transpose(1, 2)  # both lie along the sum
        wide = square @ (a + state)  # the second one lies across
        tall = (a * state).transpose(1, 2) @ state  # the first one lies across
        column = state.permute(0, 2, 1) @ wide[:, :, 1:2]  # a matrix's columns times a vector
        largest = torch.amax(tall.detach(), 1, keepdim=True)
        joined = torch.cat([state[:, :1] * self.scale[1:], wide[:, 1:]], 1)
        shares = torch.softmax(joined, 1) + torch.softmax(joined * 2, -1)
        level = state.mean((1, 2), keepdim=True) + shares.detach().sum(1, keepdim=True).amax((1, 2), keepdim=True)
        state = torch.where(state > 0.3, shares, 0.5 * state) + 0.1 * torch.tanh(level + largest * self.scale)
        state = state + 0.1 * column.squeeze(2).unsqueeze(1) - 0.05 * tall[:, 1:, :].sum(2, keepdim=True)
        state = torch.tanh(state)  # else differences grow from step to step
        return torch.cat([state.select(2, 1), state[:, 0, ::2]], 1), state


def results(rnn, x, state):
    y, last = rnn(x, state)
    found = [y, *pytree.tree_leaves(last)]
    total = sum((k + 1.0) * r.cos().sum() for k, r in enumerate(found))
    wanted = [x, *pytree.tree_leaves(state), *rnn.parameters()]
    return [*found, *torch.autograd.grad(total, wanted)]


def texts_of(rnn):
    (schedules,) = rnn.schedules[0]._traced.values()
    return [s.source(Wanted((True,), (True,) * len(list(rnn.parameters())), True)) for s in schedules.made.values()]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", [*CELLS, EveryNest])
def test_results_and_gradients_are_those_of_the_plain_loop_and_no_loop_is_left_to_python(kind, batch):
    torch.manual_seed(0)
    cell = (kind() if kind is EveryNest else kind(F)).double()
    state = torch.rand(batch, 2, 3) if kind is EveryNest else matrix_states(cell, F, batch)
    state = pytree.tree_map(lambda s: s.double().requires_grad_(), state)
    x = torch.randn(T, batch, F, dtype=torch.double, requires_grad=True)
    expected = results(Recurrent(cell, schedule="loop"), x, state)
    compiled = Recurrent(cell, schedule="compiled")
    actual = results(compiled, x, state)
    assert set(compiled.schedules[0].choices.values()) == {"compiled"}
    for text in texts_of(compiled):
        forward, backward = text.split("def backward(")
        assert "machine.run(" in forward
        assert " in zip(" not in forward
        assert " in zip(" not in backward
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


class Loop(nn.Module):
    """A loop by hand over a cell."""

    def __init__(self):
        super().__init__()
        self.cell = DeltaRule(F).double()

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = x.new_zeros(x.shape[1], 32, 32), []
        for step in x:
            y, state = self.cell(step, state)
            outputs.append(y)
        return torch.stack(outputs)


class WideEverywhere(nn.Module):
    """Calls as wide as the state before the loop, after it and beside it, some of which others need as well."""

    def __init__(self):
        super().__init__()
        self.key, self.value, self.decay = nn.Linear(F, 2), nn.Linear(F, 3), nn.Parameter(torch.rand(2, 3))

    def forward(self, x: Tensor, state: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        key, value = torch.tanh(self.key(x)), self.value(x)
        keep = torch.exp(-key.square().unsqueeze(2) * self.decay)
        new = key.unsqueeze(2) * value.unsqueeze(1)
        state = keep * state + new
        read = (state * value.unsqueeze(1).expand(-1, 2, 3)).sum(2)
        beside = (keep.transpose(1, 2) @ new).sum(
            (1, 2)
        )  # wide, and known before the loop, which is not its only reader
        return (read, beside.unsqueeze(1) * key, (state - keep).amax(1)), state


class TwoLoops(nn.Module):
    """Two states that know nothing of each other, and a wide call that reads both."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.rand(2, 3))

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        first, second = states
        new = x[:, :2].unsqueeze(2) * x[:, 2:5].unsqueeze(1)
        first, second = torch.tanh(first * self.decay + new), torch.sin(second * self.decay.exp() - new)
        return (first * second).sum(2), (first, second)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", [WideEverywhere, TwoLoops])
def test_wide_calls_around_a_loop_end_as_they_do_by_themselves(kind, batch):
    torch.manual_seed(0)
    cell = kind().double()
    state = torch.rand(batch, 2, 3, dtype=torch.double).requires_grad_()
    state = (state, torch.rand(batch, 2, 3, dtype=torch.double).requires_grad_()) if kind is TwoLoops else state
    x = torch.randn(T, batch, F, dtype=torch.double, requires_grad=True)
    found = []
    for schedule in ("loop", "compiled"):
        rnn = Recurrent(cell, schedule=schedule)
        ys, last = rnn(x, state)
        values = [*pytree.tree_leaves(ys), *pytree.tree_leaves(last)]
        total = sum((k + 1.0) * v.cos().sum() for k, v in enumerate(values))
        found.append([*values, *torch.autograd.grad(total, [x, *pytree.tree_leaves(state), *rnn.parameters()])])
    assert set(rnn.schedules[0].choices.values()) == {"compiled"}
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_calls_as_wide_as_the_state_run_in_its_loop():
    compiled = Recurrent(DiagonalStateSpace(F), schedule="compiled")
    compiled(torch.randn(T, 4, F), matrix_states(compiled.cell, F, 4))
    (text,) = texts_of(compiled)
    forward, backward = text.split("def backward(")
    machine, forward = forward.split("def make_slabs(")
    assert "exp_real(" in machine
    assert "t_exp(" not in forward, "the decay of every entry"
    wide = "(n, 3, 6, 16, )"
    assert forward.split("def forward(")[0].count(wide) == 1, "the decay is kept for the backward"
    assert wide not in forward.split("def forward(")[1]
    assert "t_mul(v_add_2" not in backward


def test_an_unchanged_loop_over_such_a_cell_is_computed_at_its_first_call():
    torch.manual_seed(0)
    model, x = Loop(), torch.randn(T, 3, F, dtype=torch.double)

    def gradients():
        return torch.autograd.grad(model(x).cos().sum(), list(model.parameters()))

    expected, cells = gradients(), DeferredCells(model, "compiled")
    with cells.watch():
        gradients()
    with cells.active():
        actual = gradients()
    assert (cells.cells["cell"].chains, cells.cells["cell"].steps) == (1, T)
    assert set(cells.cells["cell"].choice.choices.values()) == {"compiled"}
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


class MovesStreams(nn.Module):
    """Looks at other streams than its own."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(x[:, :, None] + state.transpose(0, 1).transpose(0, 1).cumsum(1))
        return state.sum(-1), state


def test_a_matrix_loop_that_has_no_c_form_says_why():
    with pytest.warns(UserWarning, match="none of its loops can be written in C: .*transpose.int of streams"):
        Recurrent(MovesStreams(), schedule="compiled")(torch.randn(T, 2, 3), torch.randn(2, 3, 3))


def test_a_wrong_nest_is_found_and_the_plain_loop_runs(monkeypatch):
    product = NestWriter._product
    monkeypatch.setattr(NestWriter, "_product", lambda self, node: [*product(self, node), f"r_{node.name}[0] += 1;"])
    cell, x = DeltaRule(F), torch.randn(T, 2, F)
    state = matrix_states(cell, F, 2)
    rnn = Recurrent(cell, schedule="compiled")
    with pytest.warns(UserWarning, match="its result differs from the plain loop's by"):
        y = rnn(x, state)[0]
    torch.testing.assert_close(y, Recurrent(cell, schedule="loop")(x, state)[0])
