"""The exact projection at a target sparsity: the threshold is known, and every bound is found by itself."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from lightning_accel.projection import ExactState, project_l1inf, radius_for_sparsity
from lightning_accel.projection.balls.exact import project_exact
from lightning_accel.projection.sparsity import gap_middle
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import find_targets


def made(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def taken_off(x, bounds, dims):
    """l1 norm of what is above its group's bound."""
    groups = x.double().movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1).flatten(1)
    return (groups.abs() - bounds[:, None]).clamp_min(0.0).sum(1), groups.abs().sum(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dims"), [((30, 200), (0,)), ((200, 30), (1,)), ((8, 12, 3, 3), (1,)), ((40, 1), (0,))]
)
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9, 1.0])
def test_same_amount_is_taken_off_every_group_that_stays_and_the_others_go(dtype, shape, dims, sparsity):
    x = made(*shape, dtype=dtype)
    out = torch.empty_like(x)
    found = project_exact([(x, dims, out)], partial(gap_middle, sparsity=sparsity))
    bounds, theta = found.bounds[0], float(found.tau)
    alive = bounds > 0.0
    assert int((~alive).sum()) == round(sparsity * shape[dims[0]])
    taken, totals = taken_off(x, bounds, dims)
    torch.testing.assert_close(taken[alive], torch.full_like(taken[alive], theta), rtol=2e-5, atol=0.0)
    assert bool((totals[~alive] <= theta * (1 + 1e-6)).all())
    along = [1] * x.ndim
    along[dims[0]] = -1
    wide = bounds.view(along)
    torch.testing.assert_close(
        out.double(), x.double().clamp(-wide, wide), rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-7
    )
    assert bool((out.double().abs() <= wide).all())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_step_after_step_equals_projections_onto_the_radius_that_clears_as_much(dtype, tolerance, groups):
    model = nn.Linear(40, 30).to(dtype)
    dims = (0,) if groups == "rows" else (1,)
    projector = Projector(
        find_targets(nn.ModuleList([model]), groups=groups), Ball(target_sparsity=0.6, method="exact")
    )
    for step in range(1, 6):
        with torch.no_grad():
            model.weight += 0.02 * made(30, 40, seed=step, dtype=dtype)
        before = model.weight.detach().clone()
        expected = project_l1inf(before, radius_for_sparsity(before, 0.6, dims, "exact"), dims, "exact")
        projector.project(step)
        torch.testing.assert_close(model.weight.detach(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(model.weight == 0, expected == 0)


def test_one_threshold_holds_for_all_parameters_together():
    parts = [(made(30, 20), (0,)), (3.0 * made(16, 9, seed=1), (1,)), (made(5, 4, 3, 3, seed=2), (0,))]
    outs = [torch.empty_like(x) for x, _ in parts]
    found = project_exact(
        [(x, dims, out) for (x, dims), out in zip(parts, outs, strict=True)], partial(gap_middle, sparsity=0.5)
    )
    assert sum(int((b == 0.0).sum()) for b in found.bounds) == round(0.5 * (30 + 9 + 5))
    for (x, dims), bounds in zip(parts, found.bounds, strict=True):
        taken, totals = taken_off(x, bounds, dims)
        alive = bounds > 0.0
        torch.testing.assert_close(taken[alive], found.tau.expand_as(taken[alive]), rtol=2e-5, atol=0.0)
        assert bool((totals[~alive] <= found.tau * (1 + 1e-6)).all())


@pytest.mark.parametrize("start", ["zeros", "huge", "random", "of another shape"])
def test_where_it_starts_does_not_matter(start):
    x, rule = made(50, 80, dtype=torch.float64), partial(gap_middle, sparsity=0.7)
    cold = project_exact([(x, (1,), torch.empty_like(x))], rule).bounds[0]
    starts = {
        "zeros": torch.zeros(80, dtype=torch.float64),
        "huge": torch.full((80,), 1e6, dtype=torch.float64),
        "random": made(80, seed=1, dtype=torch.float64).abs(),
        "of another shape": torch.ones(81, dtype=torch.float64),
    }
    state = ExactState(starts[start])
    found = project_exact([(x, (1,), torch.empty_like(x))], rule, state=state)
    torch.testing.assert_close(found.bounds[0], cold, rtol=1e-12, atol=1e-14)
    assert state.mu is not None
    torch.testing.assert_close(state.mu, cold, rtol=1e-12, atol=1e-14)


def test_last_bounds_save_iterations():
    x, rule, state = made(100, 300), partial(gap_middle, sparsity=0.5), ExactState()
    project_exact([(x, (1,), torch.empty_like(x))], rule, state=state)
    cold = state.iterations
    project_exact([(x + 1e-4 * made(100, 300, seed=1), (1,), torch.empty_like(x))], rule, state=state)
    assert state.iterations < cold


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_what_is_not_finite_changes_nothing(wrong, nonfinite):
    layer = nn.Linear(6, 10)
    with torch.no_grad():
        layer.weight[3, 2] = wrong
    before = layer.weight.detach().clone()
    ball = Ball(target_sparsity=0.5, method="exact", nonfinite=nonfinite)
    projector = Projector(find_targets(nn.ModuleList([layer])), ball)
    if nonfinite == "raise":
        with pytest.raises(ValueError, match="NaN or infinity"):
            projector.project(1)
    else:
        projector.project(1)
    assert torch.equal(layer.weight.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


def test_nothing_to_clear_leaves_every_bit():
    x = torch.tensor([[0.0, -0.0], [1.0, 2.0], [-0.0, 0.0]])
    for sparsity in (0.0, 0.5):  # two groups are zero already
        out = torch.empty_like(x)
        found = project_exact([(x, (0,), out)], partial(gap_middle, sparsity=sparsity))
        assert torch.equal(out.view(torch.int32), x.view(torch.int32))
        assert float(found.tau) == 0.0


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0, 2.0]])
def test_gap_lies_between_those_that_go_and_those_that_stay(values, sparsity):
    middle = float(gap_middle(torch.tensor(values, dtype=torch.float64), sparsity))
    ascending, cleared = sorted(values), round(5 * sparsity)
    if cleared == 0:
        assert middle == 0.0
    elif cleared == 5:
        assert middle == ascending[-1]
    elif ascending[cleared - 1] == 0.0:
        assert middle == 0.0, "what is zero already needs no threshold"
    else:
        assert middle == (ascending[cleared - 1] + ascending[cleared]) / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "one column", "ties", "one group", "all alike"])
