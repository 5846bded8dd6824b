"""Steps of products are as long as the dense weight's, and the optimizer's groups are whole between steps."""

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import LowRankLinear, MatchedUpdates, factorize, update_multiplier
from lightning_accel.low_rank.optimizers.matched_updates import LARGEST_MULTIPLIER, why_not_matched

OPTIMIZERS = {
    "adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **o),
    "adamw fused": lambda p, **o: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True, **o),
    "adamw foreach": lambda p, **o: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True, amsgrad=True, **o),
    "adamw rate in a tensor": lambda p, **o: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False, **o),
    "nadam": lambda p, **o: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, **o),
    "nadam decoupled": lambda p, **o: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, **o),
    "adamax": lambda p, **o: torch.optim.Adamax(p, lr=0.01, **o),
}


def orthogonal(rows, columns, *, scale=1.0, kernel=()):
    torch.manual_seed(0)
    layer = nn.Conv2d(columns, rows, kernel) if kernel else nn.Linear(columns, rows)
    with torch.no_grad():
        nn.init.orthogonal_(layer.weight)
        layer.weight.mul_(scale)
    return layer


def net():
    torch.manual_seed(0)
    first, second = factorize(orthogonal(24, 16), (4,)), factorize(orthogonal(8, 24, scale=0.3), (4,))
    return nn.Sequential(first, nn.Tanh(), second)


def make_gradients(model):
    torch.manual_seed(1)
    model.zero_grad()
    model(torch.randn(5, 16)).square().mean().backward()


def whole_groups_and_gradients(optimizer, model):
    """A closure, which sees the groups as the user made them."""
    assert len(optimizer.param_groups) == 1
    make_gradients(model)


def multipliers_of(model):
    return {model[0]: 2.0, model[2]: 1.5}


def separate_groups(model, make):
    """What `MatchedUpdates` stands for, written out."""
    groups = [{"params": [model[0].bias, model[2].bias]}]
    optimizer = make(
        [*groups, {"params": [model[0].factor_in, model[0].factor_out]}, {"params": list(factors(model[2]))}]
    )
    for group, multiplier in zip(optimizer.param_groups[1:], (2.0, 1.5), strict=True):
        group["lr"] = group["lr"] * multiplier
        if group.get("decoupled_weight_decay"):
            group["weight_decay"] = group["weight_decay"] / (2 * multiplier)
    return optimizer


def factors(layer):
    return [getattr(layer, name) for name in layer.factor_names]


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_separate_groups_to_the_bit(name, with_closure):
    model, other = net(), net()
    optimizer, reference = OPTIMIZERS[name](model.parameters()), separate_groups(other, OPTIMIZERS[name])
    MatchedUpdates(optimizer, multipliers_of(model))
    for _ in range(3):
        make_gradients(other)
        reference.step()
        if with_closure:
            optimizer.step(functools.partial(whole_groups_and_gradients, optimizer, model))
        else:
            make_gradients(model)
            optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_factors_alone_steps(name):
    layer = factorize(orthogonal(8, 8), (2,))
    held = factors(layer)
    optimizer = OPTIMIZERS[name](held)
    MatchedUpdates(optimizer, {layer: 2.0})
    before = layer.factor_in.detach().clone()
    layer(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.factor_in, before)


def test_groups_are_the_same_objects_between_steps_and_rates_that_are_set_count():
    model = net()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}], lr=0.5
    )
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    matched = MatchedUpdates(optimizer, multipliers_of(model))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    make_gradients(model)
    optimizer.step()
    assert all(one is two for one, two in zip(optimizer.param_groups, groups, strict=True))
    assert all(group["params"] is held for group, held in zip(optimizer.param_groups, lists, strict=True))
    assert [group["lr"] for group in groups] == [0.5, 0.1]
    schedule.step()  # to zero: nothing moves, and nothing decays
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    matched.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_after_remove_steps_are_plain():
    model, other = net(), net()
    optimizer, plain = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    MatchedUpdates(optimizer, multipliers_of(model)).remove()
    make_gradients(model)
    make_gradients(other)
    optimizer.step()
    plain.step()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("look", ["state_dict", "next step", "remove"])
