"""Random cells: every schedule computes what the plain loop computes, gradients that are absent included."""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_accel.recurrent import Recurrent

F, H = 3, 4
ONE = [
    torch.tanh,
    torch.sigmoid,
    torch.sin,
    functional.silu,
    functional.gelu,
    functional.mish,
    functional.logsigmoid,
    functional.softplus,
    functional.elu,
    functional.hardtanh,
    functional.hardsigmoid,
    functional.relu6,
    functional.leaky_relu,
    lambda v: v.clamp(-0.7, 0.7),
    lambda v: torch.where(v > 0, v, 0.3 * v),
    lambda v: functional.layer_norm(v, (H,)),
    lambda v: v * v.mean(-1, keepdim=True),
    lambda v: torch.exp(-v.abs()),
    lambda v: torch.softmax(v, -1),
    lambda v: v.flip(-1),
    lambda v: torch.cat([v[:, :2], 2 * v[:, 2:]], -1),
]
TWO = [
    torch.add,
    torch.mul,
    torch.sub,
    torch.maximum,
    torch.minimum,
    lambda a, b: a * torch.sigmoid(b),
    lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: torch.where(a > b, a, 0.5 * b),
    lambda a, b: torch.addcmul(a, a, b, value=0.1),
]


class RandomCell(nn.Module):
    """A few random operations on the input, the states and two layers; some parameters may reach nothing."""

    def __init__(self, choose):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(F, H), nn.Linear(H, H), nn.Linear(H, H)
        self.p = nn.Parameter(0.3 * torch.randn(H))
        self.states, self.place, self.cut = choose.choice([1, 2]), choose.randrange(100), choose.random() < 0.2
        self.program = [
            (choose.randrange(4), choose.choice(ONE), choose.choice(TWO), choose.randrange(100), choose.randrange(100))
            for _ in range(choose.randrange(2, 7))
        ]

    def forward(self, x, state):
        values = [self.a(x), *state, self.p.expand(x.shape[0], H)]
        for kind, one, two, i, j in self.program:
            v, w = values[i % len(values)], values[j % len(values)]
            values.append([lambda: one(v), lambda: two(v, w), lambda: self.b(v), lambda: self.c(one(w))][kind]())  # noqa: B023
        following = [torch.tanh(v + self.b(h)) for v, h in zip(values[-self.states :], state, strict=True)]
        if self.cut:
            following[0] = following[0].detach()
        return 1.0 * values[self.place % len(values)], tuple(following)


def results(rnn, x, state):
    y, last = rnn(x, state)
    outs = [o for o in (y, *last) if o.requires_grad]
    leaves = [t for t in (x, *state, *rnn.parameters()) if t.requires_grad]
    total = sum((k + 1.0) * o.sin().sum() for k, o in enumerate(outs))
    return [y, *last, *torch.autograd.grad(total, leaves, allow_unused=True)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_cells_equal_the_loop(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    cell = RandomCell(choose).double()
    steps, streams = choose.choice([1, 2, 6, 11]), choose.choice([1, 2, 3, 5])
    x = torch.randn(steps, streams, F, dtype=torch.double, requires_grad=True)
    state = tuple(
        torch.randn(streams, H, dtype=torch.double, requires_grad=choose.random() < 0.5) for _ in range(cell.states)
    )
    cell.b.weight.requires_grad_(choose.random() < 0.7)
    expected = results(Recurrent(cell, schedule="loop"), x, state)
    for schedule in ("intra_stream", "compiled"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what can not be scheduled runs the loop
            actual = results(Recurrent(cell, schedule=schedule), x, state)
        for a, e in zip(actual, expected, strict=True):
            assert (a is None) == (e is None)
            if e is not None:
                torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)
