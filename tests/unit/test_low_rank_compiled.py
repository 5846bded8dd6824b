"""`torch.compile` of models with low-rank layers: no graph break, the eager results, whichever factor rests."""

import copy

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import freeze
from lightning_accel.low_rank.factors.factorize import factorize

LAYERS = {
    "linear": (lambda: factorize(nn.Linear(12, 10), (4,)), (5, 12)),
    "pointwise": (lambda: factorize(nn.Conv2d(6, 8, 1), (3,)), (2, 6, 5, 5)),
    "tucker": (lambda: factorize(nn.Conv2d(6, 8, 3, padding=1), (3, 4)), (2, 6, 5, 5)),
}


def model_of(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return nn.Sequential(make(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)), torch.randn(shape)


def steps(model, call, x, *, half):
    """Make six training steps, with one factor at rest, the other, and none; return all that they leave."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = []
    for step in range(6):
        freeze(model, (0, 1, None)[step % 3])
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = call(x)
        y.float().square().mean().backward()
        seen += [y.detach().float(), *(None if p.grad is None else p.grad.clone() for p in model.parameters())]
        optimizer.step()
    return [*seen, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")])]
)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_steps_equal_eager_ones_whichever_factor_rests(name, backend, half):
    torch.compiler.reset()
    eager, x = model_of(name)
    eager(x)  # gives the lazy layer its shape
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)  # raises where the graph breaks
    limit = 3e-2 if half else 2e-5
    expected, actual = steps(eager, eager, x, half=half), steps(twin, compiled, x, half=half)
    assert [a is None for a in actual] == [e is None for e in expected]
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e, rtol=limit, atol=limit * float(e.abs().max()))
    torch.compiler.reset()
