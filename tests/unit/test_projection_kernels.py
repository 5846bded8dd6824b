"""Chunked passes equal the plain expressions on tensors of many chunks, in every layout they tell apart."""

import ctypes
import threading
import warnings
from pathlib import Path

import pytest
import torch

from lightning_accel.machine import toolchain
from lightning_accel.machine.openmp import team_of_torch
from lightning_accel.projection import ExactState, project_l1inf, radius_for_sparsity
from lightning_accel.projection.balls.all_at_once import AllAtOnce
from lightning_accel.projection.balls.floor import Floor
from lightning_accel.projection.balls.newton import solve_tangents
from lightning_accel.projection.balls.norm_pyramid import MaxPyramid
from lightning_accel.projection.balls.shared_radius import clear_alone, cut_alone
from lightning_accel.projection.kernels import compiled
from lightning_accel.projection.kernels.compiled import compiling
from lightning_accel.projection.kernels.eager import clamp, excess, group_max, group_norms
from lightning_accel.projection.kernels.rounding import round_bound

SHAPES = {
    "rows": (1, 40, 9_000),
    "short rows": (1, 30_000, 9),
    "columns": (700, 500, 1),
    "in-channels": (60, 50, 90),
    "few": (3, 4, 1),
    "runs": (3, 12, 700),
    "narrow": (5_003, 9, 1),
    "narrow channels": (2_001, 3, 7),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_largest_magnitudes_are_exact_and_show_nan(name, dtype):
    x = tensor(SHAPES[name], dtype)
    assert torch.equal(group_max(x), x.abs().amax((0, 2)))
    x[-1, 2, -1] = float("nan")
    found = torch.isnan(group_max(x))
    assert found.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_norms_are_those_of_float64_sums(name, dtype):
    x = tensor(SHAPES[name], dtype)
    largest, total = group_norms(x)
    assert torch.equal(largest, x.double().abs().amax((0, 2)))
    torch.testing.assert_close(total, x.double().abs().sum((0, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cleared", [0.3, 0.9])
@pytest.mark.parametrize("in_place", [True, False])
def test_clamping_equals_the_plain_clamp_bit_for_bit(name, dtype, cleared, in_place):
    x = tensor(SHAPES[name], dtype)
    groups = x.shape[1]
    bounds = torch.rand(groups, generator=torch.Generator().manual_seed(1)).to(dtype)
    bounds[: int(cleared * groups)] = 0.0
    bounds[-1] = float("inf")
    expected = torch.clamp(x, -bounds.view(1, -1, 1), bounds.view(1, -1, 1))
    target = x if in_place else torch.empty_like(x)
    clamp(x, bounds, target)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_known_to_be_normal_round_to_the_same(dtype):
    bounds = torch.tensor([0.0, 1e-3, 1.0 / 3.0, 1.0, 1e4, float("inf")], dtype=torch.float64)
    rounded = round_bound(bounds, dtype, normal=True)
    assert torch.equal(rounded, round_bound(bounds, dtype))
    assert bool((rounded.double() <= bounds).all())
    if dtype in (torch.float32, torch.bfloat16):
        small = torch.tensor([1e-39], dtype=torch.float64)
        assert [float(round_bound(small, dtype, normal=n) > 0) for n in (False, True)] == [0.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_bounds_leave_nan_and_negative_zero_alone(dtype):
    for shape in ((1, 2, 5_000), (5_000, 2, 1)):
        x = tensor(shape, dtype)
        x[0, 0, 0], x[-1, 1, -1] = float("nan"), -0.0
        before = x.clone()
        clamp(x, torch.full((2,), float("inf"), dtype=dtype), x)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        number = ~torch.isnan(before)
        assert torch.equal(torch.isnan(x), ~number)
        assert torch.equal(x[number].view(bits), before[number].view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("precise", [True, False])
def test_excess_over_a_level_for_some_groups(name, dtype, share, precise):
    x = tensor(SHAPES[name], dtype)
    groups = torch.arange(x.shape[1])[: max(1, int(share * x.shape[1]))]
    mu = torch.rand(len(groups), generator=torch.Generator().manual_seed(1)).double()
    sums, counts = excess(x, groups, mu, precise=precise)
    above = (x.double().abs()[:, groups] - mu.view(1, -1, 1)).clamp_min(0.0)
    torch.testing.assert_close(sums, above.sum((0, 2)), rtol=1e-5, atol=1e-5)
    if precise:
        assert torch.equal(counts, (above > 0).sum((0, 2)).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_two_threads_do_what_one_does(name, dtype):
    x = tensor(SHAPES[name], dtype)
    bounds = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.clamp(x, -bounds.view(1, -1, 1), bounds.view(1, -1, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(group_max(x), x.abs().amax((0, 2)))
        clamp(x, bounds, x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(x, expected)


def test_machine_code_runs_on_the_threads_that_torch_computes_with():
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libgomp" not in maps.read_text(encoding="utf-8"):
        assert team_of_torch() is None
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel = ctypes.CFUNCTYPE(None, kind, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(team_of_torch())
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.randn(2_000, 2_000).mul_(2.0)
        threads, seen = {task.name for task in Path("/proc/self/task").iterdir()}, set()
        meet = threading.Barrier(3)  # or one thread might do the work of all

        @kind
        def work(_):
            meet.wait(timeout=60)
            seen.add(str(threading.get_native_id()))

        parallel(work, None, 3, 0)
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 3
    assert seen <= threads, "threads of its own would share cores with those of torch"


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.fixture
def forget_compiling(monkeypatch):
    """Begin as a process that has compiled nothing, and in which nothing has passed."""
    monkeypatch.setattr(compiled, "_broken", [])
    monkeypatch.setattr(compiled, "_loaded", {})
    monkeypatch.setattr(compiled, "_seen", dict.fromkeys(compiled._seen, 0))


COMPILED = {
    "rows": (1, 40, 900),
    "odd rows": (1, 41, 901),
    "short rows": (1, 300, 9),
    "columns": (70, 50, 1),
    "odd columns": (71, 51, 1),
    "in-channels": (60, 11, 6),
    "few": (3, 4, 1),
    "runs": (3, 12, 70),
    "narrow": (1_003, 9, 1),
    "narrower": (701, 3, 2),
}


@pytest.mark.parametrize(("threads", "team"), [(1, "torch's"), (2, "torch's"), (5, "torch's"), (2, "its own")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_finds_and_clamps_what_eager_passes_do_bit_for_bit(
    dtype, threads, team, monkeypatch, forget_compiling
):
    monkeypatch.setattr(compiled, "_ALONE", 1)  # threads for small tensors as well
    if team == "its own":
        monkeypatch.setattr(compiled, "team_of_torch", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in COMPILED.values():
            x = tensor(shape, dtype)
            x.view(-1)[:3] = torch.tensor([-0.0, 0.0, 1e-7])
            bounds = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            bounds[1::3], bounds[0] = 0.0, 3.0
            with compiling(False):
                expected = torch.empty_like(x)
                clamp(x, bounds, expected)
            with compiling(True):
                assert torch.equal(compiled.largest(x), x.abs().amax((0, 2)))
                for target in (torch.empty_like(x), x):
                    version = target._version
                    assert compiled.clamp(x, bounds, target)
                    assert torch.equal(bits(target), bits(expected))
                    assert target._version > version  # graphs that saved it must notice
                x[-1, 2, -1] = float("nan")
                assert torch.isnan(compiled.largest(x)).nonzero().flatten().tolist() == [2]
                copy = x.clone()
                assert compiled.clamp(x, torch.full_like(bounds, float("inf")), x)
                assert torch.equal(bits(copy), bits(x)), "infinite bounds leave NaN alone"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiled_projections_equal_eager_ones_bit_for_bit(dtype):
    x = torch.randn(207, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :3] = torch.tensor([-0.0, 0.0, 1e-30])
    for dims in ((0,), (1,)):
        radius = radius_for_sparsity(x, 0.5, dims)
        same = project_l1inf(x, radius, dims, compile=True)
        assert torch.equal(bits(same), bits(project_l1inf(x, radius, dims, compile=False)))
        assert torch.equal(bits(project_l1inf(same, radius, dims, compile=True)), bits(same))
        for sparsity in (0.5, 0.9):
            radius = radius_for_sparsity(x, sparsity, dims, "exact")
            close, eager = (project_l1inf(x, radius, dims, "exact", compile=c) for c in (True, False))
            assert torch.equal(bits(close), bits(eager))
            assert float(close.double().abs().amax([1 - d for d in dims]).sum()) <= radius
            assert torch.equal(bits(project_l1inf(close, radius, dims, "exact", compile=True)), bits(close))
    x[3, 5] = float("nan")
    for dims in ((0,), (1,)):
        with pytest.raises(ValueError, match="holds NaN"):
            project_l1inf(x, 1.0, dims, compile=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_near_each_other_are_projected_alike_in_one_call_and_one_by_one(threads, monkeypatch):
    monkeypatch.setattr(compiled, "_ALONE", 1)  # threads for small tensors as well
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(shape, generator=generator) for shape in ((60, 90), (60, 90), (8, 5, 3, 3), (7, 7), (12, 70))]
    dims, in_one_call = (0, 1, 1, 0, 0), 0
    radii = [
        0.2 * float(x.abs().amax([d for d in range(x.ndim) if d != dim]).sum())
        for x, dim in zip(drawn, dims, strict=True)
    ]
    radii[3] = 1e3  # of a ball that the tensor lies in
    together, alone = [x.clone() for x in drawn], [x.clone() for x in drawn]
    layouts = [MaxPyramid(x, (dim,), x) for x, dim in zip(together, dims, strict=True)]
    once, taus = AllAtOnce.of(layouts), [0.0] * len(drawn)
    assert once.are(layouts)
    assert not once.are(layouts[1:])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(25):
            versions = [x._version for x in together]
            with compiling(True):
                compiled.largest(layouts[0].blocks.source)  # compiles
                found = once.project(radii, taus)
            with compiling(False):
                one_by_one = [
                    cut_alone(MaxPyramid(x, (dim,), x), radius, start=tau)
                    for x, dim, radius, tau in zip(alone, dims, radii, taus, strict=True)
                ]
                assert once.project(radii, taus) is None
            in_one_call += found is not None
            for i, slow in enumerate(one_by_one):
                assert torch.equal(bits(together[i]), bits(alone[i]))
                assert found[i] == slow.tau
                assert torch.equal(once.left[i], slow.left)
                assert torch.equal(once.norms[i], slow.tops)
                assert together[i]._version > versions[i]  # graphs that saved it must notice
            taus = found
            for x, y in zip(together, alone, strict=True):
                moved = 1e-2 * torch.randn(x.shape, generator=generator)
                x.add_(moved), y.add_(moved)
    finally:
        torch.set_num_threads(before)
    assert taus[3] == 0.0
    assert in_one_call == 25


def test_all_are_projected_or_cleared_at_once_or_none():
    x, y = torch.randn(6, 40), torch.randn(5, 30)
    y[2, 3] = float("nan")
    before = x.clone(), y.clone()
    once = AllAtOnce.of([MaxPyramid(x, (0,), x), MaxPyramid(y, (1,), y)])
    dead = [torch.tensor([True, False] * 3), torch.rand(30, generator=torch.Generator().manual_seed(0)) < 0.5]
    with compiling(True):
        compiled.largest(torch.randn(1, 50, 1_000))  # compiles
        assert once.project([1.0, 1.0], [0.0, 0.1]) is None
        assert once.clear([3, 3], dead) is None
        assert torch.equal(bits(x), bits(before[0]))
        assert torch.equal(bits(y), bits(before[1]))
        y[2, 3] = 1.0
        [(mine, _), (theirs, _)] = once.clear([3, 0], dead)
    assert mine is dead[0]
    assert theirs is dead[1]
    assert torch.equal(x, before[0].masked_fill(dead[0].unsqueeze(1), 0.0))
    assert torch.equal(y, before[1].nan_to_num(1.0).masked_fill(dead[1], 0.0))
    assert AllAtOnce.of([once.layouts[0], None]) is None
    half = torch.randn(3, 4).half()
    assert AllAtOnce.of([MaxPyramid(half, (0,), half)]) is None
    assert AllAtOnce.of([MaxPyramid(x, (0,), x.clone())]) is None, "not in place"


@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_groups_are_cleared_alike_compiled_or_eager(dtype):
    for shape in COMPILED.values():
        x = tensor(shape, dtype)
        x.view(-1)[:3] = torch.tensor([-0.0, 0.0, -1e-7])
        dead = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) < 0.5
        expected = x.masked_fill(dead.view(1, -1, 1), 0.0)
        for compile in (True, False):
            for if_finite in (True, False):
                y = x.clone()
                layout = MaxPyramid(y, (1,), y)
                with compiling(compile):
                    assert layout.clear(dead, dead.nonzero().flatten(), if_finite=if_finite)
                    assert torch.equal(bits(y), bits(expected))
                    y[0, 0, 0] = float("inf")
                    assert layout.clear(dead, dead.nonzero().flatten(), if_finite=if_finite) is not if_finite
                    assert bool(torch.isinf(y).any()) == (if_finite or not bool(dead[0]))


@pytest.mark.parametrize("dim", [0, 1])
def test_the_smallest_groups_are_cleared_alike_in_one_call_and_in_many(dim):
    generator = torch.Generator().manual_seed(3)
    for cleared in (0, 1, 20, 59, 60):
        x = torch.randn(60, 60, generator=generator)
        x[5:9], x[:, 5:9] = 0.25, 0.25  # ties
        many = torch.zeros(60, dtype=torch.bool)
        many[::2] = True
        for dead in (None, torch.rand(60, generator=generator) < 0.2, many):
            one, other = x.clone(), x.clone()
            once = AllAtOnce.of([MaxPyramid(one, (dim,), one)])
            with compiling(True):
                compiled.largest(torch.randn(1, 50, 1_000))  # compiles
                [(gone, tau)] = once.clear([cleared], [dead])
            with compiling(False):
                floor = Floor([60], 0, sparsity=cleared / 60, zeros_only=True)
                slow = clear_alone(MaxPyramid(other, (dim,), other), floor, dead=dead)
                assert once.clear([cleared], [dead]) is None
            assert torch.equal(bits(one), bits(other))
            assert torch.equal(once.left[0], slow.left)
            assert torch.equal(once.norms[0], slow.tops)
            assert tau == slow.tau
            assert torch.equal(gone, slow.left == 0.0 if dead is None else dead | (slow.left == 0.0))
            assert (gone is dead) == (dead is not None and torch.equal(gone, dead))
            assert torch.equal(gone, one.abs().amax(1 - dim) == 0)
            assert int(gone.sum()) == (cleared if dead is None else max(cleared, int(dead.sum())))
            assert torch.equal(one, x.masked_fill(gone.unsqueeze(1 - dim), 0.0)), "all others stay as they are"


def test_clearing_the_smallest_refuses_what_is_not_finite():
    floor = Floor([4], 1, sparsity=0.5, zeros_only=True)
    for compile in (True, False):
        x = torch.randn(4, 40)
        x[2, 3] = float("nan")
        before = x.clone()
        with compiling(compile):
            with pytest.raises(ValueError, match="`weight` holds NaN"):
                clear_alone(MaxPyramid(x, (0,), x), floor, name="weight")
            clear_alone(MaxPyramid(x, (0,), x), floor, nonfinite="skip")
        assert torch.equal(bits(x), bits(before))


def test_without_a_compiler_there_is_one_warning_and_the_same_result(forget_compiling, monkeypatch):
    x = tensor((60, 700), torch.float32)
    expected = [project_l1inf(x, 9.0, method=m, compile=False) for m in ("bilevel", "exact")]
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for method, result in zip(("bilevel", "exact", "bilevel"), (*expected, expected[0]), strict=True):
            assert torch.equal(bits(project_l1inf(x, 9.0, method=method, compile=True)), bits(result))
    assert [str(w.message)[:29] for w in caught if w.category is RuntimeWarning] == ["Compiling projections failed,"]


def test_compiling_starts_by_itself_once_enough_memory_has_passed(forget_compiling, monkeypatch, caplog):
    x = tensor((1_200, 1_000), torch.float32)
    size = x.numel() * x.element_size()
    monkeypatch.setattr(compiled, "_WORTH", 5 * size)
    for _ in range(2):  # two passes each
        project_l1inf(x, 9.0)
        project_l1inf(x, 9.0, compile=False)
    assert compiled._loaded == {}
    expected = project_l1inf(x, 9.0, (1,), compile=False)
    with caplog.at_level("INFO", logger="lightning_accel"):
        project_l1inf(x, 9.0, (1,), out=x)
    assert list(compiled._loaded) == [torch.float32]
    assert torch.equal(x, expected)
    assert any("Compiled the passes of projections over torch.float32 in" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((200, 1_000), 1), ((600, 900), 1), ((1_100, 200), 1), ((40, 512), 0), ((40, 777), 0), ((40, 1_500), 0)],
)
@pytest.mark.parametrize("sparsity", [0.2, 0.9])
def test_sums_have_one_order_compiled_or_eager(shape, dim, sparsity, forget_compiling):
    xs = [tensor(shape, torch.float32)]
    xs.append(xs[0] + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    radius = radius_for_sparsity(xs[0], sparsity, (dim,), "exact")
    before, seen = [x.clone() for x in xs], []
    for compile in (True, False):
        state = ExactState()  # the second projection starts where the first one ended
        found = [(project_l1inf(x, radius, (dim,), "exact", state=state, compile=compile), state.mu) for x in xs]
        seen.append([bits(part) for pair in found for part in pair])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert all(map(torch.equal, xs, before)), "what is looked at is not written to"


def test_what_has_no_plain_memory_is_left_to_eager_passes():
    x = tensor((1, 8, 64), torch.float32)
    with compiling(True):
        assert compiled.largest(x.to("meta")) is None
        assert compiled.largest(x.transpose(1, 2)) is None
        assert compiled.largest(x[:, :0]) is None
        compiled.largest(torch.randn(1, 50, 1_000))  # compiles
        vectors = torch.ones(3, 4, dtype=torch.float64)
        for elsewhere in (vectors.to("meta"), vectors.t().contiguous().t()):  # as on a GPU, and with gaps
            assert compiled.solve_tangents(tuple(elsewhere), 1.0, None, 0.0) is None
            assert compiled.has_settled(tuple(elsewhere), 1.0, 1e-6) is None
        assert compiled.has_settled(tuple(vectors), 1.0, 1e-6)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert compiled.largest(torch.empty(1, 8, 64)) is None
        seen = []
        torch.func.vmap(lambda part: (seen.append(compiled.largest(part)), part)[1])(torch.randn(3, 1, 8, 64))
    assert seen == [None]


@pytest.mark.parametrize("dims", [(0,), (1,)])
@pytest.mark.parametrize("method", ["bilevel", "exact"])
def test_autograd_sees_a_compiled_write(dims, method):
    parameter = torch.nn.Parameter(tensor((64, 200), torch.float32))
    loss = (parameter**2).sum()
    project_l1inf(parameter, 30.0, dims, method, out=parameter, compile=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # such tensors have no version that could be counted
        x = tensor((64, 200), torch.float32)
        project_l1inf(x, 30.0, dims, method, out=x, compile=True)
    assert not compiled._broken
    assert torch.equal(x, parameter.detach())


def test_an_unknown_wish_for_compiling_is_refused():
    with pytest.raises(ValueError, match="`compile` must be True, False or 'auto', got 'always'"):
        project_l1inf(tensor((2, 3), torch.float32), 1.0, compile="always")


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_projections_that_move_living_columns_together_find_the_same(share, dtype):
    x = tensor((300, 400), dtype)
    radius = radius_for_sparsity(x, share, (1,), "exact")
    columns = project_l1inf(x, radius, (1,), "exact")
    rows = project_l1inf(x.t().contiguous(), radius, (0,), "exact").t()
    assert torch.equal(columns == 0, rows == 0)
    assert int((columns == 0).all(0).sum()) == round(share * 400)
    bound = 4.0 * float(torch.finfo(torch.promote_types(dtype, torch.float32)).eps * x.abs().max())
    if dtype in (torch.float16, torch.bfloat16):
        bound = 2.0 * float(torch.finfo(dtype).eps * columns.abs().max())  # a bound may round to its neighbour
    assert float((columns.double() - rows.double()).abs().max()) <= bound


@pytest.mark.parametrize("groups", [1, 7, 1_000])
def test_tangents_are_solved_alike_compiled_or_eager(groups):
    generator = torch.Generator().manual_seed(groups)
    for seed in range(12):
        mu, above, totals = torch.rand(3, groups, generator=generator, dtype=torch.float64)
        mu[::3] = 0.0
        above, count = 10.0 * above, torch.randint(1, 40, (groups,), generator=generator).double()
        totals *= 30.0
        for target in (1e-3, 0.1 * groups, 100.0 * groups):
            for limit in (None, totals):
                for guess in (None, torch.tensor(0.5 * seed, dtype=torch.float64), totals.max() + 1e3):
                    found = []
                    for compile in (True, False):
                        with compiling(compile):
                            compiled.largest(torch.randn(1, 50, 1_000))  # compiles
                            found.append(solve_tangents(mu, above, count, target, limit, guess=guess))
                    (theta, update), (expected, terms) = found
                    assert torch.equal(bits(theta), bits(expected))
                    assert torch.equal(bits(update), bits(terms))
                    assert theta.dtype == update.dtype == torch.float64
                    if limit is None:
                        assert abs(float(update.sum()) - target) <= 1e-9 * max(target, 1.0)
