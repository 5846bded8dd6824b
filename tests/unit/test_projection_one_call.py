"""What machine code does of a projection in one call, and its sums, equal eager operations bit for bit."""

import math
import warnings

import pytest
import torch

from lightning_accel.projection import project_l1inf, radius_for_sparsity
from lightning_accel.projection.kernels import compiled, one_call, ordered_sums
from lightning_accel.projection.kernels.compiled import compiling
from lightning_accel.projection.kernels.eager import excess, quick_group_norms
from lightning_accel.projection.kernels.layout import dense_blocks, dense_order

SHAPES = [
    ((784, 30), (0,)),
    ((784, 30), (1,)),
    ((64, 3, 7, 7), (0,)),
    ((64, 3, 7, 7), (1,)),
    ((3, 12, 8, 20), (1,)),
    ((51, 5, 3, 3), (2, 3)),
    ((10, 64), (0,)),
    ((7, 1), (0,)),
    ((1, 7), (0,)),
    ((5, 4, 3), (0, 1)),
]


def made(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(x):
    return x.contiguous().view(torch.int32)


@pytest.fixture
def code():
    """Load machine code, as a process that has compiled has."""
    project_l1inf(torch.ones(2, 2), 1.0, compile=True)
    assert torch.float32 in compiled._loaded, "these tests need a C compiler"


@pytest.fixture
def calls(code, monkeypatch):
    """Return what `project_in_one_call` is asked and answers; `None` stands for the longer way."""
    seen, project = [], one_call.project_in_one_call

    def watched(*given):
        seen.append(project(*given))
        return seen[-1]

    monkeypatch.setattr("lightning_accel.projection.multilevel.project_in_one_call", watched)
    return seen


@pytest.mark.parametrize(("shape", "dims"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 1e-9, 0.1, 0.5, 0.999])
def test_one_call_finds_what_many_operations_do(calls, shape, dims, share):
    for seed in range(4):
        x = made(shape, seed)
        if seed == 3:
            x = (2.0 * x).round() / 2.0 + 0.0  # ties, and no -0.0
        rest = [d for d in range(x.ndim) if d not in dims]
        radius = share * float(x.double().abs().amax(rest).sum())
        expected = project_l1inf(x, radius, dims, compile=False)
        calls.clear()
        for out in (None, x.clone()):
            source = x if out is None else out
            found = project_l1inf(source, radius, dims, out=out, compile=True)
            assert calls.pop() is found
            assert torch.equal(bits(found), bits(expected))
        again = project_l1inf(found, radius, list(dims))
        assert calls.pop() is again
        assert torch.equal(bits(again), bits(expected))
        assert math.fsum(found.double().abs().amax(rest).flatten().tolist()) <= radius


@pytest.mark.parametrize("groups", [1, 7, 300, 5_003])
def test_at_the_border_of_the_ball_the_longer_way_decides(calls, groups):
    x = made((groups, 9))
    norm = float(x.abs().amax(1).double().sum())
    for radius, decided in (
        (norm, False),
        (math.nextafter(norm, 0.0), False),
        (norm * (1.0 + 1e-11), True),
        (norm * (1.0 - 1e-11), True),
    ):
        expected = project_l1inf(x, radius, compile=False)
        calls.clear()
        assert torch.equal(bits(project_l1inf(x, radius, compile=True)), bits(expected))
        assert [c is not None for c in calls] == [decided]
        assert torch.equal(expected, x) == (radius >= norm)


@pytest.mark.parametrize("dims", [(0,), (1,), (2, 3)])
@pytest.mark.parametrize("layout", ["channels last", "transposed", "part of a larger tensor"])
def test_other_layouts_end_the_same_in_one_call_or_in_many(calls, dims, layout):
    whole = made((6, 8, 5, 3))
    x = {
        "channels last": whole.to(memory_format=torch.channels_last),
        "transposed": whole.transpose(0, 1),
        "part of a larger tensor": whole[:, 1:6],
    }[layout]
    radius = radius_for_sparsity(x, 0.5, dims)
    expected = project_l1inf(x.contiguous(), radius, dims, compile=False)
    found = project_l1inf(x, radius, dims, compile=True)
    assert torch.equal(found, expected)
    assert (calls[-1] is None) == (dense_blocks(x, dims) is None)
    assert found.stride() == project_l1inf(x, radius, dims, compile=False).stride()
    project_l1inf(x, radius, dims, out=x, compile=True)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_takes_the_longer_way_and_nothing_is_written(calls, wrong):
    x = made((6, 40))
    x[2, 3] = wrong
    before, version = x.clone(), x._version
    with pytest.raises(ValueError, match="`x` holds NaN or infinity"):
        project_l1inf(x, 1.0, out=x)
    assert project_l1inf(x, 1.0, out=x, nonfinite="skip") is x
    assert torch.equal(bits(project_l1inf(x, 1.0, nonfinite="skip")), bits(before))
    assert torch.equal(bits(x), bits(before))
    assert x._version == version
    assert calls == [None] * 3


def test_wrong_arguments_are_refused_as_ever(calls):
    x = made((4, 5))
    for error, match, how in (
        (ValueError, "`radius` must be >= 0", {"radius": -1.0}),
        (ValueError, "`radius` must be >= 0", {"radius": math.nan}),
        (ValueError, "`group_dims` must be dimensions", {"group_dims": (2,)}),
        (ValueError, "must not name a dimension twice", {"group_dims": (0, -2)}),
        (ValueError, "`nonfinite` must be", {"nonfinite": "never"}),
        (ValueError, "`compile` must be", {"compile": "always"}),
        (ValueError, "`method` must be", {"method": "quick"}),
        (ValueError, "`out` must be like `x`", {"out": made((5, 4))}),
        (ValueError, "expanded view", {"x": x[:1].expand(4, 5), "out": x[:1].expand(4, 5)}),
        (TypeError, "`x` must be a float16", {"x": x.int()}),
        (TypeError, "`x` must be a float16", {"x": [1.0]}),
    ):
        with pytest.raises(error, match=match):
            project_l1inf(**({"x": x, "radius": 1.0} | how))


def test_what_lies_in_the_ball_is_left_alone_and_a_new_tensor_gets_it(calls):
    x = torch.nn.Parameter(made((4, 5)))
    loss = (x**2).sum()
    assert project_l1inf(x, math.inf, out=x) is x
    assert project_l1inf(x, 100, out=x) is x  # an integer is a number as well
    new = project_l1inf(x, 100.0)
    assert torch.equal(new, x)
    assert new.data_ptr() != x.data_ptr()
    assert not new.requires_grad
    loss.backward()  # nothing was written
    assert [c is None for c in calls] == [False] * 3


def test_empty_tensors_and_single_numbers(calls):
    for shape, dims in (((0, 3), (0,)), ((3, 0), (0,)), ((), ()), ((1,), (0,))):
        x = torch.ones(shape)
        assert torch.equal(project_l1inf(x, 0.5, dims, compile=True), project_l1inf(x, 0.5, dims, compile=False))


def test_orders_of_memory_are_those_of_views():
    x = made((4, 6, 5, 3))
    for y in (x, x.transpose(0, 2), x.permute(3, 1, 0, 2), x[:, :1], x[:, 2:3], x[:1].expand(4, 6, 5, 3)):
        for dims in ((0,), (1,), (3,), (0, 1), (2, 3), (0, 2)):
            blocks, found = dense_blocks(y, dims), dense_order(y.shape, y.stride(), dims)
            if found is None:
                assert blocks is None
                continue
            assert blocks is not None
            assert tuple(blocks.shape) == found[1]
            assert blocks.is_contiguous()
            groups = y.movedim(dims, tuple(range(len(dims)))).abs().flatten(len(dims)).amax(-1).flatten()
            assert torch.equal(blocks.abs().amax((0, 2)), groups)


def test_small_tensors_compile_once_enough_calls_were_made(monkeypatch):
    for name, value in (("_broken", []), ("_loaded", {}), ("_seen", dict.fromkeys(compiled._seen, 0))):
        monkeypatch.setattr(compiled, name, value)
    monkeypatch.setattr(compiled, "_WORTH", 20 * compiled._CALL)
    x, calls = made((3, 4)), 0
    while not compiled._loaded and calls < 20:
        project_l1inf(x, 1.0, out=x)
        x.add_(1.0)
        calls += 1
    assert calls == 10, "two passes each"


LAYOUTS = {
    "long runs": (1, 9, 3_000),
    "runs of whole pieces": (1, 20, 2_048),
    "runs in parts": (3, 7, 1_500),
    "columns": (300, 700, 1),
    "columns of few rows": (5, 40_000, 1),
    "narrow": (20_003, 9, 1),
    "in-channels": (90, 60, 49),
    "wide": (37, 17_000, 1),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_are_those_of_eager_operations_bit_for_bit(code, name, threads, monkeypatch):
    monkeypatch.setattr(compiled, "_ALONE", 1)
    x = made(LAYOUTS[name])
    some = torch.arange(x.shape[1])[:: 2 if x.shape[1] < 1_000 else 3]
    mu = torch.rand(len(some), generator=torch.Generator().manual_seed(1)).double().float().double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for compile in (True, False):
            with compiling(compile):
                found.append((*quick_group_norms(x), *excess(x, some, mu)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    largest, total, above, count = found[0]
    over = (x.double().abs()[:, some] - mu.view(1, -1, 1)).clamp_min(0.0)
    assert torch.equal(largest, x.double().abs().amax((0, 2)))
    torch.testing.assert_close(total, x.double().abs().sum((0, 2)), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(above, over.sum((0, 2)), rtol=1e-5, atol=1e-5)
    assert torch.equal(count, (over > 0.0).sum((0, 2)).double())


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_units_of_any_height_add_up_by_halves(code, rows, wide):
    x = made((rows, 70))
    levels = torch.full((70,), 0.3, dtype=wide)
    expected = torch.zeros(70, dtype=torch.float64)
    for unit in (x.abs().to(wide) - levels).clamp_min(0.0).split(16):
        parts = [*unit, *torch.zeros(16 - len(unit), 70, dtype=wide)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [a + b for a, b in zip(parts[:half], parts[half:], strict=True)]
        expected += parts[0]
    for compile in (True, False):
        with compiling(compile):
            assert torch.equal(ordered_sums.column_sums(x, levels, wide)[0], expected)


@pytest.mark.parametrize("name", ["long runs", "columns"])
def test_sums_show_nan_and_infinity_in_both(code, name):
    for wrong in (math.nan, math.inf):
        x = made(LAYOUTS[name])
        x[-1, 4, -1] = wrong
        for compile in (True, False):
            with compiling(compile):
                for found in quick_group_norms(x):
                    assert torch.isfinite(found).logical_not().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("dim", [0, 1])
def test_exact_projections_step_by_step_equal_eager_ones(code, sparsity, dim):
    from lightning_accel.projection import ExactState

    states = ExactState(), ExactState()
    x = made((400, 1_200))
    radius = radius_for_sparsity(x, sparsity, (dim,), "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            y = x + 0.01 * made(x.shape, step)
            found = [
                project_l1inf(y, radius, (dim,), "exact", state=state, compile=compile)
                for state, compile in zip(states, (True, False), strict=True)
            ]
            assert torch.equal(bits(found[0]), bits(found[1]))
            assert states[0].mu is not None
            assert torch.equal(states[0].mu, states[1].mu)
            assert states[0].iterations == states[1].iterations
