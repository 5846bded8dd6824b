"""Cells beside their schedules as Triton kernels, for tests that interpret these and tests that compile them."""

import copy

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.recurrent import (
    CoupledGateLSTMCell,
    FeedbackLSTMCell,
    LayerNormLSTMCell,
    MinGRUCell,
    OutputGRUCell,
    PeepholeLSTMCell,
    ZoneoutLSTMCell,
)
from lightning_accel.recurrent.cell_step import CellStep, is_torch_cell, run_loop, torch_cell_step
from lightning_accel.recurrent.compiler.emit_python.generator import Wanted
from lightning_accel.recurrent.compiler.executor import StepSchedule
from lightning_accel.recurrent.compiler.trace import TensorSpec


def round_as_chips_do(monkeypatch):
    """Let Triton's interpreter round float32 to bfloat16; by itself it cuts digits off, which no chip does."""
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(numbers, kind, to, mode):
        if kind.name == "fp32" and to.name == "bf16":
            rounded = torch.from_numpy(np.ascontiguousarray(numbers)).bfloat16().view(torch.int16)
            return rounded.numpy().view(np.uint16).reshape(numbers.shape)
        return plain(numbers, kind, to, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


class OddCell(nn.Module):
    """Sums over a row, comparisons, other functions, a concatenated state, a state that is not looked at."""

    num_states = 2

    def __init__(self, features, hidden):
        super().__init__()
        self.mix = nn.Linear(features + 2 * hidden, 2 * hidden)

    def forward(self, x, state):
        h, c = state
        a, b = self.mix(torch.cat([x, h, c], -1)).chunk(2, -1)
        a = torch.where(a > b, a, 0.5 * b - c)
        scale = 1.0 + a.mean(-1, keepdim=True).abs()
        c = torch.relu(b) / scale + nn.functional.softplus(a).neg().exp() * c
        h = torch.maximum(torch.sin(a), torch.minimum(b, c)).clamp_min(-0.9) * torch.rsqrt(1.0 + c * c)
        return torch.cat([h, c], -1), (h, c)


CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
    "peephole": PeepholeLSTMCell,
    "layer norm": LayerNormLSTMCell,
    "coupled": CoupledGateLSTMCell,
    "zoneout": ZoneoutLSTMCell,
    "feedback": FeedbackLSTMCell,
    "output": OutputGRUCell,
    "min gru": MinGRUCell,
    "odd": OddCell,
}


class Case:
    """A cell, a sequence for it, and its schedule."""

    def __init__(self, name, features, hidden, *, steps, streams, dtype=torch.float32, autocast=None, device=None):
        torch.manual_seed(0)
        self.autocast = autocast
        self.cell = CELLS[name](features, hidden).to(dtype)
        count = 2 if name == "lstm" else getattr(self.cell, "num_states", 1)
        self.xs = [torch.randn(steps, streams, features, dtype=dtype)]
        if name == "zoneout":
            self.xs.append(torch.bernoulli(torch.full((steps, streams, 2 * hidden), 0.3, dtype=dtype)))
        kind = dtype if name != "rnn" or autocast is None else autocast  # its step returns what autocast makes of it
        self.states = [torch.randn(streams, hidden, dtype=kind) for _ in range(count)]
        if device is not None:
            self.cell = self.cell.to(device)
            self.xs, self.states = ([t.to(device) for t in part] for part in (self.xs, self.states))
        tree_x = pytree.tree_flatten(tuple(self.xs) if len(self.xs) > 1 else self.xs[0])[1]
        self.step = torch_cell_step
        if not is_torch_cell(self.cell):
            self.step = CellStep(tree_x, pytree.tree_flatten(tuple(self.states))[1])
        for tensor in (*self.xs, *self.states):
            tensor.requires_grad_()
        with self._cast():
            self.schedule = StepSchedule(
                self.cell,
                self.step,
                [TensorSpec.of(x[0]) for x in self.xs],
                [TensorSpec.of(s) for s in self.states],
                compiled=True,
                language="Triton",
            )

    def code(self):
        """Return the emitted kernels, for all gradients wanted."""
        wanted = Wanted((True,) * len(self.xs), (True,) * len(list(self.cell.parameters())), any=True)
        return self.schedule.code(wanted, len(self.states[0]))["machine"]

    def loop(self, dtype=None):
        """Return outputs, final states and gradients of the plain loop, in another type if one is given."""
        if dtype is None:
            return self._results(lambda xs, states, _: run_loop(self.step, self.cell, xs, states))
        wide = Case.__new__(Case)
        wide.autocast, wide.step = None, self.step
        wide.cell = copy.deepcopy(self.cell).to(dtype)
        wide.xs = [x.detach().to(dtype).requires_grad_() for x in self.xs]
        wide.states = [s.detach().to(dtype).requires_grad_() for s in self.states]
        return wide.loop()

    def scheduled(self):
        """Return the same of the schedule."""
        return self._results(self.schedule)

    def _cast(self):
        return torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def _results(self, run):
        weights = [*self.cell.parameters(), *self.cell.buffers()]
        with self._cast():
            ys, last = run(self.xs, self.states, weights)
        total = sum((k + 1.0) * r.float().cos().sum() for k, r in enumerate((*ys, *last)))
        leaves = [*self.xs, *self.states, *self.cell.parameters()]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return [t if t is None else t.detach() for t in (*ys, *last, *gradients)]


def largest_error(actual, expected):
    """Return the largest difference of two lists of results, each relative to the largest number of its tensor."""
    assert [a is None for a in actual] == [e is None for e in expected]
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e is not None]
    return max(float((a.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-3)) for a, e in pairs)
