"""What runs for tensors on a GPU, run on tensors of the CPU: the same promises, and no look at a number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_projection_properties import DTYPES, cases, exact_by_bisection, l1inf, matrices, same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_accel.machine import transfers
from lightning_accel.projection import (
    MultilevelBall,
    project_l1,
    project_l1inf,
    project_l11,
    project_l12,
    project_multilevel,
)
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.on_device.sorted_groups import newton_steps
from lightning_accel.projection.training.ball_specification import Ball
from lightning_accel.projection.training.projector import Projector
from lightning_accel.projection.training.targets import Target

METHODS = ("bilevel", "exact")
CHECKS = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _far():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "is_far", lambda x: True)
        yield


def near(function, *args, **kwargs):
    """Call a function as for tensors of the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "is_far", lambda x: False)
        return function(*args, **kwargs)


@CHECKS
@given(cases(), st.sampled_from(METHODS), st.booleans())
def test_feasible_idempotent_and_no_entry_grows(case, method, in_place):
    x, radius = case
    p = x.clone()
    p = project_l1inf(p, radius, method=method, out=p) if in_place else project_l1inf(x, radius, method=method)
    assert l1inf(p) <= radius
    assert bool((p.double().abs() <= x.double().abs()).all())
    assert same_bits(project_l1inf(p, radius, method=method), p)
    if l1inf(x) <= radius * (1.0 - 1e-14):  # norms are sums in float64
        assert same_bits(p, x)


@CHECKS
@given(cases(dtype=torch.float64))
def test_exact_equals_bisection(case):
    x, radius = case
    torch.testing.assert_close(
        project_l1inf(x, radius, method="exact"), exact_by_bisection(x, radius), rtol=1e-9, atol=1e-9 * l1inf(x)
    )


@CHECKS
@given(cases(), st.sampled_from(METHODS))
def test_the_same_as_on_the_cpu(case, method):
    x, radius = case
    digits = {torch.float64: 1e-9, torch.float32: 1e-5}.get(x.dtype, 2.0 * torch.finfo(x.dtype).eps)
    expected = near(project_l1inf, x, radius, method=method)
    torch.testing.assert_close(
        project_l1inf(x, radius, method=method), expected, rtol=digits, atol=digits * float(x.abs().max())
    )


@CHECKS
@given(matrices(), st.integers(0, 7))
def test_as_many_groups_go_as_were_asked_for(x, cleared):
    groups = len(x)
    sparsity = min(cleared, groups - 1) / groups
    for method in METHODS:
        layer = nn.Linear(x.shape[1], groups).double()
        layer.weight.data.copy_(x)
        target = Target("weight", layer, "weight", (0,), tuple(x.shape))
        zero = int((x.abs().amax(1) == 0).sum())
        projector = Projector([target], Ball(target_sparsity=sparsity, method=method), freeze_zero_groups=True)
        projector.project(1)
        gone = int((layer.weight.abs().amax(1) == 0).sum())
        assert max(round(sparsity * groups), zero) == gone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped_numbers_stay_as_they_are(dtype):
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.tensor([[1.0, bad], [2.0, 3.0]], dtype=dtype)
        for method in METHODS:
            assert same_bits(project_l1inf(x, 1.0, method=method, nonfinite="skip"), x)
            with pytest.raises(ValueError, match="NaN or infinity"):
                project_l1inf(x, 1.0, method=method)


def test_newton_ends_for_the_worst_of_data():
    """Norms that halve from group to group, where every step drops few of them."""
    x = (2.0 ** -torch.arange(1000, dtype=torch.float64)).unsqueeze(1) + torch.zeros(1000, 3, dtype=torch.float64)
    for radius in (1e-12, 1e-3, 1.0, 1.999):
        p = project_l1inf(x, radius, method="exact")
        assert radius * (1.0 - 1e-12) - 3e-14 <= l1inf(p) <= radius  # 2 (n + 16) roundings are left free
    assert newton_steps(10_000, 10_000) <= 45


