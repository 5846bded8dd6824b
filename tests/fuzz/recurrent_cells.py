"""Cells as people write them, and as they should not: what they return, look at and change is drawn at random."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

FEATURES = HIDDEN = 4  # so that results of one cell can be inputs of another


class State(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor


@dataclass
class Memory:
    h: torch.Tensor
    c: torch.Tensor


class Reverse(torch.autograd.Function):
    """Gradient times a factor that Python decides."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class OwnCell(nn.Module):
    """One step; ``quirk`` says what is odd about it, ``form`` what it returns."""

    def __init__(self, quirk, form):
        super().__init__()
        self.quirk, self.form = quirk, form
        self.inwards, self.around = nn.Linear(FEATURES, 2 * HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN) if quirk == "norm" else nn.Identity()
        self.drop = nn.Dropout(0.3)
        self.register_buffer("scale", torch.full((HIDDEN,), 0.9))
        self.register_buffer("mean", torch.zeros(HIDDEN))
        self.factor, self.calls, self.history, self.settings = 1.0, 0, [], {"gain": 1.0}
        self.act = torch.tanh
        if quirk == "weight norm":
            nn.utils.parametrizations.weight_norm(self.around)

    def forward(self, x, state=None):
        if state is None:
            h = x.new_zeros(len(x), HIDDEN)
            c = h
        else:
            h, c = _parts(state, self.form)
        a, b = (self.inwards(x) + self.around(h)).chunk(2, -1)
        new = self._odd(torch.sigmoid(b) * c + self.act(self.norm(a)), x)
        out = torch.tanh(new * self.scale)
        return make_result(out, new, self.form)

    def _odd(self, new, x):
        quirk = self.quirk
        if quirk == "anneals":
            return new * self.factor
        if quirk == "setting":
            return new * self.settings["gain"]
        if quirk == "counts":
            self.calls += 1
            return new * (1.0 if self.calls % 3 else 0.5)
        if quirk == "remembers":
            self.history.append(float(new.detach().sum()))
        if quirk == "keeps last":
            self.last = new
        if quirk == "batch size":
            return new * (1.0 if len(x) > 2 else 0.7)
        if quirk == "looks at values" and new.sum() > 0:
            return new * 0.8
        if quirk == "drops":
            return self.drop(new)
        if quirk == "noise":
            return new + 0.1 * torch.randn_like(new)
        if quirk == "updates buffer":
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * new.mean(0))
            return new - self.mean
        if quirk == "reverses":
            return Reverse.apply(new, self.factor)
        if quirk == "detaches":
            return new + new.detach() * 0.1
        if quirk == "in place":
            return new.mul(1.1).add_(0.1)
        return new


QUIRKS = (
    *("none", "none", "none", "norm", "anneals", "setting", "counts", "remembers", "drops", "noise", "reverses"),
    *("detaches", "keeps last", "batch size", "looks at values", "updates buffer", "in place", "weight norm"),
)
FORMS = ("pair", "with none", "named", "dict", "data", "single", "output and state", "list")


def _parts(state, form):
    if form in ("named", "data"):
        return state.h, state.c
    if form == "dict":
        return state["h"], state["c"]
    if form in ("single", "with none"):
        return state, state
    return state


def make_result(h, c, form):
    if form == "pair":
        return h, c
    if form == "list":
        return [h, c]
    if form == "with none":
        return h, None
    if form == "named":
        return State(h, c)
    if form == "data":
        return Memory(h, c)
    if form == "dict":
        return {"h": h, "c": c}
    if form == "single":
        return h
    return h.sin(), (h, c)


def make_cell(kind, quirk, form):
    """Return a cell of torch's or of our own."""
    if kind == "lstm":
        return nn.LSTMCell(FEATURES, HIDDEN, bias=quirk != "drops")
    if kind == "gru":
        return nn.GRUCell(FEATURES, HIDDEN)
    if kind == "rnn":
        return nn.RNNCell(FEATURES, HIDDEN, nonlinearity="relu" if quirk == "norm" else "tanh")
    return OwnCell(quirk, form)


def call(cell, kind, form, x, state):
    """Make a step as the cell's caller would; return output and next state."""
    if kind == "lstm":
        state = cell(x, state)
        return state[0], state
    if kind in ("gru", "rnn"):
        h = cell(x, state) if kind == "gru" else cell(input=x, hx=state)
        return h, h
    return read(cell(x, state), form)


def read(result, form):
    """Take a cell's result apart as its caller does: output and next state."""
    if form == "output and state":
        return result
    if form == "with none":
        return result[0], result[0]
    if form == "single":
        return result, result
    h, _ = _parts(result, form)
    return h, result


def tensors_of(state):
    """Return the tensors of a state."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, (Memory, State)):
        return [state.h, state.c]
    return list(state.values()) if isinstance(state, dict) else list(state)


def map_state(function, state):
    """Apply a function to every tensor of a state."""
    if state is None or isinstance(state, torch.Tensor):
        return None if state is None else function(state)
    if isinstance(state, (Memory, State)):
        return type(state)(function(state.h), function(state.c))
    if isinstance(state, dict):
        return {name: function(value) for name, value in state.items()}
    return type(state)(function(value) for value in state)
