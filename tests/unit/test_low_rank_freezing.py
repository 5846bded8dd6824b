"""Phases are pure functions of time; what is frozen does not move, what is not does."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import (
    AdaptiveFreezing,
    FreezingSchedule,
    LowRankLinear,
    TuckerConv,
    freeze,
    frozen_parameters,
    low_rank_layers,
)
from lightning_accel.low_rank.adaptive import frozen_prefix
from lightning_accel.low_rank.freezing import frozen_factor_index, mean_of_phases


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        TuckerConv(3, 8, (3, 3), (2, 4)), nn.ReLU(), nn.Flatten(), LowRankLinear(8 * 16, 16, 4), nn.Linear(16, 2)
    )


def step(model, optimizer, set_to_none=True):
    optimizer.zero_grad(set_to_none=set_to_none)
    model(torch.randn(4, 3, 6, 6)).square().sum().backward()
    optimizer.step()


# --- schedule -------------------------------------------------------------------------------------------------------


def test_groups_take_turns():
    assert [frozen_factor_index(e, period_epochs=2, num_groups=2) for e in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [frozen_factor_index(e, period_epochs=1, num_groups=3) for e in range(4)] == [0, 1, 2, 0]


def test_phases_may_be_unequal():
    weighted = [frozen_factor_index(e, period_epochs=2, weights=(3.0, 1.0)) for e in range(8)]
    assert weighted == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("weights", [(9, 1), (1, 9), (1.2, 1), (99.0, 1.0), (3, 1), (2.73, 2.14), (1, 2, 4)])
@pytest.mark.parametrize("period", [1, 2, 5])
def test_phases_have_their_shares_however_short_the_period_is(weights, period):
    rests = [frozen_factor_index(e, period_epochs=period, num_groups=len(weights), weights=weights) for e in range(900)]
    for epochs in (90, 300, 900):
        for group, weight in enumerate(weights):
            rested = rests[:epochs].count(group)
            assert abs(rested - epochs * weight / sum(weights)) <= period * len(weights)


def groups(schedule, epochs=8, **more):
    return [schedule.frozen_group(epoch=epoch, **more) for epoch in range(epochs)]


def test_modes_start_end_and_the_last_phase():
    assert groups(FreezingSchedule(), 4) == [0, 1, 0, 1]
    assert groups(FreezingSchedule(mode="none"), 3) == [None] * 3
    assert groups(FreezingSchedule(mode="adaptive"), 3) == [None] * 3
    assert groups(FreezingSchedule(mode="fixed", fixed_group=1), 3) == [1] * 3
    assert groups(FreezingSchedule(start=2, end=5)) == [None, None, 0, 1, 0, None, None, None]
    assert groups(FreezingSchedule(period_epochs=2, final_trainable=3), total=8) == [0, 0, 1, 1, 0, None, None, None]
    assert groups(FreezingSchedule(mode="fixed", end=1), 2) == [0, None]


def test_times_are_averaged_pair_by_pair():
    assert mean_of_phases([[1.0, 2.0], [4.0, 8.0]], (2.0, 1.0)) == [2.0, 4.0]
    assert mean_of_phases([[1.0, 2.0], [4.0, 8.0]], (0.0, 1.0)) == [4.0, 8.0]


def test_steps_count_instead_of_epochs():
    schedule = FreezingSchedule(period_steps=10, start=5)
    assert schedule.counts_steps
    assert not FreezingSchedule().counts_steps
    assert [schedule.frozen_group(epoch=99, step=s) for s in (0, 4, 5, 14, 15, 25)] == [None, None, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "often"}, "`mode` must be none, fixed, sequential or adaptive, got 'often'"),
        ({"period_epochs": 1, "period_steps": 1}, "one of `period_epochs` and `period_steps`"),
        ({"period_epochs": 0}, "`period_epochs` must be >= 1 or None, got 0"),
        ({"period_steps": -1}, "`period_steps` must be >= 1 or None, got -1"),
        ({"weights": (1.0, 0.0)}, r"`weights\[1\]` must be > 0, got 0.0"),
        ({"weights": (1.0, math.nan)}, r"`weights\[1\]` must be > 0 and finite, got nan"),
        ({"start": -1}, "`start` must be >= 0, got -1"),
        ({"final_trainable": -1}, "`final_trainable` must be >= 0, got -1"),
        ({"start": 3, "end": 3}, "`end` must be > `start`, got 3 and 3"),
        ({"fixed_group": 2}, "`fixed_group` must be 0 or 1, got 2"),
    ],
)
def test_schedule_checks_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FreezingSchedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period_epochs": math.nan}, "`period_epochs` must be an integer >= 1 or None, got nan"),
        ({"period_steps": "3"}, "`period_steps` must be an integer .* got '3'. Write it without quotation marks"),
        ({"period_epochs": True}, "`period_epochs` must be an integer"),
        ({"weights": "11"}, "`weights` must be 2 numbers > 0, got '11'"),
        ({"weights": (1.0, "2")}, r"`weights\[1\]` must be a number > 0, got '2'"),
        ({"start": 1.5}, "`start` must be an integer >= 0, got 1.5"),
        ({"end": "last"}, "`end` must be an integer or None, got 'last'"),
        ({"final_trainable": None}, "`final_trainable` must be an integer >= 0, got None"),
        ({"fixed_group": "0"}, "`fixed_group` must be an integer"),
    ],
)
def test_schedule_refuses_other_kinds_of_values(arguments, message):
    with pytest.raises(TypeError, match=message):
        FreezingSchedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epoch": -1}, "`epoch` must be >= 0"),
        ({"period_epochs": 0}, "`period_epochs` must be >= 1"),
        ({"num_groups": 1}, "`num_groups` must be >= 2"),
        ({"weights": (1.0, 2.0, 3.0)}, "`weights` must be 2 numbers > 0"),
    ],
)
def test_index_checks_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        frozen_factor_index(**{"epoch": 0, "period_epochs": 1, "num_groups": 2, **arguments})


def test_a_last_phase_needs_a_known_end():
    with pytest.raises(ValueError, match="needs a known length of training"):
        FreezingSchedule(final_trainable=1).frozen_group(epoch=0)


# --- freezing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_frozen_factors_are_bit_identical_in_their_phase_and_move_in_the_other(make, set_to_none):
    model = net()
    optimizer = make(model.parameters())
    step(model, optimizer, set_to_none)  # momentum and gradients exist before the first phase
    for epoch in range(4):
        group = FreezingSchedule().frozen_group(epoch=epoch)
        frozen = freeze(model, group)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(2):
            step(model, optimizer, set_to_none)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name in frozen), (epoch, name)


def test_gradients_gathered_before_the_border_do_not_leak_over_it():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 6, 6)).sum().backward()  # first half of an accumulation
    frozen = freeze(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in frozen}
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_freeze_names_what_it_froze_and_none_thaws():
    model = net()
    assert freeze(model, 0) == ["0.core", "3.factor_in"]
    assert frozen_parameters(model) == {"0.core", "3.factor_in"}
    assert freeze(model, 1) == ["0.factor_in", "0.factor_out", "3.factor_out"]
    assert freeze(model, None) == []
    assert frozen_parameters(model) == set()


def test_what_the_user_froze_stays_frozen():
    model = net()
    model[0].requires_grad_(False)
    mine = frozen_parameters(model)
    for group in (0, 1, None):
        assert mine - {"0.bias"} <= set(freeze(model, group, user_frozen=mine))
        assert mine <= frozen_parameters(model)


def test_freezing_a_model_without_low_rank_layers_is_refused():
    with pytest.raises(ValueError, match="no low-rank layer to freeze"):
        freeze(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="no low-rank layer to freeze"):
        AdaptiveFreezing(threshold=0.1, window_steps=1).observe(nn.Linear(2, 2))


def test_there_are_two_groups():
    with pytest.raises(ValueError, match="`group` must be 0, 1 or None, got 2"):
        freeze(net(), 2)


def test_a_layer_alone_is_a_model_too():
    layer = LowRankLinear(4, 8, 2)
    assert freeze(layer, 0) == ["factor_out"]


# --- adaptive -------------------------------------------------------------------------------------------------------


def move(model, rates):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 + rates.get(name, 0.5))


def test_a_factor_that_hardly_moves_is_frozen_for_good():
    model = net()
    watch = AdaptiveFreezing(threshold=0.01, window_steps=2, max_events=5)
    resting = {"3.factor_in": 0.001}
    changes = []
    for _ in range(5):
        changes.append(watch.observe(model))
        move(model, resting)
    assert changes == [False, False, True, False, False]
    assert watch.apply(model) == ["3.factor_in"]
    assert frozen_parameters(model) == {"3.factor_in"}


def test_frozen_sets_change_at_most_so_often():
    model = net()
    watch = AdaptiveFreezing(threshold=0.01, window_steps=1, max_events=2)
    factors = [f"{name}.{part}" for name, layer in low_rank_layers(model).items() for part in layer.factor_names]
    sets = []
    for count in range(len(factors) + 1):
        move(model, dict.fromkeys(factors[:count], 0.0))
        watch.observe(model)
        sets.append(frozenset(watch.frozen))
    watch.observe(model)
    sets.append(frozenset(watch.frozen))
    assert len(set(sets)) <= 3
    assert sets[-1] == set(factors)


def test_state_round_trip_continues_exactly():
    model = net()
    watch = AdaptiveFreezing(threshold=0.3, window_steps=3)
    rates = {"3.factor_in": 0.01, "3.factor_out": 0.0, "0.core": 0.05}
    for _ in range(4):
        watch.observe(model)
        move(model, rates)
    other = AdaptiveFreezing(threshold=0.3, window_steps=3)
    other.load_state_dict(pickle.loads(pickle.dumps(watch.state_dict())))
    third = copy.deepcopy(watch)
    for _ in range(8):
        assert watch.observe(model) == other.observe(model) == third.observe(model)
        assert watch.settled == other.settled == third.settled
        move(model, rates)
    assert watch.frozen == other.frozen == third.frozen == set(rates)


def test_a_settled_prefix_is_frozen_as_a_whole():
    model = net()
    watch = AdaptiveFreezing(threshold=0.01, window_steps=1, max_events=1, order=("0", "3", "4"))
    still = {name: 0.0 for name, _ in model.named_parameters() if not name.startswith("4")}
    for _ in range(2):
        watch.observe(model)
        move(model, still)
    assert watch.apply(model) == sorted(still)
    x = torch.randn(2, 3, 6, 6)
    hidden = model[:4](x)
    assert not hidden.requires_grad  # the backward pass ends behind the prefix
    model(x).sum().backward()
    assert model[4].weight.grad is not None


def test_a_prefix_that_grows_later_is_frozen_while_events_are_left():
    model = net()
    for index in (0, 3):
        nn.init.ones_(model[index].bias)
    watch = AdaptiveFreezing(threshold=0.01, window_steps=1, max_events=3, order=("0", "3", "4"))
    factors = [name for name, _ in model.named_parameters() if "factor" in name or "core" in name]
    for _ in range(2):
        watch.observe(model)
        move(model, dict.fromkeys(factors, 0.0))
    watch.observe(model)
    assert watch.frozen == set(factors)
    still = {name: 0.0 for name, _ in model.named_parameters() if not name.startswith("4")}
    for _ in range(2):
        move(model, still)
        watch.observe(model)
    assert watch.frozen == set(still)
    assert watch.events == 2


def test_something_is_always_left_to_train():
    model = net()
    watch = AdaptiveFreezing(threshold=0.01, window_steps=1, max_events=5, order=("0", "3", "4"))
    for _ in range(4):
        watch.observe(model)
        watch.apply(model)
    assert any(parameter.requires_grad for parameter in model.parameters())
    factors_only = nn.Sequential(LowRankLinear(4, 4, 2, bias=False))
    watch = AdaptiveFreezing(threshold=0.01, window_steps=1)
    for _ in range(4):
        watch.observe(factors_only)
        watch.apply(factors_only)
    assert any(parameter.requires_grad for parameter in factors_only.parameters())


def test_prefix_ends_at_the_first_module_that_still_moves():
    parameters = ["a.w", "b.w", "b.bias", "c.w"]
    assert frozen_prefix(["a", "b", "c"], parameters, {"a.w", "b.w", "c.w"}) == {"a.w"}
    assert frozen_prefix([], parameters, set(parameters)) == set()


def test_adaptive_freezing_leaves_what_the_user_froze_to_the_user():
    model = net()
    watch = AdaptiveFreezing(threshold=0.01, window_steps=1, max_events=5)
    model[3].factor_in.grad = torch.ones_like(model[3].factor_in)
    for _ in range(2):
        watch.observe(model)
        move(model, {"3.factor_in": 0.0})
    watch.apply(model, user_frozen={"3.factor_in"})
    assert model[3].factor_in.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "`threshold` must be > 0, got 0.0"),
        ({"window_steps": 0}, "`window_steps` must be >= 1, got 0"),
        ({"max_events": 0}, "`max_events` must be >= 1, got 0"),
    ],
)
def test_adaptive_freezing_checks_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveFreezing(**{"threshold": 0.1, "window_steps": 1, **arguments})