def test_a_step_that_fails_leaves_whole_groups_to_whoever_looks_next(look):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    matched = MatchedUpdates(optimizer, multipliers_of(model))
    make_gradients(model)
    optimizer.param_groups[0]["betas"] = None  # fails in the step's own code, after the split
    with pytest.raises(TypeError):
        optimizer.step()
    assert len(optimizer.param_groups) == 3
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    if look == "state_dict":
        assert len(optimizer.state_dict()["param_groups"]) == 1
    elif look == "next step":
        optimizer.step()
    else:
        matched.remove()
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.parameters()))]


def test_copies_and_pickles_of_the_optimizer_are_plain():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    MatchedUpdates(optimizer, multipliers_of(model))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert len(other.param_groups) == 1
        other.step()


def test_frozen_factors_do_not_move():
    model = net()
    model[0].factor_in.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    MatchedUpdates(optimizer, multipliers_of(model))
    before = model[0].factor_in.detach().clone()
    make_gradients(model)
    optimizer.step()
    assert torch.equal(model[0].factor_in, before)


def product(layer):
    return layer.weight.detach().clone()


@pytest.mark.parametrize("wanted", [1.2, 2.0])
@pytest.mark.parametrize(
    ("rows", "columns", "ranks", "kernel"),
    [(96, 64, (12,), ()), (64, 96, (20,), ()), (48, 40, (14, 16), (3, 3)), (48, 40, (20,), (3, 3))],
)
def test_the_first_step_is_as_long_as_the_dense_weights(rows, columns, ranks, kernel, wanted):
    """Of entries whose signs are independent; the weight is scaled to where the multiplier is between its bounds."""
    scales = (scale / 20 for scale in range(80, 0, -1))
    layers = (factorize(orthogonal(rows, columns, scale=scale, kernel=kernel), ranks) for scale in scales)
    layer = next(layer for layer in layers if update_multiplier(layer) >= wanted)
    multiplier = update_multiplier(layer)
    assert wanted <= multiplier < LARGEST_MULTIPLIER
    rate = 1e-4
    optimizer = torch.optim.Adam(factors(layer), lr=rate)
    MatchedUpdates(optimizer, {layer: multiplier})
    before = product(layer)
    for factor in factors(layer):
        factor.grad = torch.randn_like(factor)
    optimizer.step()
    moved = float((product(layer) - before).norm())
    assert moved == pytest.approx(rate * math.sqrt(before.numel()), rel=0.2)


def test_the_product_decays_as_the_dense_weight_would():
    layer = factorize(orthogonal(16, 16), (4,))
    optimizer = torch.optim.AdamW(factors(layer), lr=0.01, weight_decay=0.5)
    MatchedUpdates(optimizer, {layer: 2.0})
    before = product(layer)
    for factor in factors(layer):
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    torch.testing.assert_close(product(layer), before * (1 - 0.01 * 0.5), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scale", "expected"), [(1e3, 1.0), (1e-4, LARGEST_MULTIPLIER), (0.0, LARGEST_MULTIPLIER)])
def test_multipliers_have_bounds(scale, expected):
    layer = LowRankLinear(16, 16, 4)
    with torch.no_grad():
        for factor in factors(layer):
            factor.mul_(scale)
    assert update_multiplier(layer) == expected


def test_there_are_few_multipliers():
    found = {update_multiplier(factorize(orthogonal(32, 32, scale=s), (8,))) for s in torch.linspace(0.1, 4, 60)}
    assert len(found) <= 7


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.RAdam, torch.optim.Adagrad, type("Own", (torch.optim.Adam,), {})]
)
def test_other_optimizers_are_refused(kind):
    layer = LowRankLinear(8, 8, 2)
    optimizer = kind(layer.parameters(), lr=0.1)
    assert kind.__name__ in why_not_matched(optimizer)
    with pytest.raises(ValueError, match=f"updates can not be matched: {kind.__name__} is none of Adam"):
        MatchedUpdates(optimizer, {layer: 2.0})
