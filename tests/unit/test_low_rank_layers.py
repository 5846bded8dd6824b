"""Factored layers compute what the dense ones do, and skip what is frozen."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel.low_rank import (
    FreezingSchedule,
    LowRankConv,
    LowRankLinear,
    TuckerConv,
    factorize,
    freeze,
    to_dense,
)
from lightning_accel.low_rank.factors.factorize import EnergyProfile, full_ranks, identity_factors

DENSE = {
    "linear, 2-D input": (lambda: nn.Linear(7, 5), (4, 7)),
    "linear, 3-D input": (lambda: nn.Linear(7, 11), (2, 3, 7)),
    "linear, no bias": (lambda: nn.Linear(7, 5, bias=False), (4, 7)),
    "linear, one output": (lambda: nn.Linear(7, 1), (4, 7)),
    "conv 3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 9)),
    "conv, stride and dilation": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 9, 9)),
    "conv, same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 8, 9)),
    "conv, same and reflect, dilated": (
        lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect", dilation=(1, 3)),
        (2, 4, 8, 9),
    ),
    "conv, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 8, 9)),
    "conv, valid and circular": (lambda: nn.Conv2d(4, 6, 3, padding="valid", padding_mode="circular"), (2, 4, 8, 9)),
    "conv, replicate": (lambda: nn.Conv2d(6, 4, (1, 3), padding=(0, 2), padding_mode="replicate"), (2, 6, 8, 9)),
    "conv, non-square, no bias": (lambda: nn.Conv2d(4, 6, (5, 1), bias=False), (2, 4, 8, 9)),
    "conv 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 8, 9)),
    "conv 1x1, stride and padding": (lambda: nn.Conv2d(4, 6, 1, stride=2, padding=1), (2, 4, 9, 9)),
    "conv 1x1, reflect": (lambda: nn.Conv2d(4, 6, 1, padding=2, padding_mode="reflect"), (2, 4, 9, 9)),
    "conv 1-D": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv 1-D, circular": (lambda: nn.Conv1d(4, 6, 5, padding=3, padding_mode="circular"), (2, 4, 9)),
    "conv 1-D, 1x1": (lambda: nn.Conv1d(4, 6, 1), (2, 4, 9)),
    "conv, unbatched input": (lambda: nn.Conv2d(4, 6, 3), (4, 8, 9)),
}


def dense_and_input(case):
    make, shape = DENSE[case]
    torch.manual_seed(0)
    return make().double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("case", DENSE)
def test_full_rank_equals_dense(case):
    dense, x = dense_and_input(case)
    layer = factorize(dense, full_ranks(dense))
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.weight, dense.weight)
    assert layer.bias is dense.bias


@pytest.mark.parametrize("case", DENSE)
def test_identity_factors_equal_dense_without_a_decomposition(case):
    dense, x = dense_and_input(case)
    before = dense.weight.detach().clone()
    layer = identity_factors(dense)
    torch.testing.assert_close(layer(x), dense(x))
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(dense.weight, before)
    assert any(torch.equal(p.flatten(1), torch.eye(len(p), dtype=p.dtype)) for p in layer.parameters() if p.dim() > 1)


@pytest.mark.parametrize("case", DENSE)
def test_two_factors_of_full_rank_equal_dense(case):
    dense, x = dense_and_input(case)
    layer = factorize(dense, full_ranks(dense, 1))
    assert not isinstance(layer, TuckerConv)
    torch.testing.assert_close(layer(x), dense(x))
    merged = to_dense(layer)
    assert merged.extra_repr() == dense.extra_repr()
    torch.testing.assert_close(merged.weight, dense.weight)


@pytest.mark.parametrize("case", DENSE)
def test_merged_layer_has_the_settings_and_the_function_of_the_factored_one(case):
    dense, x = dense_and_input(case)
    layer = factorize(dense, [1] * len(full_ranks(dense)))
    merged = to_dense(layer)
    assert type(merged) is type(dense)
    assert merged.extra_repr() == dense.extra_repr()
    torch.testing.assert_close(merged(x), layer(x))


@pytest.mark.parametrize("case", DENSE)
def test_relative_squared_error_is_the_energy_left_out(case):
    dense, _ = dense_and_input(case)
    profile = EnergyProfile(dense)
    for cut, form in itertools.product((1, 2, 3), {1, len(full_ranks(dense))}):
        ranks = [min(cut, full) for full in full_ranks(dense, form)]
        error = (factorize(dense, ranks).weight - dense.weight).detach().square().sum()
        left_out = float(error / dense.weight.detach().square().sum())
        assert left_out == pytest.approx(1.0 - profile(ranks), abs=1e-9)
    assert profile(full_ranks(dense)) == pytest.approx(1.0)


def test_eckart_young_error_is_the_tail_of_the_singular_values():
    torch.manual_seed(0)
    dense = nn.Linear(12, 9).double()
    values = torch.linalg.svdvals(dense.weight.detach())
    error = torch.linalg.matrix_norm(factorize(dense, (4,)).weight - dense.weight).item()
    assert error == pytest.approx(values[4:].square().sum().sqrt().item())


def test_svd_factors_share_the_singular_values_evenly():
    torch.manual_seed(0)
    dense = nn.Linear(12, 9).double()
    layer = factorize(dense, (4,))
    values = torch.linalg.svdvals(dense.weight.detach())[:4]
    torch.testing.assert_close(layer.factor_in.square().sum(1), values)
    torch.testing.assert_close(layer.factor_out.square().sum(0), values)


@pytest.mark.parametrize("shape", [(24, 200), (200, 24), (24, 24), (30, 24)])
@pytest.mark.parametrize("decades", [0, 4])
def test_factors_of_float32_weights_are_those_of_an_svd(shape, decades):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    dense = nn.Linear(shape[1], shape[0])
    dense.weight.data = (left * torch.logspace(0, -decades, 24, dtype=torch.float64) @ right).float()
    precise = nn.Linear(shape[1], shape[0]).double()
    precise.weight.data = dense.weight.data.double()
    for rank in (4, 24):
        ours, exact = factorize(dense, (rank,)), factorize(precise, (rank,))
        torch.testing.assert_close(ours.weight.detach(), exact.weight.detach().float(), rtol=0.0, atol=2e-7)
        torch.testing.assert_close(ours.factor_in.square().sum(1), exact.factor_in.square().sum(1).float())
        torch.testing.assert_close(ours.factor_out.square().sum(0), exact.factor_out.square().sum(0).float())


def test_a_wide_weight_of_less_rank_than_asked_for_leaves_factors_that_can_learn():
    torch.manual_seed(0)
    dense = nn.Linear(200, 24)
    dense.weight.data = torch.randn(24, 2) @ torch.randn(2, 200)
    layer = factorize(dense, (8,))
    torch.testing.assert_close(layer.weight.detach(), dense.weight.detach(), rtol=1e-4, atol=1e-4)
    assert layer.factor_in.square().sum(1).min() > 0.1
    assert all(p.isfinite().all() for p in layer.parameters())


def test_tucker_factors_have_one_norm():
    torch.manual_seed(0)
    layer = factorize(nn.Conv2d(8, 6, 3), (4, 5))
    norms = [torch.linalg.vector_norm(getattr(layer, name)).item() for name in layer.factor_names]
    assert norms == pytest.approx([norms[0]] * 3)


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3)])
def test_weighting_by_activations_gives_less_output_error_at_the_same_rank(make, form):
    torch.manual_seed(0)
    dense = make().double()
    mixing = torch.randn(8, 8, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 8, dtype=torch.float64))
    x = torch.randn(512, 8, dtype=torch.float64) @ mixing.T
    moment = x.T @ x / len(x)
    ranks = [3] * len(full_ranks(dense, form))

    def output_error(layer):
        difference = (layer.weight - dense.weight).detach()
        return torch.einsum("oi...,ij,oj...->", difference, moment, difference).item()

    plain, weighted = factorize(dense, ranks), factorize(dense, ranks, second_moment=moment)
    assert output_error(weighted) < 0.8 * output_error(plain)
    whole = torch.einsum("oi...,ij,oj...->", dense.weight.detach(), moment, dense.weight.detach()).item()
    assert output_error(weighted) / whole == pytest.approx(1.0 - EnergyProfile(dense, moment)(ranks), abs=1e-4)


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 12), lambda: nn.Conv2d(16, 12, 3)])
def test_weighting_by_activations_leaves_factors_that_train_where_inputs_hardly_vary(make, form):
    torch.manual_seed(0)
    dense = make()
    moment = torch.diag(torch.logspace(0, -8, 16, dtype=torch.float64))
    ranks = [6] * len(full_ranks(dense, form))
    layer = factorize(dense, ranks, second_moment=moment)
    rows = layer.factor_in.detach().double().flatten(1)
    gram = rows @ rows.T
    sizes = gram.diagonal().sqrt()
    torch.testing.assert_close(gram / sizes.outer(sizes), torch.eye(6, dtype=torch.float64), atol=1e-4, rtol=0)
    largest = [p.detach().abs().max() for p in layer.parameters() if p.dim() > 1]
    assert max(largest) < 30 * min(largest), "a step that moves every entry alike suits all of them"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept_and_the_work_is_done_in_float32_or_better(dtype):
    torch.manual_seed(0)
    dense = nn.Linear(16, 12).to(dtype)
    layer = factorize(dense, (12,))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    precision = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(layer.weight, dense.weight, rtol=precision, atol=precision)
    assert to_dense(layer).weight.dtype is dtype


def test_requires_grad_and_mode_carry_over():
    dense = nn.Linear(6, 4).eval()
    dense.weight.requires_grad_(False)
    layer = factorize(dense, (2,))
    assert not layer.factor_in.requires_grad
    assert not layer.factor_out.requires_grad
    assert layer.bias.requires_grad
    assert not layer.training
    assert not to_dense(layer).weight.requires_grad


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 3)])
def test_zero_weights_stay_zero_and_keep_all_energy(make):
    dense = make()
    nn.init.zeros_(dense.weight)
    ranks = [2] * len(full_ranks(dense))
    assert not factorize(dense, ranks).weight.any()
    assert EnergyProfile(dense)(ranks) == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_refused(value):
    dense = nn.Linear(6, 4)
    with torch.no_grad():
        dense.weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        factorize(dense, (2,))
    with pytest.raises(ValueError, match="NaN or infinite"):
        EnergyProfile(dense)


def test_second_moment_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"`second_moment` must be 6 x 6"):
        factorize(nn.Linear(6, 4), (2,), second_moment=torch.eye(5))


def test_ranks_above_the_full_rank_are_cut():
    assert factorize(nn.Linear(6, 4), (99,)).rank == 4


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="`ranks` must have 1 entries"):
        factorize(nn.Linear(6, 4), (2, 2))
    with pytest.raises(ValueError, match="`rank` must be >= 1, got 0"):
        factorize(nn.Linear(6, 4), (0,))
    with pytest.raises(ValueError, match="`rank_in` must be >= 1, got 0"):
        TuckerConv(4, 4, (3, 3), (0, 2))
    with pytest.raises(ValueError, match="`in_features` must be >= 1"):
        LowRankLinear(0, 4, 1)
    with pytest.raises(ValueError, match="`ranks` must have 1 or 2 entries"):
        factorize(nn.Conv2d(4, 4, 3), (2, 2, 2))
    with pytest.raises(ValueError, match="`ranks` must have 1 entries"):
        factorize(nn.Conv2d(4, 4, 1), (2, 2))
    with pytest.raises(ValueError, match="1 or 2 entries, got 3"):
        TuckerConv(4, 4, (3, 3, 3), (2, 2))


@pytest.mark.parametrize(
    ("make", "fan_in"),
    [
        (lambda: LowRankLinear(64, 48, 8), 64),
        (lambda: LowRankConv(64, 48, (1, 1), 8), 64),
        (lambda: LowRankConv(16, 48, (3,), 8), 16 * 3),
        (lambda: TuckerConv(16, 24, (3, 3), (8, 8)), 16 * 9),
    ],
)
def test_new_layers_start_with_the_variance_of_torch(make, fan_in):
    torch.manual_seed(0)
    weights = torch.stack([make().weight.detach().flatten() for _ in range(20)])
    assert weights.std().item() == pytest.approx((1.0 / (3.0 * fan_in)) ** 0.5, rel=0.15)


def test_the_costlier_group_stands_first():
    assert LowRankLinear(8, 32, 2).groups() == (("factor_out",), ("factor_in",))
    assert LowRankLinear(32, 8, 2).groups() == (("factor_in",), ("factor_out",))
    assert LowRankConv(32, 8, (1, 1), 2).groups() == (("factor_in",), ("factor_out",))
    assert LowRankConv(8, 32, (3, 3), 2).groups() == (("factor_in",), ("factor_out",))
    assert TuckerConv(16, 16, (3, 3), (8, 8)).groups() == (("core",), ("factor_in", "factor_out"))
    assert TuckerConv(64, 64, (3, 3), (2, 2)).groups() == (("factor_in", "factor_out"), ("core",))


@pytest.mark.parametrize("case", ["linear, 3-D input", "conv 3x3", "conv 1x1", "conv 1-D"])
@pytest.mark.parametrize("group", [0, 1])
def test_frozen_factors_cost_no_weight_gradient(case, group):
    dense, x = dense_and_input(case)
    layer = factorize(dense, [2] * len(full_ranks(dense)))
    free = copy.deepcopy(layer)
    for name in layer.groups()[group]:
        getattr(layer, name).requires_grad_(False)
    x.requires_grad_()
    counts = []
    for candidate in (free, layer):
        with FlopCounterMode(display=False) as counter:
            candidate(x).square().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0]
    for name in layer.factor_names:
        frozen = name in layer.groups()[group]
        assert (getattr(layer, name).grad is None) == frozen
        if not frozen:
            torch.testing.assert_close(getattr(layer, name).grad, getattr(free, name).grad)


@pytest.mark.parametrize("case", ["linear, 2-D input", "conv, same and reflect, dilated", "conv 1-D, 1x1"])
def test_second_derivatives_exist(case):
    dense, x = dense_and_input(case)
    layer = factorize(dense, [2] * len(full_ranks(dense)))
    assert torch.autograd.gradgradcheck(layer, x[:1].requires_grad_())


@pytest.mark.parametrize("case", ["linear, 2-D input", "conv, replicate", "conv 1x1, reflect"])
def test_copies_and_pickles(case):
    dense, x = dense_and_input(case)
    layer = factorize(dense, [2] * len(full_ranks(dense)))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)


def test_compiling_makes_one_graph_a_freezing_pattern():
    torch.manual_seed(0)
    model = nn.Sequential(factorize(nn.Linear(8, 8), (3,)), nn.ReLU(), factorize(nn.Linear(8, 8), (3,)))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    schedule = FreezingSchedule(end=6)
    for epoch in range(8):
        freeze(model, schedule.frozen_group(epoch=epoch))
        compiled(torch.randn(4, 8)).sum().backward()
    torch._dynamo.reset()
    assert len(graphs) <= 3
