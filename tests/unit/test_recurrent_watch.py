"""Which loops over cells are found by watching, and why some are not computed at once."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_accel.recurrent.deferred.find_cells import DeferredCells
from lightning_accel.recurrent.deferred.kernel import Kernel

T, B, H = 8, 2, 4


class State(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor


@dataclass
class Memory:
    h: torch.Tensor
    c: torch.Tensor


class Cell(nn.Module):
    """A cell whose ``odd`` step and ``pack``ed results a test gives."""

    def __init__(self, odd=lambda cell, h: h, pack=lambda h, c: (h, c), unpack=tuple):
        super().__init__()
        self.inwards, self.around = nn.Linear(H, H), nn.Linear(H, H)
        self.odd, self.pack, self.unpack = odd, pack, unpack
        self.calls, self.last, self.drop = 0, None, nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(H))

    def forward(self, x, state):
        h, c = self.unpack(state)
        c = torch.tanh(self.inwards(x) + self.around(h)) + 0.5 * c
        return self.pack(self.odd(self, torch.tanh(c)), c)


class Model(nn.Module):
    def __init__(self, cell, use):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.use = cell, use
        self.double()

    def forward(self, x):
        return self.use(self.cell, x)


def unroll(cell, x, *, start=None, output=lambda r: r[0], state=lambda r: r):
    zeros = x.new_zeros(B, H)
    current, hidden = cell.pack(zeros, zeros) if start is None else start, []
    for t in range(len(x)):
        result = cell(x[t], current)
        current = state(result)
        hidden.append(output(result))
    return torch.stack(hidden)


def trained(model, cells, batches=3):
    """Make steps, all but the first with the cells answered; return losses and gradients."""
    torch.manual_seed(3)
    found = []
    for k in range(batches):
        model.zero_grad()
        x = torch.randn(T, B, H, dtype=torch.double)
        if cells is None:
            loss = model(x).square().sum()
        else:
            with cells.watch(), cells.active(None if k else ()):
                loss = model(x).square().sum()
        loss.backward()
        found += [loss.detach(), *[p.grad.clone() for p in model.parameters()]]
    return found


def compared(make):
    """Return what was found of a model that trains as without."""
    torch.manual_seed(0)
    expected = trained(make(), None)
    torch.manual_seed(0)
    model = make()
    cells = DeferredCells(model, "intra_stream")
    for a, e in zip(trained(model, cells), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    return cells


FORMS = {
    "tuple": {},
    "list": {"pack": lambda h, c: [h, c]},
    "dict": {"pack": lambda h, c: {"h": h, "c": c}, "unpack": lambda s: (s["h"], s["c"])},
    "named tuple": {"pack": State},
    "dataclass": {"pack": Memory, "unpack": lambda s: (s.h, s.c)},
    "nested": {"pack": lambda h, c: ((h,), {"c": [c]}), "unpack": lambda s: (s[0][0], s[1]["c"][0])},
}
OUTPUTS = {"dict": lambda r: r["h"], "dataclass": lambda r: r.h, "nested": lambda r: r[0][0]}


@pytest.mark.parametrize("form", FORMS)
def test_states_in_any_nesting_are_followed(form):
    output = OUTPUTS.get(form, lambda r: r[0])
    cells = compared(lambda: Model(Cell(**FORMS[form]), lambda cell, x: unroll(cell, x, output=output)))
    assert cells.cells["cell"].chains == 2, cells.reasons


def test_a_cell_that_returns_none_beside_its_state_is_followed():
    parts = {"pack": lambda h, c: (h, None), "unpack": lambda s: (s, s)}

    def use(cell, x):
        return unroll(cell, x, start=x.new_zeros(B, H), state=lambda r: r[0])

    assert compared(lambda: Model(Cell(**parts), use)).cells["cell"].chains == 2


def counts(cell, h):
    cell.calls += 1
    return h * (1.0 if cell.calls % 3 else 0.5)


def keeps(cell, h):
    cell.last = h
    return h


def updates(cell, h):
    with torch.no_grad():
        cell.mean.mul_(0.9).add_(0.1 * h.mean(0))
    return h - cell.mean


def branches(cell, h):
    return h if h.sum() > 0 else 0.5 * h


ODD = {
    "counts calls": (counts, "a call of it changes `calls`"),
    "keeps its last result": (keeps, "a call of it changes `last`"),
    "updates a buffer": (updates, "a call of it changes a buffer or a weight in place"),
    "draws random numbers": (lambda cell, h: cell.drop(h), "draws random numbers"),
    "looks at values": (branches, "can not be traced"),
}


@pytest.mark.parametrize(("odd", "reason"), ODD.values(), ids=ODD)
def test_a_cell_that_is_no_function_of_its_arguments_stays_plain(odd, reason):
    cells = compared(lambda: Model(Cell(odd), unroll))
    said = {**cells.reasons, **{name: cell.reason for name, cell in cells.cells.items()}}
    assert reason in said["cell"]


def test_hooks_inside_a_cell_keep_it_plain_and_hooks_on_it_are_called():
    seen = []

    def make(inner):
        model = Model(Cell(), unroll)
        (model.cell.around if inner else model.cell).register_forward_hook(lambda *_: seen.append(1))
        return model

    assert "`around` inside it has forward hooks" in compared(lambda: make(True)).reasons["cell"]
    assert len(seen) == 2 * 3 * T
    seen.clear()
    compared(lambda: make(False))
    assert len(seen) == 2 * 3 * T


def test_loops_that_begin_short_and_batches_without_the_cell_do_not_end_the_watch():
    lengths = iter([0, 2, 3, T, T, T] * 2)

    def use(cell, x):
        length = next(lengths)
        return unroll(cell, x[:length]) if length else x.sum() * cell.inwards.weight.sum()

    torch.manual_seed(0)
    model = Model(Cell(), use)
    cells = DeferredCells(model, "intra_stream")
    for _ in range(6):
        x = torch.randn(T, B, H, dtype=torch.double)
        with cells.watch(), cells.active():
            model(x)
    assert cells.cells["cell"].chains >= 2


def test_a_masked_state_is_found_and_said():
    def use(cell, x):
        zeros = x.new_zeros(B, H)
        state, hidden = (zeros, zeros), []
        for t in range(T):
            new = cell(x[t], state)
            state = tuple(torch.where(x[t, :, :1] > 0, n, s) for n, s in zip(new, state, strict=True))
            hidden.append(state[0])
        return torch.stack(hidden)

    assert "its state is changed between the steps" in compared(lambda: Model(Cell(), use)).reasons["cell"]


def test_a_global_that_changes_counts():
    model = Model(Cell(lambda cell, h: h * SETTING["gain"]), unroll)
    cells = DeferredCells(model, "intra_stream")
    x = torch.randn(T, B, H, dtype=torch.double)
    with cells.watch():
        model(x)
    with cells.active():
        model(x)
    SETTING["gain"] = 0.5  # nothing that belongs to the cell
    try:
        expected = model(x)
        with cells.active():
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    finally:
        SETTING["gain"] = 1.0


def test_a_step_that_is_not_what_was_traced_is_noticed_at_the_first_call(monkeypatch):
    model = Model(Cell(), unroll)
    cells = DeferredCells(model, "intra_stream")
    x = torch.randn(T, B, H, dtype=torch.double)
    with cells.watch():
        expected = model(x)
    run = Kernel.run
    monkeypatch.setattr(Kernel, "run", lambda *a: ([1.1 * o for o in run(*a)[0]], {}))
    with cells.active():
        assert torch.equal(model(x), expected)
    assert "computes something else than the one that was traced" in cells.cells["cell"].reason


SETTING = {"gain": 1.0}
