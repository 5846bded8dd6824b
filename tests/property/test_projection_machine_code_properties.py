"""Machine code against eager passes on tensors that hypothesis makes up: the same bits, or the same error."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_accel.projection import project_l1inf
from lightning_accel.projection.joint import cut_alone
from lightning_accel.projection.pyramid import MaxPyramid

CHECKS = settings(max_examples=600, deadline=None, derandomize=True)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = st.sampled_from(
    [(1, 1), (1, 300), (300, 1), (7, 5), (5, 7), (3, 200), (200, 3), (9, 65), (64, 64), (6, 5, 3, 3), (4, 130, 2)]
)


@st.composite
def tensors(draw, dtypes=DTYPES, finite=False):
    """Tensors with ties, zero groups, numbers at both ends of their type, and what is no number; and group dims."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(dtypes))
    dim = draw(st.integers(0, len(shape) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "tied", "sparse", "tiny", "subnormal", "signed zeros"]))
    tiny = torch.finfo(dtype).tiny
    values = {
        "normal": lambda: rng.normal(size=shape),
        "tied": lambda: rng.integers(-2, 3, size=shape).astype(float),
        "sparse": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.2),
        "tiny": lambda: rng.normal(size=shape) * 4.0 * tiny,
        "subnormal": lambda: rng.normal(size=shape) * 0.3 * tiny,
        "signed zeros": lambda: np.copysign(rng.integers(0, 2, size=shape) * 1.0, rng.normal(size=shape)),
    }[kind]()
    x = torch.from_numpy(values).to(dtype)
    x.movedim(dim, 0)[torch.from_numpy(rng.random(shape[dim]) < 0.2)] = 0.0
    if not finite and draw(st.integers(0, 9)) == 0:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return x, (dim,)


def norm(x, dims):
    groups = x.double().abs().movedim(dims[0], 0).reshape(x.shape[dims[0]], -1).amax(1)
    return math.fsum(groups.tolist())


def bits(x):
    """Bits of a tensor, with the sign of zeros left out: cleared groups may hold either."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x == 0, torch.zeros_like(x), x).view(words)


@CHECKS
@given(tensors(), st.floats(-3.0, 0.05), st.booleans(), st.sampled_from(["raise", "skip"]))
def test_machine_code_has_the_bits_of_eager_passes(case, exponent, in_place, nonfinite):
    x, dims = case
    size = norm(x, dims) if torch.isfinite(x).all() else 1.0
    radius, results = size * 10.0**exponent, []
    for compile in (False, True):
        mine = x.clone()
        try:
            y = project_l1inf(mine, radius, dims, out=mine if in_place else None, nonfinite=nonfinite, compile=compile)
        except ValueError as error:
            results.append((str(error), bits(mine)))
        else:
            results.append(("", bits(y)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@CHECKS
@given(tensors((torch.float32, torch.float64), finite=True), st.floats(-6.0, 0.05))
def test_one_call_stays_within_the_ball_and_changes_nothing_twice(case, exponent):
    x, dims = case
    radius = norm(x, dims) * 10.0**exponent
    y = x.clone()
    cut_alone(MaxPyramid(y, dims, y), radius, machine=True)
    assert norm(y, dims) <= radius
    assert bool((y.abs() <= x.abs()).all())
    assert not bool((y.signbit() != x.signbit())[y != 0].any())
    again = y.clone()
    cut_alone(MaxPyramid(again, dims, again), radius, machine=True)
    assert torch.equal(again.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8))
    if norm(x, dims) < radius:
        assert torch.equal(y.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8))