CALLS = {
    "l1,inf": lambda x: project_l1inf(x, 1.0, nonfinite="skip"),
    "columns": lambda x: project_l1inf(x, 1.0, (1,), nonfinite="skip"),
    "in place": lambda x: project_l1inf(x, 1.0, out=x, nonfinite="skip"),
    "exact": lambda x: project_l1inf(x, 1.0, method="exact", nonfinite="skip"),
    "l1": lambda x: project_l1(x, 1.0, nonfinite="skip"),
    "l1,2": lambda x: project_l12(x, 1.0, nonfinite="skip"),
    "l1,1": lambda x: project_l11(x, 1.0, nonfinite="skip"),
    "three levels": lambda x: project_multilevel(
        x.view(8, 2, 3), 1.0, ("l1", "l2", "linf"), ((0,), (1,), (2,)), nonfinite="skip"
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_projection_looks_at_no_number(name, dtype):
    """Tensors without numbers raise where one is read."""
    assert CALLS[name](torch.empty(8, 6, dtype=dtype, device="meta")).device.type == "meta"


class Refusing(TorchDispatchMode):
    """Refuse what torch refuses on a GPU where deterministic algorithms were asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not (func is torch.ops.aten.cumsum.default and args[0].is_floating_point())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*CALLS, "ball"])
def test_deterministic_algorithms_may_be_asked_for(name):
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    call = CALLS.get(name) or (lambda x: MultilevelBall(1.0, ("l1", "l1"))(x.requires_grad_()).detach())
    expected = call(x.clone())
    torch.use_deterministic_algorithms(True)
    try:
        with Refusing():
            torch.testing.assert_close(call(x.clone()), expected)
    finally:
        torch.use_deterministic_algorithms(False)


BALLS = {
    "radius": {"radius": 1.0},
    "fraction of groups": {"target_sparsity": 0.5},
    "one budget": {"target_sparsity": 0.5, "scope": "global"},
    "one budget with a floor": {"radius": 1.0, "scope": "global", "min_groups": 2},
    "exact": {"radius": 1.0, "method": "exact"},
    "exact fraction": {"target_sparsity": 0.5, "method": "exact"},
    "exact budget": {"radius": 1.0, "method": "exact", "scope": "global"},
    "l1,2": {"radius": 1.0, "norms": ("l1", "l2")},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("name", BALLS)
def test_a_projected_step_looks_at_no_number(name, frozen):
    layers = nn.ModuleList(nn.Linear(a, b, device="meta") for a, b in ((6, 8), (6, 8), (8, 5)))
    targets = [Target(f"{k}", m, "weight", (0,), tuple(m.weight.shape)) for k, m in enumerate(layers)]
    projector = Projector(targets, Ball(**BALLS[name]), freeze_zero_groups=frozen)
    for step in (1, 2):
        projector.project(step)
        projector.hold()
    projector.mask()
    projector.hold()
    with pytest.raises(Exception, match="meta"):  # the look that the callback takes at the end of an epoch
        projector.check_finite()


def layers_of(shape, count, dims, dtype):
    """Return layers with weights of one shape, some of them of zeros or with ties, and their targets."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for k in range(count):
        layer = nn.Linear(1, 1)
        weight = torch.randn(shape, generator=generator) * 10.0 ** (k - 1)
        if k == 1:
            weight = weight.round()
        if k == 2:
            weight[:2] = 0.0
        if len(shape) == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        layer.weight = nn.Parameter(weight.to(dtype))
        layers.append(layer)
    return layers, [Target(f"{k}", m, "weight", dims, tuple(m.weight.shape)) for k, m in enumerate(layers)]


SHARED = {
    "radius": {"radius": 1.0},
    "radius 0": {"radius": 0.0},
    "infinite radius": {"radius": math.inf},
    "floor": {"radius": 0.5, "min_groups": 3},
    "fraction of groups": {"target_sparsity": 0.5},
    "all groups": {"target_sparsity": 1.0},
    "fraction of the norm": {"radius_fraction": 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((6, 5), (0,)), ((6, 5), (1,)), ((6, 4, 3, 3), (0,)), ((6, 4, 3, 3), (1,)), ((4, 3, 5), (0, 1))],
    ids=str,
)
@pytest.mark.parametrize("name", SHARED)
def test_parameters_of_one_shape_are_projected_as_each_alone(name, shape, dims, dtype):
    frozen, zeros_only = name in ("fraction of groups", "radius"), name == "fraction of groups"
    found = []
    for together in (False, True):
        layers, targets = layers_of(shape, 4, dims, dtype)
        if not together:  # a look at each by itself
            for target in targets:
                single = Projector([target], Ball(**SHARED[name]), freeze_zero_groups=frozen, zeros_only=zeros_only)
                single.remember_first_norms()
                single.project(1)
                with torch.no_grad():
                    target.parameter.add_(0.01)
                single.project(2)
            found.append([m.weight.detach() for m in layers])
            continue
        projector = Projector(targets, Ball(**SHARED[name]), freeze_zero_groups=frozen, zeros_only=zeros_only)
        projector.remember_first_norms()
        stacked = projector._of_equal_shapes(targets, 1.0)
        expected = [] if name == "fraction of the norm" else [4]  # radii of their own
        assert [len(equal) for equal, _ in stacked] == expected
        projector.project(1)
        with torch.no_grad():
            for target in targets:
                target.parameter.add_(0.01)
        projector.project(2)
        assert set(projector.last) == {"0", "1", "2", "3"}
        found.append([m.weight.detach() for m in layers])
    for alone, shared in zip(*found, strict=True):
        assert same_bits(alone, shared)


def test_not_a_number_in_one_of_them_leaves_that_one_alone():
    layers, targets = layers_of((6, 5), 3, (0,), torch.float32)
    layers[1].weight.data[2, 2] = math.nan
    before = layers[1].weight.detach().clone()
    projector = Projector(targets, Ball(target_sparsity=0.5), freeze_zero_groups=True)
    projector.project(1)
    assert same_bits(layers[1].weight.detach(), before)
    assert [int((layers[k].weight == 0).all(1).sum()) for k in (0, 2)] == [3, 3]
    with pytest.raises(ValueError, match="NaN or infinity"):
        projector.check_finite()


class Launches(TorchDispatchMode):
    """Count operations that are more than another view of some memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "detach" not in str(func)
        return func(*args, **(kwargs or {}))


def launches(shapes, ball, **how):
    layers = [nn.Linear(b, a) for a, b in shapes]
    targets = [Target(f"{k}", m, "weight", (0,), tuple(m.weight.shape)) for k, m in enumerate(layers)]
    projector = Projector(targets, ball, **how)
    projector.project(1)
    with Launches() as counted:
        projector.project(2)
    return counted.count


@pytest.mark.parametrize(
    ("ball", "most"), [(Ball(radius=1.0), 45), (Ball(target_sparsity=0.5), 75)], ids=["radius", "fraction"]
)
def test_parameters_of_one_shape_take_the_launches_of_two(ball, most):
    frozen = {"freeze_zero_groups": ball.target_sparsity is not None}
    two, ten = (launches([(8, 6)] * count, ball, **frozen) for count in (2, 10))
    assert ten == two <= most
    assert launches([(8, 6), (8, 5)] * 5, ball, **frozen) == 2 * two
    assert launches([(8, k) for k in range(2, 12)], ball, **frozen) > 3 * ten  # each of its own shape


def test_norms_are_looked_at_when_they_have_come(monkeypatch):
    passed = []

    class Mark:
        def __init__(self, device):
            """Of any device."""

        def is_passed(self):
            return bool(passed)

        def wait(self):
            assert passed, "nobody was to wait"

    monkeypatch.setattr(transfers, "Mark", Mark)
    layer = nn.Linear(4, 3)
    layer.weight.data[0, 0] = math.nan
    projector = Projector([Target("weight", layer, "weight", (0,), (3, 4))], Ball(radius=1.0))
    projector.project(1)
    projector.check_finite(wait=False)  # not there yet
    projector.check_finite(wait=False)
    passed.append(True)
    with pytest.raises(ValueError, match="NaN or infinity"):
        projector.check_finite(wait=False)
    projector.check_finite()  # said once


def test_a_look_is_seen():
    with pytest.raises(Exception, match="meta"):
        project_l1inf(torch.empty(8, 6, device="meta"), 1.0)
