"""Properties of every projection, on matrices that hypothesis makes up, against slow solvers that share no code."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_accel.projection import project_l1, project_l1inf, project_l11, project_l12, project_multilevel

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
METHODS = ("bilevel", "exact")
CHECKS = settings(max_examples=500, deadline=None, derandomize=True)


@st.composite
def matrices(draw, dtype=torch.float64, rows=7, columns=7):
    """Matrices with normal, uniform, tied, sparse and badly scaled entries."""
    shape = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "uniform", "tied", "sparse", "scaled"]))
    values = {
        "normal": lambda: rng.normal(size=shape),
        "uniform": lambda: rng.uniform(-1.0, 1.0, size=shape),
        "tied": lambda: rng.integers(-3, 4, size=shape).astype(float),
        "sparse": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.3),
        "scaled": lambda: rng.normal(size=shape) * 10.0 ** rng.uniform(-3.0, 3.0, size=(shape[0], 1)),
    }[kind]()
    return torch.from_numpy(values).to(dtype)


@st.composite
def cases(draw, dtype=None, largest=7):
    """A matrix and a radius between a thousandth of its norm and a bit more than the norm."""
    x = draw(matrices(dtype=dtype or draw(st.sampled_from(DTYPES)), rows=largest, columns=largest))
    return x, l1inf(x) * 10.0 ** draw(st.floats(-3.0, 0.05))


def l1inf(x):
    return math.fsum(x.double().abs().amax(1).tolist())


def same_bits(x, y):
    """Whether two tensors agree in every bit, signs of zeros included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))


def exact_by_bisection(x, radius):
    """Bisect on theta; each row's level comes from its sorted entries."""
    if l1inf(x) <= radius:
        return x
    a = x.abs()
    descending = a.sort(1, descending=True).values
    counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)

    def levels(theta):
        return ((descending.cumsum(1) - theta) / counts).amax(1).clamp(min=0.0)

    low, high = 0.0, float(a.sum(1).max())
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if levels(middle).sum() > radius else (low, middle)
    level = levels(high)[:, None]
    return torch.clamp(x, -level, level)


@pytest.mark.parametrize("largest", [7, 80])
@CHECKS
@given(data=st.data())
def test_exact_agrees_with_an_independent_solver(largest, data):
    x, radius = data.draw(cases(torch.float64, largest))
    difference = (project_l1inf(x, radius, method="exact") - exact_by_bisection(x, radius)).abs().max()
    assert difference <= 1e-9 * max(1.0, float(x.abs().max()))


