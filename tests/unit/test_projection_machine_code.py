"""Passes as machine code: the bits of the eager ones, kept between processes, and nothing lost without a compiler."""

import math
import warnings

import pytest
import torch

from lightning_accel import machine_code as compiler
from lightning_accel.projection import machine_code, project_l1inf, radius_for_sparsity
from lightning_accel.projection.joint import Team, cut, cut_alone
from lightning_accel.projection.machine_code import compiling
from lightning_accel.projection.projector import Ball, Projector
from lightning_accel.projection.pyramid import MaxPyramid
from lightning_accel.projection.targets import find_targets
from lightning_accel.projection.thresholds import single_threshold

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def forgetful(monkeypatch, tmp_path):
    """A machine with an empty cache folder, on which nothing was compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (machine_code.refusal, machine_code._library, machine_code._warn)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "lightning_accel"
    for cache in caches:
        cache.cache_clear()


def test_this_machine_has_machine_code():
    assert machine_code.refusal() is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_projections_are_those_of_eager_passes(dtype, dims, threads):
    x = tensor(70, 30, 110, dtype=dtype)
    radius = radius_for_sparsity(x, 0.5, dims)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = project_l1inf(x, radius, dims, compile=False)
        assert torch.equal(project_l1inf(x, radius, dims), expected)
        assert torch.equal(project_l1inf(x, radius, dims, out=x), expected)
        assert torch.equal(project_l1inf(x, radius, dims), expected)
    finally:
        torch.set_num_threads(before)


def test_entries_within_keep_their_bits_and_cleared_rows_are_zero():
    x = tensor(4, 40_000)
    x[0] *= 1e-3
    x[1, ::2] = -0.0
    y = project_l1inf(x, radius_for_sparsity(x, 0.25), compile=True)
    assert not y[0].view(torch.int32).any()
    within = y[1:] == x[1:]
    assert torch.equal(y[1:].view(torch.int32)[within], x[1:].view(torch.int32)[within])
    assert torch.equal(y[1:].signbit(), x[1:].signbit())


def test_writing_in_place_is_told_to_autograd():
    x = tensor(300, 300)
    before = x._version
    project_l1inf(x, 1.0, out=x)
    assert x._version > before
    with torch.inference_mode():
        y = tensor(300, 300)
        project_l1inf(y, 1.0, out=y)
    assert torch.equal(x, y)


def test_what_is_not_plain_memory_takes_the_eager_passes():
    negative = torch.view_as_complex(tensor(300, 300, 2)).conj().imag
    assert negative.is_neg()
    with compiling(True):
        assert not machine_code.wanted(negative)
        assert not machine_code.wanted(torch.empty(0))
        assert not machine_code.wanted(torch.empty(300, 300, device="meta"))
        assert not machine_code.wanted(tensor(300, 300).t())
    assert torch.equal(project_l1inf(negative, 1.0), project_l1inf(negative.clone(), 1.0))


def test_automatic_means_large_tensors_and_asking_means_all():
    small, large = tensor(2, 3), tensor(300, 300)
    assert not machine_code.wanted(small)
    assert machine_code.wanted(large)
    with compiling(True):
        assert machine_code.wanted(small)
    with compiling(False):
        assert not machine_code.wanted(large)
    with pytest.raises(ValueError, match="`compile` must be 'auto', True or False, got 'yes'"):
        project_l1inf(small, 1.0, compile="yes")


@pytest.mark.parametrize("groups", [1, 2, 7, 100, 6_000])
@pytest.mark.parametrize("part", [0.0, 1e-12, 1e-3, 0.3, 0.999999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "tied", "scaled"])
def test_thresholds_are_those_of_python(groups, part, kind):
    norms = tensor(groups, dtype=torch.float64).abs()
    if kind == "tied":
        norms = norms.mul(3).round()
    if kind == "scaled":
        norms *= 10.0 ** torch.linspace(-150, 150, groups, dtype=torch.float64)
    radius = part * float(norms.sum())
    found, expected = machine_code.threshold(norms, radius, groups), single_threshold(norms, radius, groups)
    # what is left is a difference to the largest norm: off by roundings of the radius, not of the norms
    torch.testing.assert_close(found.bounds, expected.bounds, rtol=0.0, atol=1e-12 * radius + 1e-15 * found.tau)
    assert found.tau == pytest.approx(float(expected.tau), rel=1e-12, abs=1e-12 * radius)
    if math.isfinite(float(found.bounds[0])):
        assert math.fsum(found.bounds.tolist()) <= radius


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_that_are_not_finite_leave_everything(value):
    norms = torch.tensor([1.0, value, 2.0], dtype=torch.float64)
    found = machine_code.threshold(norms, 1.0, 3)
    assert not math.isfinite(found.norm)
    assert torch.isinf(found.bounds).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(100, 1000), (1000, 100), (6, 5, 3, 3), (1, 9), (9, 1)])
@pytest.mark.parametrize("dim", [0, 1])
def test_one_call_does_all_of_a_projection(dtype, shape, dim):
    x = tensor(*shape, dtype=dtype)
    radius = 0.3 * float(x.double().abs().amax([d for d in range(x.ndim) if d != dim]).sum())
    one, steps, eager = x.clone(), x.clone(), x.clone()
    part = MaxPyramid(one, (dim,), one)
    found = cut_alone(part, radius, machine=True)
    # shards find their threshold from the norms that they share, and the bits must be the same
    (other,) = cut(
        [Team([MaxPyramid(steps, (dim,), steps)], lambda _: torch.tensor([radius], dtype=torch.float64), machine=True)]
    )
    assert part.whole is not None
    assert torch.equal(one, steps)
    assert torch.equal(found.bounds, other.bounds[0])
    assert found.tau == float(other.tau)
    cut_alone(MaxPyramid(eager, (dim,), eager), radius)
    torch.testing.assert_close(one, eager, rtol=4 * torch.finfo(dtype).eps, atol=1e-12)
    norms = one.double().abs().amax([d for d in range(x.ndim) if d != dim])
    assert math.fsum(norms.flatten().tolist()) <= radius
    again = one.clone()
    cut_alone(MaxPyramid(again, (dim,), again), radius, machine=True)
    assert torch.equal(again, one)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [{"radius": 1.0}, {"target_sparsity": 0.5}])
def test_a_weight_that_is_not_finite_raises_or_stays(value, size):
    model = torch.nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        model.weight[1, 2] = value
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        Projector(find_targets(model), Ball(**size)).project(1)
    Projector(find_targets(model), Ball(**size, nonfinite="skip")).project(1)
    assert torch.equal(model.weight.detach().view(torch.int32), before.view(torch.int32))


def test_a_graph_that_saved_a_weight_notices_its_projection():
    model = torch.nn.Linear(5, 4, bias=False)
    loss = model.weight.square().sum()
    Projector(find_targets(model), Ball(radius=0.5)).project(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_found_stays_when_the_next_step_is_projected():
    model = torch.nn.Linear(5, 4, bias=False)
    projector = Projector(find_targets(model), Ball(radius=0.5))
    projector.project(1)
    first = projector.last["weight"]
    bounds = first.bounds[0].clone()
    with torch.no_grad():
        model.weight.copy_(tensor(4, 5))
    projector.project(2)
    assert torch.equal(first.bounds[0], bounds)
    assert not torch.equal(projector.last["weight"].bounds[0], bounds)


def test_without_a_compiler_there_is_one_warning_and_the_same_result(forgetful, monkeypatch):
    x = tensor(300, 300)
    expected = {m: project_l1inf(x, 9.0, method=m, compile=False) for m in ("bilevel", "exact")}
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    assert torch.equal(project_l1inf(x, 9.0), expected["bilevel"])  # nobody asked, nobody is warned
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for method in ("bilevel", "exact", "bilevel"):
            assert torch.equal(project_l1inf(x, 9.0, method=method, compile=True), expected[method])
    assert [str(w.message)[:67] for w in caught] == [
        "Projections go on without machine code: there is no C compiler. Inst"[:67]
    ]
    model = torch.nn.Linear(5, 4, bias=False)
    Projector(find_targets(model), Ball(radius=0.5)).project(1)
    assert float(model.weight.detach().double().abs().amax(1).sum()) <= 0.5


def test_results_that_differ_from_torch_are_not_used(forgetful, monkeypatch):
    # a compiler that takes the sign bit for a part of the magnitude
    monkeypatch.setattr(machine_code, "text", lambda: REAL_TEXT().replace("& MASK)", "& -1)"))
    with pytest.warns(RuntimeWarning, match="its results are not those of torch"):
        project_l1inf(tensor(30, 30), 1.0, compile=True)


REAL_TEXT = machine_code.text


def test_machine_code_is_kept_for_the_next_process(forgetful, monkeypatch):
    assert machine_code.refusal() is None
    kept = list(forgetful.glob("*.so"))
    assert len(kept) == 1
    assert list(forgetful.iterdir()) == kept
    machine_code._library.cache_clear()
    monkeypatch.setattr(compiler, "_compiled", lambda *_: pytest.fail("compiled again"))
    machine_code._library()


def test_a_spoilt_cache_is_made_anew_and_a_shared_folder_is_not_trusted(forgetful):
    text = "int three(void) { return 3; }"
    compiler.load(text, keep=True)
    (kept,) = forgetful.glob("*.so")
    kept.unlink()
    kept.write_bytes(b"cut short")
    assert compiler.load(text, keep=True).three() == 3
    kept.unlink()
    forgetful.chmod(0o777)
    assert compiler.load(text, keep=True).three() == 3
    assert list(forgetful.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.load("int four(void) { return 4; }", keep=True).four() == 4


def test_a_cache_folder_that_is_full_says_so(forgetful, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(compiler.os, "replace", full)
    with pytest.raises(compiler.CannotCompileError, match="cannot be written: no space left"):
        compiler.load("int five(void) { return 5; }", keep=True)
