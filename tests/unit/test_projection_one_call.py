"""A projection in one compiled call finds what the passes find, or changes nothing and lets them do it."""

import copy
import math
import warnings

import pytest
import torch

from lightning_accel.projection import compiled, one_call, project_l1inf
from lightning_accel.projection.budget import Ball
from lightning_accel.projection.joint import cut_alone
from lightning_accel.projection.one_call import OneCall
from lightning_accel.projection.projector import Projector
from lightning_accel.projection.pyramid import MaxPyramid
from lightning_accel.projection.ramp import Ramp
from lightning_accel.projection.targets import find_targets

SHAPES = {
    "rows": ((60, 100), (0,)),
    "columns": ((100, 60), (1,)),
    "tall columns": ((463, 36), (1,)),
    "out-channels": ((32, 16, 3, 3), (0,)),
    "in-channels": ((32, 16, 3, 3), (1,)),
    "one row": ((1, 64), (0,)),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
UNIT = {torch.float32: 2.0**-23, torch.float64: 1e-13, torch.bfloat16: 2.0**-7}


@pytest.fixture
def calls(monkeypatch):
    """What each run of a graph took off: less than 0 where another has to go on, NaN where it is left to others."""
    found, graph = [], one_call._graph

    def watched(shape):
        run = graph(shape)

        def watch(tensors):
            results = run(tensors)
            found.append(tensors[-1][3].item())
            return results

        return watch

    watched.__wrapped__ = graph
    monkeypatch.setattr(one_call, "_graph", watched)
    return found


def norm(x, dims):
    return x.double().abs().amax([d for d in range(x.ndim) if d not in dims]).sum().item()


def cases():
    """Each compiles for seconds; the fast ones are the two whose steps differ most."""
    for name in SHAPES:
        for dtype in DTYPES:
            fast = (name, dtype) in (("columns", torch.float32), ("in-channels", torch.bfloat16))
            yield pytest.param(name, dtype, marks=() if fast else pytest.mark.slow, id=f"{name} {dtype}")


@pytest.mark.parametrize(("name", "dtype"), [*cases()])
def test_it_is_the_projection(name, dtype, calls):
    shape, dims = SHAPES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for share in (0.02, 0.6, 0.97):
        radius = share * norm(x, dims)
        expected = project_l1inf(x, radius, dims, compile=False)
        new = project_l1inf(x, radius, dims, compile=True)
        inside = x.clone()
        assert project_l1inf(inside, radius, dims, out=inside, compile=True) is inside
        assert torch.equal(inside, new)
        assert norm(new, dims) <= radius
        again = project_l1inf(new, radius, dims, compile=True)
        assert torch.equal(again, new)
        off = (new.double() - expected.double()).abs().max().item()
        assert off <= UNIT[dtype] * x.double().abs().max().item()
        assert not torch.signbit(new[new == 0.0]).any()
    assert (
        sum(tau > 0.0 for tau in calls) >= 4
    )  # at the smallest radius it may be more than the radius that is taken off


def test_inside_the_ball_nothing_changes(calls):
    x = torch.randn(40, 40)
    radius = norm(x, (0,))
    for size in (radius, 2.0 * radius, float("inf")):
        assert torch.equal(project_l1inf(x, size, compile=True), x)
    assert calls[1] == 0.0
    assert not any(tau > 0.0 for tau in calls)
    assert len(calls) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_and_is_reported(bad, calls):
    x = torch.randn(40, 40)
    x[3, 5] = bad
    before = x.clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        project_l1inf(x, 1.0, out=x, compile=True)
    assert torch.equal(x, before) or (x.isnan() == before.isnan()).all()
    project_l1inf(x, 1.0, out=x, compile=True, nonfinite="skip")
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    assert len(calls) == 2
    assert all(math.isnan(tau) for tau in calls)


def test_a_start_far_off_and_a_radius_of_nothing_go_the_longer_way():
    x = torch.randn(50, 80)
    expected = project_l1inf(x, 1e-6, compile=False)
    assert torch.equal(project_l1inf(x, 1e-6, compile=True), expected)
    assert not project_l1inf(x, 0.0, compile=True).any()
    y = x.clone()
    with compiled.compiling(True), torch.no_grad():
        found = cut_alone(MaxPyramid(y, (0,), y), 20.0, start=1e9)
    assert found.tau == pytest.approx(cut_alone(MaxPyramid(x, (0,), x), 20.0).tau)
    assert torch.equal(y, x)


def test_training_starts_where_the_last_step_ended(calls):
    torch.manual_seed(0)
    model = torch.nn.Linear(80, 60)
    plain = torch.nn.Linear(80, 60)
    plain.load_state_dict(model.state_dict())
    projectors = [Projector(find_targets(m), Ball(radius=3.0), compile=c) for m, c in ((model, True), (plain, False))]
    for step in range(1, 6):
        noise = 0.01 * torch.randn(60, 80)
        for m, projector in zip((model, plain), projectors, strict=True):
            with torch.no_grad():
                m.weight.add_(noise)
            projector.project(step)
        assert torch.allclose(model.weight, plain.weight, rtol=0.0, atol=1e-6)
        assert norm(model.weight.detach(), (0,)) <= 3.0
    assert len(calls) == 4  # the first time there is nowhere to start
    assert all(tau > 0.0 for tau in calls)
    last, expected = (projector.last["weight"] for projector in projectors)
    assert last.tau == calls[-1] == pytest.approx(expected.tau)
    assert last.norm == pytest.approx(expected.norm)
    assert torch.allclose(last.bounds[0], expected.bounds[0], rtol=0.0, atol=1e-9)


def test_another_call_goes_on_where_one_does_not_suffice(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 80, generator=generator) * torch.rand(80, generator=generator) ** 8.0
    radius = 0.5 * norm(x, (1,))
    expected = project_l1inf(x, radius, (1,), compile=False)
    runs, graph = [], one_call._graph

    def counted(shape):
        run = graph(shape)
        return lambda tensors: runs.append(1) or run(tensors)

    monkeypatch.setattr(one_call, "_FROM_NOWHERE", 3)
    monkeypatch.setattr(one_call, "_graph", counted)
    y = x.view(60, 80, 1).clone()
    call = OneCall(y, y)
    assert call(radius, 0.0)
    assert len(runs) > 1
    assert norm(y[:, :, 0], (1,)) <= radius
    assert torch.allclose(y[:, :, 0], expected, rtol=0.0, atol=1e-6)


def test_a_copy_projects_the_copied_tensor():
    x = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(0))
    call = OneCall(x, x)
    other = copy.deepcopy(call)
    before = x.clone()
    assert other(5.0, 0.0)
    assert torch.equal(x, before)
    assert call(5.0, 0.0)
    assert call.tau == other.tau


