"""Singular vectors are computed once for a plan and the decomposition after it, and never serve another weight."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import SharedVectors, decompose, factorize, low_rank_layers, make_plan
from lightning_accel.low_rank.calls import input_second_moments
from lightning_accel.low_rank.eligibility import eligible_layers
from lightning_accel.low_rank.factors import shared_vectors
from lightning_accel.low_rank.factors.factorize import EnergyProfile

LAYERS = {
    "square": lambda: nn.Linear(96, 96),
    "wide": lambda: nn.Linear(300, 40),
    "tall": lambda: nn.Linear(40, 300),
    "several rows of products": lambda: nn.Linear(290, 280),
    "convolution": lambda: nn.Conv2d(48, 160, 3),
    "convolution with more outputs than columns": lambda: nn.Conv2d(4, 64, 3),
    "one dimension": lambda: nn.Conv1d(32, 24, 5),
    "1x1": lambda: nn.Conv2d(64, 48, 1),
    "float64": lambda: nn.Linear(40, 36).double(),
    "convolution in float64": lambda: nn.Conv2d(12, 10, 3).double(),
    "bfloat16": lambda: nn.Linear(64, 48).bfloat16(),
}


def forms(dense):
    """Ranks of the two-factor form and, where there is one, of Tucker's."""
    yield from ((1,), (7,), (20,))
    if math.prod(dense.weight.shape[2:]) != 1:
        yield from ((1, 1), (3, 9), (4, 10))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.Flatten(), nn.Linear(48, 64)
    )


def run(model):
    return model(torch.randn(4, 3, 3, 3))


def by_rank(candidates):
    """Time layers by the ranks alone."""
    for step in candidates.values():
        step()
    return {name: [1000.0 if name == "dense" else float(name.split("x")[0])] * 3 for name in candidates}


PLANS = {
    "snapped": {"method": "snapped", "ratio": 2.0},
    "fixed": {"method": "fixed", "ratio": 3.0},
    "knapsack": {"method": "knapsack", "ratio": 2.0, "min_energy": 0.0, "timer": by_rank},
}


def factors(model):
    return {
        f"{n}.{part}": getattr(layer, part).detach()
        for n, layer in low_rank_layers(model).items()
        for part in layer.factor_names
    }


@pytest.fixture
def count_eigh(monkeypatch):
    """Sizes of the matrices whose eigenvectors were computed."""
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    return sizes


@pytest.mark.parametrize("case", LAYERS)
def test_energies_are_what_factors_keep(case):
    torch.manual_seed(0)
    dense = LAYERS[case]()
    weight = dense.weight.detach().double()
    every = list(forms(dense))
    prepared = EnergyProfile(dense)
    prepared.vectors.prepare(every, decompose=True)
    precision = 3e-3 if case == "bfloat16" else 1e-6
    for ranks in every:
        layer = factorize(dense, ranks)
        kept = layer.product({name: getattr(layer, name).detach().double() for name in layer.factor_names})
        energy = float(kept.square().sum() / weight.square().sum())
        assert EnergyProfile(dense)(ranks) == pytest.approx(energy, abs=precision)
        assert prepared(ranks) == pytest.approx(EnergyProfile(dense)(ranks), abs=1e-7)


@pytest.mark.parametrize("case", LAYERS)
def test_a_gram_matrix_of_half_the_products_has_the_same_eigenvectors(case):
    torch.manual_seed(0)
    rows = LAYERS[case]().weight.detach().flatten(1).double()
    values, vectors = torch.linalg.eigh(shared_vectors._lower_gram(rows))
    torch.testing.assert_close(vectors * values @ vectors.T, rows @ rows.T)


@pytest.mark.parametrize("kind", PLANS)
def test_a_shared_decomposition_is_the_same_and_takes_no_eigenvectors(kind, count_eigh):
    alone, together, shared = net(), net(), SharedVectors()
    plan = make_plan(alone, run, **PLANS[kind])
    for layer, other in zip(plan.layers, make_plan(together, run, **PLANS[kind], shared=shared).layers, strict=True):
        assert (layer.ranks, layer.reason) == (other.ranks, other.reason)
        assert layer.energy == pytest.approx(other.energy, abs=1e-9)
    decompose(alone, plan)
    count_eigh.clear()
    assert decompose(together, plan, shared=shared) == [layer.name for layer in plan.layers if layer.ranks]
    assert not count_eigh
    expected = factors(alone)
    assert expected
    for name, factor in factors(together).items():
        assert torch.equal(factor, expected[name]), name  # so runs that find energies on disk end alike


def test_each_unfolding_is_decomposed_once(count_eigh):
    make_plan(net(), run, **PLANS["knapsack"], shared=SharedVectors())
    assert sorted(count_eigh) == [3, 27, 48, 48, 64, 64]  # the first layer has more outputs than columns


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_changed_after_the_plan_are_decomposed_anew(through_data):
    model, shared = net(), SharedVectors()
    plan = make_plan(model, None, **PLANS["snapped"], shared=shared)
    with torch.no_grad():
        weight = model[2].weight.data if through_data else model[2].weight
        weight[0, 0, 0, 0] += 0.5
    alone = copy.deepcopy(model)
    decompose(alone, plan)
    decompose(model, plan, shared=shared)
    for name, factor in factors(alone).items():
        assert torch.equal(factor, factors(model)[name])


def test_larger_ranks_than_were_planned_are_decomposed_anew():
    model, shared = net(), SharedVectors()
    make_plan(model, None, ratio=8.0, method="snapped", shared=shared)
    plan = make_plan(model, None, ratio=1.5, method="snapped")
    alone = copy.deepcopy(model)
    decompose(alone, plan)
    decompose(model, plan, shared=shared)
    for name, factor in factors(alone).items():
        torch.testing.assert_close(factor, factors(model)[name])


def test_weighted_plans_share_nothing():
    model, shared = net(), SharedVectors()
    torch.manual_seed(1)
    x = torch.randn(4, 3, 3, 3)
    plan = make_plan(model, lambda m: m(x), **PLANS["snapped"], weighting="activation", shared=shared)
    moments = input_second_moments(model, eligible_layers(model)[0], lambda m: m(x))
    alone = copy.deepcopy(model)
    decompose(alone, plan, second_moments=moments)
    decompose(model, plan, second_moments=moments, shared=shared)
    for name, factor in factors(alone).items():
        assert torch.equal(factor, factors(model)[name])
