"""Whatever the code of a cell reaches counts: what changes after the trace is seen, what can not be seen is said."""

import array
import collections
import contextvars
import functools
import random
import sys
import types
import warnings
import weakref
from random import random as draw
from random import uniform

import numpy as np
import pytest
import torch
from numpy.random import rand
from torch import nn

from lightning_accel.recurrent import Recurrent
from lightning_accel.recurrent.exactness.assumptions import assumptions_of

T, B, H = 7, 3, 4
SCALE = 1.0
NOTED = contextvars.ContextVar("NOTED", default=1.0)
settings, package = types.ModuleType("recurrent_settings"), types.ModuleType("recurrent_package")
settings.scale, package.settings = 1.0, settings


class Cell(nn.Module):
    """Scales its state by what its method says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(H, H), nn.Linear(H, H)

    def initial_state(self, x):
        return x.new_zeros(len(x), H)

    def gain(self):
        return 1.0

    def forward(self, x, h):
        h = torch.tanh(self.a(x) + self.gain() * self.b(h))
        return h, h


def cell_with(gain, **attributes):
    cell = type("Gained", (Cell,), {"gain": gain})()
    for name, value in attributes.items():
        setattr(cell, name, value)
    return cell


class ReadsGlobal(Cell):
    def forward(self, x, h):
        h = torch.tanh(self.a(x) + SCALE * self.b(h))
        return h, h


class CallsSuper(ReadsGlobal):
    def forward(self, x, h):
        y, h = super().forward(x, h)
        return 2.0 * y, h


class CallsBase(Cell):
    def forward(self, x, h):
        y, h = ReadsGlobal.forward(self, x, h)
        return 2.0 * y, h


class Settings:
    scale = 1.0

    def __init__(self):
        self.own = 1.0

    @classmethod
    def scaled(cls):
        return cls.scale

    @staticmethod
    def read():
        return SCALE


class MoreSettings(Settings):
    pass


class Temperature(nn.Module):
    value = 1.0


class Scorer(nn.Linear):
    def score(self, h):
        return SCALE * self(h)


class AsksItsPart(Cell):
    def __init__(self):
        super().__init__()
        self.scorer = Scorer(H, H)

    def forward(self, x, h):
        h = torch.tanh(self.a(x) + self.scorer.score(self.b(h)))
        return h, h


class Dispatches(Cell):
    kind = "one"

    def gain_one(self):
        return SCALE

    def gain(self):
        return getattr(self, f"gain_{self.kind}")()


class Reads:
    def value(self):
        return SCALE


class ReadsMore(Reads):
    def value(self):
        return 1.0 + super().value()


class Options(dict):
    def __init__(self):
        super().__init__()
        self.scale = 1.0


class Surrogate(torch.autograd.Function):
    slope = 1.0

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * Surrogate.slope / (1.0 + ctx.saved_tensors[0].abs())


class Spikes(Cell):
    def forward(self, x, h):
        h = Surrogate.apply(self.a(x) + self.b(h))
        return h, h


def imports(_):
    from recurrent_settings import scale as found

    return found


def attribute(_):
    return attribute.scale


attribute.scale = 1.0
OWNER = Settings()


def set_scale(_, patch):
    patch.setattr(sys.modules[__name__], "SCALE", 0.2)


def sets(holder, name):
    return lambda _, patch: patch.setattr(holder, name, 0.2)


def swaps_attributes(cell, _):
    del cell.warm
    cell.cold = True


def closes_over_itself(cell):
    cell.register_buffer("factor", torch.ones(()))
    cell.scaled = lambda h: h * cell.factor
    return cell


def filled(cell, _):
    cell.mask.numpy().fill(0.2)


REACHED = {
    "a method called by super": (CallsSuper, set_scale),
    "a method of another class": (CallsBase, set_scale),
    "a method called by super within an object": (
        lambda: cell_with(lambda self: self.reads.value(), reads=ReadsMore()),
        set_scale,
    ),
    "a method of a part": (AsksItsPart, set_scale),
    "a method found by getattr": (Dispatches, set_scale),
    "a static method": (lambda: cell_with(lambda _: Settings.read()), set_scale),
    "a class method": (lambda: cell_with(lambda _: Settings.scaled()), sets(Settings, "scale")),
    "an attribute of a base": (lambda: cell_with(lambda _: MoreSettings.scale), sets(Settings, "scale")),
    "an attribute of a module's class": (lambda: cell_with(lambda _: Temperature.value), sets(Temperature, "value")),
    "a class that it holds": (
        lambda: cell_with(lambda self: self.settings.scale, settings=Settings),
        sets(Settings, "scale"),
    ),
    "a module within a package": (lambda: cell_with(lambda _: package.settings.scale), sets(settings, "scale")),
    "an import within the code": (lambda: cell_with(imports), sets(settings, "scale")),
    "an attribute of a function": (lambda: cell_with(attribute), sets(attribute, "scale")),
    "a backward of its own": (Spikes, sets(Surrogate, "slope")),
    "what a weak reference leads to": (
        lambda: cell_with(lambda self: self.owner().own, owner=weakref.ref(OWNER)),
        sets(OWNER, "own"),
    ),
    "a deque": (
        lambda: cell_with(lambda self: self.kept[-1], kept=collections.deque([1.0])),
        lambda cell, _: cell.kept.append(0.2),
    ),
    "an attribute of a dictionary": (
        lambda: cell_with(lambda self: self.options.scale, options=Options()),
        lambda cell, _: setattr(cell.options, "scale", 0.2),
    ),
    "what a bound method of C is bound to": (
        lambda: cell_with(lambda self: self.read("scale"), read={"scale": 1.0}.get),
        lambda cell, _: cell.read.__self__.update(scale=0.2),
    ),
    "which attributes there are": (
        lambda: cell_with(lambda self: 1.0 if hasattr(self, "warm") else 0.2, warm=True),
        swaps_attributes,
    ),
    "a buffer of itself in a closure": (
        lambda: closes_over_itself(cell_with(lambda self: self.scaled(1.0))),
        lambda cell, _: setattr(cell, "factor", torch.tensor(0.2, dtype=torch.double)),
    ),
    "a tensor written to by NumPy": (
        lambda: cell_with(lambda self: self.mask, mask=torch.ones(H, dtype=torch.double)),
        filled,
    ),
    "a tensor with other memory": (
        lambda: cell_with(lambda self: self.mask, mask=torch.ones(H, dtype=torch.double)),
        lambda cell, _: setattr(cell.mask, "data", cell.mask * 0.2),
    ),
}


def results(rnn):
    x = torch.randn(T, B, H, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y, _ = rnn(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *rnn.parameters()])]


@pytest.mark.parametrize("name", list(REACHED))
def test_a_change_of_what_the_code_reaches_counts(name, monkeypatch):
    make, change = REACHED[name]
    monkeypatch.setitem(sys.modules, "recurrent_settings", settings)
    cell = make().double()
    rnn, loop = Recurrent(cell, schedule="intra_stream"), Recurrent(cell, schedule="loop")
    before = results(rnn)
    torch.testing.assert_close(before, results(loop), rtol=1e-9, atol=1e-11)
    change(cell, monkeypatch)
    after = results(loop)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    torch.testing.assert_close(results(rnn), after, rtol=1e-9, atol=1e-11)


def draws_locally(_):
    import random as drawn

    return 0.1 if drawn.random() < 0.01 else 1.0


DRAWN = {
    "a function of random": lambda: cell_with(lambda _: 0.1 if draw() < 0.01 else 1.0),
    "a method of random": lambda: cell_with(lambda _: 0.1 if uniform(0, 1) < 0.01 else 1.0),
    "a function of NumPy": lambda: cell_with(lambda _: 0.1 if rand() < 0.01 else 1.0),
    "a generator of NumPy": lambda: cell_with(
        lambda self: 0.1 if self.drawn.random() < 0.01 else 1.0, drawn=np.random.default_rng(0)
    ),
    "a generator of random": lambda: cell_with(
        lambda self: 0.1 if self.drawn.random() < 0.01 else 1.0, drawn=random.Random(0)
    ),
    "an import within the code": lambda: cell_with(draws_locally),
}


@pytest.mark.parametrize("name", list(DRAWN))
def test_seldom_draws_are_no_constants(name):
    rnn = Recurrent(DRAWN[name](), schedule="intra_stream")
    with pytest.warns(UserWarning, match="whose results differ from call to call"):
        rnn(torch.zeros(T, B, H))


@pytest.mark.parametrize(
    ("gain", "held"),
    [(lambda self: self.held[0], array.array("d", [1.0])), (lambda self: self.held.get(), NOTED)],
)
def test_what_can_not_be_looked_into_is_said(gain, held):
    rnn = Recurrent(cell_with(gain, held=None), schedule="intra_stream")
    rnn.cell.held = held
    with pytest.warns(UserWarning, match="what `held` holds can not be seen, and may change"):
        rnn(torch.zeros(T, B, H))


class Nested(Cell):
    """Has a recurrent network for what happens within a step."""

    def __init__(self):
        super().__init__()
        self.inner = Recurrent(Cell(), schedule="intra_stream")

    def forward(self, x, h):
        inside, _ = self.inner(x.expand(T, *x.shape))
        return super().forward(inside[-1], h)


def test_a_cell_with_a_recurrent_layer_in_it_is_left_to_its_loop_and_looked_at_quickly():
    rnn, plain = Recurrent(Nested(), schedule="intra_stream"), Nested()
    x = torch.randn(T, B, H)
    with pytest.warns(UserWarning, match="`inner` is a recurrent layer, which chooses a schedule of its own"):
        y, _ = rnn(x)
    h = plain.initial_state(x[0])
    for t in range(T):
        out, h = plain(x[t], h)
        assert torch.allclose(y[t], out, atol=1e-6)
    assert len(assumptions_of(rnn.cell).key) < 100
    assert rnn.cell.inner.schedules[0]._traced


class Keeps(Cell):
    """Keeps its last outputs for somebody who plots them."""

    def __init__(self):
        super().__init__()
        self.kept = collections.deque(maxlen=100)

    def forward(self, x, h):
        h, _ = super().forward(x, h)
        self.kept.append(h.detach())
        return h, h


def test_a_step_that_keeps_results_in_a_deque_runs_plainly():
    rnn = Recurrent(Keeps(), schedule="intra_stream")
    with pytest.warns(UserWarning, match="one step changes `kept`"):
        rnn(torch.zeros(T, B, H))
    assert len(rnn.cell.kept) == T


def test_what_does_not_change_is_traced_once():
    shared = functools.partial(torch.mul, 1.0)
    cell = cell_with(lambda self: self.of(self.mask), of=shared, mask=torch.ones(H, dtype=torch.double))
    rnn = Recurrent(cell.double(), schedule="intra_stream")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            rnn(torch.randn(T, B, H, dtype=torch.double))
    assert len(rnn.schedules[0]._traced) == 1