def test_a_step_that_needs_more_care_is_taken_eagerly_and_compiles_nothing_more(calls):
    torch.manual_seed(0)
    model = torch.nn.Linear(80, 60)
    targets = find_targets(model)
    projector = Projector(targets, Ball(radius=3.0), compile=True)

    def steps(numbers, size=1.0):
        for number in numbers:
            model.weight.data.copy_(size * (model.weight.detach() + 0.01 * torch.randn(60, 80)))
            projector.project(number, targets)
            assert norm(model.weight.detach(), (0,)) == pytest.approx(3.0, rel=1e-4)

    steps(range(1, 5))
    graphs = one_call._graph.__wrapped__.cache_info().currsize
    steps([5], size=50.0)  # the threshold is far away
    assert math.isnan(calls[-1])
    steps([6], size=1.0)  # and now the start is
    steps(range(7, 12))
    assert sum(tau > 0.0 for tau in calls) >= 5
    assert calls[-1] > 0.0
    assert one_call._graph.__wrapped__.cache_info().currsize == graphs


def test_what_has_changed_since_the_last_step_is_noticed(calls):
    """A tensor in another place, another parameter, a restored state, an earlier step: all of them are projected."""
    torch.manual_seed(0)
    model = torch.nn.Linear(80, 60)
    targets = find_targets(model)
    projector = Projector(targets, Ball(radius=3.0), Ramp("linear", 1, 4), compile=True)
    projector.remember_first_norms()
    state = projector.state_dict()

    def moved():
        return model.weight.detach() + 0.01 * torch.randn(60, 80)

    def step(number, radius=3.0):
        projector.project(number, targets)
        assert norm(model.weight.detach(), (0,)) == pytest.approx(radius, rel=1e-4)
        assert projector.last["weight"].tau > 0.0

    for number in range(4, 10):
        model.weight.data.copy_(moved())
        step(number)
    assert sum(tau > 0.0 for tau in calls) >= 3
    model.weight.data = moved()  # elsewhere
    step(10)
    model.weight = torch.nn.Parameter(moved())
    step(11)
    model.weight.data = moved().t().contiguous().t()
    step(12)
    projector.load_state_dict(state)
    model.weight.data.copy_(moved())
    step(13)
    first = projector.memories["weight"].first_norm
    model.weight.data.mul_(20.0)
    step(3, 3.0 + (first - 3.0) / 3.0)  # the ramp is not at its end


def test_only_who_asks_gets_it(calls):
    x = torch.randn(40, 40)
    project_l1inf(x, 1.0)
    project_l1inf(x, 1.0, compile=False)
    project_l1inf(x.half(), 1.0, compile=True)  # its thresholds need more care
    project_l1inf(x.bfloat16()[:, 1:], 1.0, compile=True)  # rows of 39 make no pairs
    assert not calls


def test_without_a_compiler_it_goes_on_without(monkeypatch):
    monkeypatch.setattr(compiled, "_broken", [])

    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(one_call, "_graph", fails)
    x = torch.randn(40, 40)
    expected = project_l1inf(x, 1.0, compile=False)
    with pytest.warns(RuntimeWarning, match="no compiler"):
        found = project_l1inf(x, 1.0, compile=True)
    assert torch.equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project_l1inf(x, 1.0, compile=True)
