"""What the projection functions promise, on the cases where numerics or memory layout usually break it."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_accel.projection import (
    ExactState,
    L1InfBall,
    MultilevelBall,
    project_l1,
    project_l1inf,
    project_l11,
    project_l12,
    project_multilevel,
    radius_for_sparsity,
)
from lightning_accel.projection.balls.l1_thresholds import SORT_UP_TO, l1_thresholds, simplex_threshold, threshold_near
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import find_targets

METHODS = ("bilevel", "exact")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def norm_of(x, group_dims=(0,)):
    rest = tuple(d for d in range(x.ndim) if d not in group_dims)
    tops = x.double().abs().amax(rest) if rest else x.double().abs()
    return math.fsum(tops.flatten().tolist())


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.fixture
def x():
    return torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_radius_of_at_least_the_norm_returns_the_input_bit_for_bit(method, dtype):
    x = torch.tensor([[-0.0, 1.5], [0.0, -2.0]], dtype=dtype)
    assert torch.equal(bits(project_l1inf(x, 3.5, method=method)), bits(x))
    assert torch.equal(bits(project_l1inf(x, math.inf, method=method)), bits(x))


@pytest.mark.parametrize("method", METHODS)
def test_radius_zero_gives_zeros(x, method):
    assert torch.equal(project_l1inf(x, 0.0, method=method), torch.zeros_like(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_empty_tensors_come_back_empty(method, shape):
    assert project_l1inf(torch.empty(shape), 1.0, method=method).shape == shape


@pytest.mark.parametrize("method", METHODS)
def test_in_place_and_out_equal_a_new_tensor(x, method):
    expected, before = project_l1inf(x, 3.0, method=method), x.clone()
    out = torch.empty_like(x)
    assert project_l1inf(x, 3.0, method=method, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(x, before)
    assert project_l1inf(x, 3.0, method=method, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_dims", [(0,), (1,), (0, 1), (2, 3), (0, 2)])
def test_memory_layout_does_not_matter(method, dtype, group_dims):
    x = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    radius = 0.3 * norm_of(x, group_dims)
    expected = project_l1inf(x, radius, group_dims, method)
    wide = torch.randn(6, 5, 8, 3).to(dtype)
    wide[:, :, ::2] = x
    layouts = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": wide[:, :, ::2],
    }
    for name, other in layouts.items():
        # another order of summation may move a float64 threshold by a rounding
        torch.testing.assert_close(project_l1inf(other, radius, group_dims, method), expected, msg=name)
        rest = wide[:, :, 1::2].clone()
        assert project_l1inf(other, radius, group_dims, method, out=other) is other
        torch.testing.assert_close(other, expected, msg=name)
        assert torch.equal(wide[:, :, 1::2], rest)


def test_expanded_view_is_read_but_never_written(x):
    view = x[:1].expand(4, 30)
    assert torch.equal(project_l1inf(view, 1.0), project_l1inf(view.clone(), 1.0))
    with pytest.raises(ValueError, match="expanded view"):
        project_l1inf(view, 1.0, out=view)


def test_out_of_another_shape_is_refused(x):
    with pytest.raises(ValueError, match="`out` must be like `x`"):
        project_l1inf(x, 1.0, out=torch.empty(3))


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_one_entry_are_the_l1_ball(x, method):
    torch.testing.assert_close(project_l1inf(x, 5.0, (0, 1), method), project_l1(x, 5.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_one_group_is_clamped_to_the_radius(x, method):
    torch.testing.assert_close(project_l1inf(x, 0.5, (), method), x.clamp(-0.5, 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_ties_share_the_radius(method):
    x = torch.tensor([[3.0, -3.0], [3.0, -3.0], [3.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(project_l1inf(x, 4.5, method=method), x / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_raise_or_leave_the_tensor_unchanged(method, bad, dtype):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[2, 1] = bad
    before = x.clone()
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        project_l1inf(x, 1.0, method=method, out=x)
    assert torch.equal(bits(x), bits(before))
    project_l1inf(x, 1.0, method=method, out=x, nonfinite="skip")
    assert torch.equal(bits(x), bits(before))
    for function in (project_l12, project_l11, project_l1):
        assert torch.equal(bits(function(x, 1.0, nonfinite="skip")), bits(before))


@pytest.mark.parametrize("radius", [-1.0, math.nan])
def test_negative_or_nan_radius_is_refused(x, radius):
    with pytest.raises(ValueError, match="`radius` must be >= 0"):
        project_l1inf(x, radius)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "fast"}, "`method` must be 'bilevel' or 'exact'"),
        ({"group_dims": (2,)}, "`group_dims` must be dimensions"),
        ({"group_dims": (0, -2)}, "not name a dimension twice"),
        ({"nonfinite": "ignore"}, "`nonfinite` must be 'raise' or 'skip'"),
    ],
)
def test_invalid_arguments_are_refused(x, arguments, match):
    with pytest.raises(ValueError, match=match):
        project_l1inf(x, 1.0, **arguments)


@pytest.mark.parametrize(
    ("norms", "dims", "match"),
    [
        (("l1",), ((0,), (1,)), "one entry a level"),
        (("l1", "l3"), ((0,), (1,)), "`norms` must be of"),
        (("l1", "l2"), ((0,), (0,)), "every dimension"),
        (("l1", "l2"), ((0,), ()), "every dimension"),
    ],
)
def test_invalid_levels_are_refused(x, norms, dims, match):
    with pytest.raises(ValueError, match=match):
        project_multilevel(x, 1.0, norms, dims)


@pytest.mark.parametrize("function", [project_l1, project_l1inf, project_l12, project_l11, project_multilevel])
@pytest.mark.parametrize("wrong", [torch.ones(3, 3, dtype=torch.int64), [[1.0]]])
def test_only_floating_point_tensors_are_projected(function, wrong):
    with pytest.raises(TypeError, match="`x` must be a float16"):
        function(wrong, 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 40), (40, 3)])
def test_large_float32_numbers_whose_sum_leaves_float32_are_projected(method, shape):
    x = 3e38 * (0.5 + 0.5 * torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    small = project_l1inf(x.double(), 1e38, method=method)
    kept = project_l1inf(x, 1e38, method=method)
    assert norm_of(kept) <= 1e38
    torch.testing.assert_close(kept.double(), small, rtol=1e-6, atol=1e31)


def test_small_radius_of_a_large_tensor_loses_no_digits():
    x = 1e6 + torch.rand(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = 1e-3
    kept = project_l1inf(x, radius)
    assert norm_of(kept) <= radius
    assert norm_of(kept) >= radius * (1 - 1e-6)


def test_threshold_by_dropping_equals_threshold_by_sorting():
    values = torch.randn(1, SORT_UP_TO + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    descending = values[0].sort(descending=True).values
    for total in (0.0, 1e-6, 1.0, 1e4):
        count = torch.arange(1, len(descending) + 1, dtype=torch.float64)
        expected = ((descending.cumsum(0) - total) / count).max()
        tau = simplex_threshold(values, torch.tensor([total], dtype=torch.float64))
        torch.testing.assert_close(tau[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 100, SORT_UP_TO + 1])
@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.01, 0.5, 0.999, 1.0])
def test_one_vector_is_cut_like_one_of_several(groups, fraction):
    norms = torch.rand(2, groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = fraction * norms.sum(1)
    both = l1_thresholds(norms, radius)
    alone = l1_thresholds(norms[:1], radius[:1])
    torch.testing.assert_close(alone.bounds, both.bounds[:1], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(alone.tau, both.tau[:1], rtol=1e-9, atol=1e-12)
    if fraction < 1.0:
        assert math.fsum(alone.bounds[0].tolist()) <= float(radius[0])


@pytest.mark.parametrize("groups", [1, 2, 100, SORT_UP_TO + 1])
@pytest.mark.parametrize("off", [0.5, 0.99, 1.0, 1.01, 1.2])
def test_a_threshold_from_near_by_is_the_threshold(groups, off):
    norms = 1.0 + torch.rand(groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = 0.6 * float(norms.sum())
    cold = l1_thresholds(norms[None], torch.tensor([radius], dtype=torch.float64))
    found = threshold_near(norms, radius, groups, off * float(cold.tau))
    assert found is not None
    bounds, tau = found
    torch.testing.assert_close(bounds, cold.bounds[0], rtol=1e-9, atol=1e-11)
    assert tau == pytest.approx(float(cold.tau), rel=1e-10)
    assert math.fsum(bounds.tolist()) <= radius


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_step_after_step_equals_single_projections_and_goes_on_from_its_state(layers, groups):
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleList([nn.Linear(20 + i, 30 + i) for i in range(layers)])
    ball = Ball(radius=0.9)
    projector, dims = Projector(find_targets(model, groups=groups), ball), (0,) if groups == "rows" else (1,)
    for step in range(1, 12):
        if step == 6:  # a run that was interrupted goes on
            state = projector.state_dict()
            projector = Projector(find_targets(model, groups=groups), ball)
            projector.load_state_dict(state)
        expected = []
        with torch.no_grad():
            for layer in model:
                layer.weight += 0.01 * torch.randn(layer.weight.shape, generator=generator)
                expected.append(project_l1inf(layer.weight, 0.9, dims))
        norms = {t.name: norm_of(t.view(), dims) for t in projector.targets}
        projector.project(step)
        for target, kept in zip(projector.targets, expected, strict=True):
            torch.testing.assert_close(target.view(), kept, rtol=1e-6, atol=1e-8)
            assert norm_of(target.view(), dims) <= 0.9
            found = projector.last[target.name]
            assert float(found.norm) == pytest.approx(norms[target.name], rel=1e-12)
            assert projector.memory(target).tau == float(found.tau) > 0.0
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="holds NaN"):
        projector.project(12)


@pytest.mark.parametrize(
    ("norms", "radius", "start"),
    [
        ([1.0, 2.0], 4.0, 0.5),  # lies in the ball
        ([1.0, 2.0], 0.1, 1.9),  # a threshold above the radius
        ([1.0, 2.0], 9.0, 5.0),  # starts above all norms
        ([1.0, math.nan], 1.0, 0.5),
        ([1.0, math.inf], 1.0, 0.5),
    ],
)
def test_what_needs_a_careful_look_gets_one(norms, radius, start):
    assert threshold_near(torch.tensor(norms, dtype=torch.float64), radius, 2, start) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("group_dims", [(0,), (1,)])
def test_warm_start_ends_where_a_cold_start_ends(dtype, group_dims):
    x = torch.randn(60, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = ExactState()
    radius = radius_for_sparsity(x, 0.5, group_dims, "exact")
    project_l1inf(x, radius, group_dims, "exact", state=state)
    cold = state.iterations
    moved = (x + 1e-3 * torch.randn(60, 80, generator=torch.Generator().manual_seed(1)).to(dtype)).to(dtype)
    warm = project_l1inf(moved, radius, group_dims, "exact", state=state)
    assert state.iterations <= cold
    unit = max(1e-6, torch.finfo(dtype).eps)  # a bound beside a border may be rounded to either side of it
    # bounds of 32-bit data are found to a unit in the last place of the largest entry
    torch.testing.assert_close(warm, project_l1inf(moved, radius, group_dims, "exact"), rtol=unit, atol=5e-7)


@pytest.mark.parametrize("group_dims", [(0,), (1,)])
@pytest.mark.parametrize("joint", [0, 20])
def test_warm_start_sees_groups_that_were_dead(group_dims, joint):
    """Few groups lived, and now others do, or some of both."""
    generator = torch.Generator().manual_seed(0)
    share = torch.full((80,), 0.01, dtype=torch.float64)
    state, size = ExactState(), (80, 1) if group_dims == (0,) else (1, 80)
    noise = torch.randn(80, 80, generator=generator, dtype=torch.float64)
    first, then = share.clone(), share.clone()
    first[3:7], then[5:9] = 1.0, 1.0
    then[joint : 2 * joint] = 0.5
    radius = radius_for_sparsity(noise * first.view(size), 0.95, group_dims, "exact")
    project_l1inf(noise * first.view(size), radius, group_dims, "exact", state=state)
    assert int((state.mu > 0.0).sum()) == 4
    moved = noise * then.view(size)
    warm = project_l1inf(moved, radius, group_dims, "exact", state=state)
    torch.testing.assert_close(warm, project_l1inf(moved, radius, group_dims, "exact"), rtol=0.0, atol=1e-12)
    assert int((state.mu > 0.0).sum()) >= 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("group_dims", [(0,), (1,)])
def test_target_sparsity_is_met_within_one_group(method, dtype, sparsity, group_dims):
    x = torch.randn(200, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    radius = radius_for_sparsity(x, sparsity, group_dims, method)
    kept = project_l1inf(x, radius, group_dims, method)
    zero = int((kept.abs().amax(1 - group_dims[0]) == 0).sum())
    # largest magnitudes of 16 bits tie often, and ties go together
    ties = 0 if dtype in (torch.float32, torch.float64) or method == "exact" else 4
    assert abs(zero - round(sparsity * 200)) <= 1 + ties


def test_target_sparsity_of_other_levels_is_met(x):
    for inner in ("l1", "l2"):
        radius = radius_for_sparsity(x, 0.5, norms=("l1", inner), dims=((0,), (1,)))
        kept = project_multilevel(x, radius, ("l1", inner), ((0,), (1,)))
        assert int((kept != 0).any(1).sum()) == 10


def test_groups_that_are_zero_already_count(x):
    x[:12] = 0.0
    for method in METHODS:
        assert torch.equal(project_l1inf(x, radius_for_sparsity(x, 0.5, method=method), method=method), x)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sparsity": 1.5}, r"`sparsity` must be a fraction of groups in \[0, 1\]"),
        ({"sparsity": 0.5, "method": "fast"}, "`method` must be"),
        ({"sparsity": 0.5, "norms": ("l2", "linf"), "dims": ((0,), (1,))}, "must be 'l1' to clear groups"),
        ({"sparsity": 0.5, "norms": ("l1", "linf")}, "one entry a level"),
    ],
)
def test_radius_for_sparsity_refuses_invalid_arguments(x, arguments, match):
    with pytest.raises(ValueError, match=match):
        radius_for_sparsity(x, **arguments)


def test_radius_for_sparsity_refuses_nan_and_takes_empty_tensors(x):
    x[0, 0] = math.nan
    for method in METHODS:
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            radius_for_sparsity(x, 0.5, method=method)
    assert radius_for_sparsity(torch.empty(0, 3), 0.5) == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_dims", [(0,), (1,), (0, 1), ()])
@pytest.mark.parametrize("fraction", [0.7, 0.2])
def test_ball_has_the_right_gradient_away_from_ties(method, group_dims, fraction):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    ball = L1InfBall(fraction * norm_of(x.detach(), group_dims), group_dims, method)
    assert torch.autograd.gradcheck(ball, (x,))
    assert torch.autograd.gradgradcheck(ball, (x,))
    assert torch.equal(ball(x).detach(), ball(x.detach()))


@pytest.mark.parametrize(
    ("norms", "dims"),
    [
        (("l1",), ((0, 1, 2),)),
        (("l2",), ((0, 1, 2),)),
        (("l1", "l2"), ((0,), (1, 2))),
        (("l1", "l1"), ((1,), (0, 2))),
        (("l1", "l1", "linf"), ((0,), (1,), (2,))),
        (("linf", "l1"), ((0,), (1, 2))),
        (("l2", "linf", "l1"), ((2,), (0,), (1,))),
    ],
)
def test_multilevel_ball_has_the_right_gradient_away_from_ties(norms, dims):
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MultilevelBall(0.8, norms, dims), (x,))


def test_ball_keeps_a_parametrized_weight_feasible_while_it_trains():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5)
    parametrize.register_parametrization(linear, "weight", L1InfBall(0.7, (0,)))
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5)
    for _ in range(5):
        linear(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        assert norm_of(linear.weight.detach()) <= 0.7
    assert "radius=0.7" in repr(linear)
    assert "norms=('l1', 'linf')" in repr(MultilevelBall(1.0))


def test_ball_refuses_invalid_arguments():
    with pytest.raises(ValueError, match="`method` must be"):
        L1InfBall(1.0, method="fast")
    with pytest.raises(ValueError, match="`radius` must be >= 0"):
        MultilevelBall(-1.0)