@CHECKS
@given(cases(torch.float64), st.integers(0, 2**32 - 1))
def test_exact_satisfies_the_variational_inequality(case, seed):
    x, radius = case
    kept = project_l1inf(x, radius, method="exact")
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    other *= radius / max(l1inf(other), 1e-300)
    slack = float(((x - kept) * (other - kept)).sum())
    assert slack <= 1e-9 * (1.0 + float(x.norm()) * (float(other.norm()) + float(kept.norm())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@CHECKS
@given(data=st.data(), columns=st.booleans())
def test_result_is_feasible_without_slack_and_projecting_it_again_changes_no_bit(method, dtype, data, columns):
    x, radius = data.draw(cases(dtype))
    given_x, dims = (x.t().contiguous(), (1,)) if columns else (x, (0,))
    kept = project_l1inf(given_x, radius, dims, method)
    assert l1inf(kept.t() if columns else kept) <= radius
    assert same_bits(project_l1inf(kept, radius, dims, method), kept)
    # float64 norms may sum to one rounding more or less in another order
    if l1inf(x) * (1.0 + 1e-14 * (dtype == torch.float64)) <= radius:
        assert same_bits(kept, given_x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [project_l1, project_l12, project_l11])
@CHECKS
@given(data=st.data())
def test_other_balls_are_feasible_and_idempotent(function, dtype, data):
    x, radius = data.draw(cases(dtype))
    kept = function(x, radius)
    wide = kept.double()
    norms = torch.linalg.vector_norm(wide, dim=1) if function is project_l12 else wide.abs().sum(1)
    assert math.fsum(norms.tolist()) <= radius
    assert same_bits(function(kept, radius), kept)


@pytest.mark.parametrize("method", METHODS)
@CHECKS
@given(case=cases())
def test_signs_stay_and_no_entry_grows_and_unclipped_entries_keep_their_bits(method, case):
    x, radius = case
    kept = project_l1inf(x, radius, method=method)
    assert bool((kept.abs() <= x.abs()).all())
    assert bool((kept * x.sign() >= 0).all())
    level = kept.abs().amax(1, keepdim=True)
    clipped = (kept != x) | (x.abs() >= level)
    assert bool((kept.abs() == level)[clipped].all())
    assert same_bits(kept[~clipped], x[~clipped])


@pytest.mark.parametrize("method", METHODS)
@CHECKS
@given(case=cases(torch.float64))
def test_norms_of_the_two_parts_add_up(method, case):
    x, radius = case
    kept = project_l1inf(x, radius, method=method)
    assert l1inf(x - kept) + l1inf(kept) == pytest.approx(l1inf(x), rel=1e-9)


@CHECKS
@given(cases(torch.float64))
def test_bilevel_clamps_to_the_nearest_point_of_the_l1_ball(case):
    """Brute force over the sets of groups that survive."""
    x, radius = case
    assume(l1inf(x) > radius)
    norms = x.abs().amax(1).tolist()
    best, best_distance = None, math.inf
    for size in range(1, len(norms) + 1):
        for alive in itertools.combinations(range(len(norms)), size):
            tau = (math.fsum(norms[j] for j in alive) - radius) / size
            level = [norms[j] - tau if j in alive else 0.0 for j in range(len(norms))]
            distance = math.fsum((a - b) ** 2 for a, b in zip(level, norms, strict=True))
            if min(level) >= -1e-12 and distance < best_distance:
                best, best_distance = level, distance
    level = torch.tensor(best, dtype=x.dtype).clamp(min=0.0)[:, None]
    difference = (project_l1inf(x, radius) - torch.clamp(x, -level, level)).abs().max()
    assert difference <= 1e-9 * max(1.0, float(x.abs().max()))


@CHECKS
@given(cases(torch.float64))
def test_two_levels_with_l2_inside_are_exact(case):
    """The nearest point of the l1,2 ball shrinks every row by one tau: its optimality condition."""
    x, radius = case
    kept = project_l12(x, radius)
    norms = torch.linalg.vector_norm(x, dim=1)
    tau = torch.linalg.vector_norm(x - kept, dim=1)
    alive = torch.linalg.vector_norm(kept, dim=1) > 0
    scale = 1e-9 * max(1.0, float(norms.max()))
    if bool(alive.any()):
        shared = float(tau[alive].max())
        assert float(tau[alive].min()) >= shared - scale
        assert bool((norms[~alive] <= shared + scale).all())


@CHECKS
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0), st.sampled_from(DTYPES))
def test_nested_infinity_norms_are_one(seed, fraction, dtype):
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed)).to(dtype)
    radius = fraction * l1inf(x.flatten(1))
    nested = project_multilevel(x, radius, ("l1", "linf", "linf"), ((0,), (1,), (2,)))
    assert torch.equal(nested, project_l1inf(x, radius))


LEVELS = [
    (("l1", "l1", "linf"), ((0,), (1,), (2,))),
    (("l1", "l2", "l1"), ((2,), (0,), (1,))),
    (("linf", "l1"), ((0,), (1, 2))),
    (("l2", "linf", "l1"), ((2,), (0,), (1,))),
    (("l2",), ((0, 1, 2),)),
    (("linf", "l2", "linf"), ((1,), (2,), (0,))),
]


def nested_norm(x, norms, dims):
    y = x.double()
    for norm, level in reversed(list(zip(norms, dims, strict=True))):
        order = {"l1": 1, "l2": 2, "linf": math.inf}[norm]
        y = torch.linalg.vector_norm(y, ord=order, dim=level, keepdim=True)
    return float(y)


@pytest.mark.parametrize(("norms", "dims"), LEVELS)
@settings(CHECKS, max_examples=500)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-3.0, 0.05), dtype=st.sampled_from(DTYPES))
def test_every_nesting_is_feasible_idempotent_and_shrinking(norms, dims, seed, exponent, dtype):
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed)).to(dtype)
    radius = nested_norm(x, norms, dims) * 10.0**exponent
    kept = project_multilevel(x, radius, norms, dims)
    assert nested_norm(kept, norms, dims) <= radius
    assert same_bits(project_multilevel(kept, radius, norms, dims), kept)
    assert bool((kept.abs() <= x.abs()).all())
    assert bool((kept * x >= 0).all())


@pytest.mark.parametrize("method", METHODS)
@CHECKS
@given(case=cases(torch.float64), seed=st.integers(0, 2**32 - 1), power=st.integers(-20, 20))
def test_permutations_sign_flips_and_powers_of_two_go_through(method, case, seed, power):
    x, radius = case
    generator = torch.Generator().manual_seed(seed)
    kept = project_l1inf(x, radius, method=method)
    close = {"rtol": 0.0, "atol": 1e-12 * max(1.0, float(x.abs().max()))}
    rows, columns = (torch.randperm(n, generator=generator) for n in x.shape)
    torch.testing.assert_close(
        project_l1inf(x[rows][:, columns], radius, method=method), kept[rows][:, columns], **close
    )
    signs = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1.0
    torch.testing.assert_close(project_l1inf(x * signs, radius, method=method), kept * signs, **close)
    assert torch.equal(project_l1inf(x * 2.0**power, radius * 2.0**power, method=method), kept * 2.0**power)