def test_radius_far_below_the_norm_ends_in_the_ball(dtype, kind):
    for seed in range(6):
        x = made(8, 1 if kind == "one column" else 60, seed=seed, dtype=dtype)
        if kind == "ties":
            x = x[:, :1].expand(8, 60).clone()
        if kind == "one group":
            x[1:] = 0.0
        if kind == "all alike":
            x = torch.ones_like(x)
        norm = math.fsum(x.double().abs().amax(1).tolist())
        for power in (*range(3, 32), 40, 100, 200, 310, 320):
            radius = norm * 10.0**-power
            warm = ExactState(torch.full((8,), 0.1, dtype=torch.float64))
            for state in (None, warm):
                y = project_l1inf(x, radius, method="exact", state=state)
                assert math.fsum(y.double().abs().amax(1).tolist()) <= radius
                assert torch.equal(project_l1inf(y, radius, method="exact"), y)


def test_small_radius_of_float32_data_is_used_up_and_is_the_nearest_point():
    for seed in range(5):
        x = made(20, 300, seed=seed)
        for share in (1e-5, 1e-7, 1e-9, 1e-11):
            radius = share * float(x.abs().amax(1).sum())
            y = project_l1inf(x, radius, method="exact")
            best = project_l1inf(x.double(), radius, method="exact")
            assert float(y.double().abs().amax(1).sum()) >= radius * (1 - 1e-6)
            torch.testing.assert_close(y.double(), best, rtol=1e-5, atol=1e-6 * radius)
