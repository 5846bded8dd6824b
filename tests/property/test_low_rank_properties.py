"""Random cases against slow, plain oracles."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_accel.low_rank import factorize, to_dense
from lightning_accel.low_rank.factors.factorize import EnergyProfile, full_ranks
from lightning_accel.low_rank.freezing import frozen_factor_index
from lightning_accel.low_rank.plan import factor_parameters
from lightning_accel.low_rank.rank_search.candidates import plateau_candidates, snapped_ranks, theoretical_ranks
from lightning_accel.low_rank.rank_search.knapsack import least_cost, most_value
from lightning_accel.low_rank.rank_search.two_budgets import most_value_within

SHAPES = st.one_of(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 96), st.integers(1, 96), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 96), st.integers(1, 96), st.integers(1, 5)),
)
RATIOS = st.floats(1.05, 20.0)
NUMBERS = st.integers(0, 40).map(float)
OPTIONS = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), min_size=1, max_size=5)


@given(options=OPTIONS, budget=st.integers(0, 160))
@settings(deadline=None, max_examples=150)
def test_knapsack_finds_the_most_value_that_brute_force_finds(options, budget):
    feasible = [
        sum(row[k][1] for row, k in zip(options, choice, strict=True))
        for choice in itertools.product(*[range(len(row)) for row in options])
        if sum(row[k][0] for row, k in zip(options, choice, strict=True)) <= budget
    ]
    chosen = most_value(options, budget)
    if not feasible:
        assert chosen is None
        return
    assert sum(row[k][0] for row, k in zip(options, chosen, strict=True)) <= budget
    assert sum(row[k][1] for row, k in zip(options, chosen, strict=True)) == max(feasible)


@given(options=OPTIONS, wanted=st.integers(0, 160))
@settings(deadline=None, max_examples=150)
def test_knapsack_finds_the_least_cost_that_brute_force_finds(options, wanted):
    feasible = [
        sum(row[k][0] for row, k in zip(options, choice, strict=True))
        for choice in itertools.product(*[range(len(row)) for row in options])
        if sum(row[k][1] for row, k in zip(options, choice, strict=True)) >= wanted
    ]
    chosen = least_cost(options, wanted)
    if not feasible:
        assert chosen is None
        return
    assert sum(row[k][1] for row, k in zip(options, chosen, strict=True)) >= wanted
    assert sum(row[k][0] for row, k in zip(options, chosen, strict=True)) == min(feasible)


@given(seed=st.integers(0, 10_000), layers=st.integers(10, 40))
@settings(deadline=None, max_examples=20)
def test_thinned_knapsack_keeps_the_budget_and_nearly_all_value(seed, layers):
    generator = torch.Generator().manual_seed(seed)
    options = []
    for _ in range(layers):
        costs, values = torch.rand(2, 6, generator=generator, dtype=torch.float64).sort().values.tolist()
        options.append(list(zip(costs, values, strict=True)))
    budget = 0.5 * sum(row[-1][0] for row in options)
    thin, full = most_value(options, budget, states=200), most_value(options, budget, states=20_000)
    totals = [sum(row[k][1] for row, k in zip(options, chosen, strict=True)) for chosen in (thin, full)]
    assert sum(row[k][0] for row, k in zip(options, thin, strict=True)) <= budget + 1e-9
    assert totals[0] >= 0.97 * totals[1]


def test_knapsack_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="layer 1 has none"):
        most_value([[(1.0, 1.0)], []], 1.0)
    with pytest.raises(ValueError, match="costs must be >= 0, layer 0"):
        least_cost([[(-1.0, 1.0)]], 1.0)


@given(shape=SHAPES, ratio=RATIOS)
@settings(deadline=None)
def test_theoretical_ranks_are_the_largest_within_the_ratio(shape, ratio):
    ranks = theoretical_ranks(shape, ratio)
    limit = math.prod(shape) / ratio
    if min(ranks) > 1:
        assert factor_parameters(shape, ranks) <= limit + 1e-6
    if len(ranks) == 1 and ranks[0] < min(shape[:2]) and ranks[0] > 1:
        assert factor_parameters(shape, (ranks[0] + 1,)) > limit - 1e-6
    assert len(ranks) == (1 if math.prod(shape[2:]) == 1 else 2)


@given(shape=SHAPES, ratio=st.one_of(st.none(), RATIOS))
@settings(deadline=None)
def test_candidates_are_smaller_than_dense_and_within_the_channels(shape, ratio):
    candidates = plateau_candidates(shape, ratio)
    assert len(set(candidates)) == len(candidates) <= 40
    for ranks in candidates:
        assert factor_parameters(shape, ranks) < math.prod(shape)
        if len(ranks) == 1:
            assert 1 <= ranks[0] <= min(shape[0], math.prod(shape[1:]))
        else:
            assert 1 <= ranks[0] <= shape[1]
            assert 1 <= ranks[1] <= shape[0]
    if ratio is not None and (snapped := snapped_ranks(shape, ratio, candidates)) is not None:
        assert factor_parameters(shape, snapped) <= math.prod(shape) / ratio


@given(out=st.integers(1, 9), fan_in=st.integers(1, 9), kernel=st.integers(1, 3), rank=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_energy_equals_one_minus_the_relative_squared_error(out, fan_in, kernel, rank):
    torch.manual_seed(out + 10 * fan_in + 100 * kernel)
    dense = (nn.Linear(fan_in, out) if kernel == 1 else nn.Conv2d(fan_in, out, kernel)).double()
    ranks = tuple(min(rank, full) for full in full_ranks(dense))
    approximation = to_dense(factorize(dense, ranks)).weight
    error = (approximation - dense.weight).square().sum() / dense.weight.square().sum()
    assert EnergyProfile(dense)(ranks) == pytest.approx(1.0 - error.item(), abs=1e-9)


@given(rank=st.integers(1, 8))
@settings(deadline=None)
def test_svd_factors_beat_random_ones_of_the_same_rank(rank):
    torch.manual_seed(rank)
    dense = nn.Linear(9, 8).double()
    best = (factorize(dense, (rank,)).weight - dense.weight).square().sum()
    basis = torch.linalg.qr(torch.randn(9, rank, dtype=torch.float64)).Q
    other = (dense.weight @ basis @ basis.T - dense.weight).square().sum()
    assert best <= other + 1e-12


@given(
    epoch=st.integers(0, 500),
    period=st.integers(1, 20),
    weights=st.one_of(st.none(), st.tuples(st.floats(0.1, 10.0), st.floats(0.1, 10.0))),
)
def test_each_group_rests_for_its_share_of_the_epochs(epoch, period, weights):
    rests = [frozen_factor_index(e, period_epochs=period, weights=weights) for e in range(epoch)]
    share = 0.5 if weights is None else weights[0] / sum(weights)
    assert abs(rests.count(0) - share * epoch) <= 2 * period, "to within the cycle under way"


two_costs = st.tuples(st.floats(0.1, 9.0), st.floats(0.1, 9.0), st.floats(0.0, 1.0))


@settings(max_examples=200, deadline=None)
@given(options=st.lists(st.lists(two_costs, min_size=1, max_size=5), min_size=1, max_size=5), data=st.data())
def test_two_budgets_are_filled_as_well_as_brute_force_does(options, data):
    """The budgets are those of any plan; that plan itself is the least that is asked for."""

    def sums(chosen):
        return tuple(sum(layer[k][part] for layer, k in zip(options, chosen, strict=True)) for part in range(3))

    start = [data.draw(st.integers(0, len(layer) - 1)) for layer in options]
    budgets = sums(start)[:2]
    chosen = most_value_within(options, budgets, start)
    first, second, value = sums(chosen)
    assert first <= budgets[0] * (1.0 + 1e-9)
    assert second <= budgets[1] * (1.0 + 1e-9)
    every = itertools.product(*(range(len(layer)) for layer in options))
    best = max(v for a, b, v in map(sums, every) if a <= budgets[0] and b <= budgets[1])
    assert value >= best - 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_many_layers_never_keep_less_than_the_plan_whose_budgets_they_have(seed):
    rng = random.Random(seed)
    options = [[(9.0, 9.0, 1.0)] for _ in range(40)]
    for layer in options:
        for share in sorted(rng.uniform(0.1, 0.9) for _ in range(20)):
            layer.append((9.0 * share * rng.uniform(0.6, 1.2), 9.0 * share, share ** rng.uniform(0.1, 0.6)))
    start = [rng.randrange(21) for _ in options]
    sums = lambda chosen: [sum(layer[k][i] for layer, k in zip(options, chosen, strict=True)) for i in range(3)]  # noqa: E731
    budgets = sums(start)[:2]
    few, many = (most_value_within(options, budgets, start, states=states) for states in (1, 600))
    for chosen in (few, many):
        first, second, value = sums(chosen)
        assert first <= budgets[0] * (1.0 + 1e-9)
        assert second <= budgets[1] * (1.0 + 1e-9)
        assert value >= sums(start)[2]
    assert sums(many)[2] >= sums(few)[2]
