"""Never slower: whole steps decide, with made-up times."""

import math

import pytest
import torch
from torch import nn

from lightning_accel.low_rank import make_plan
from lightning_accel.low_rank.rank_search.gate import (
    apply_decision,
    layer_groups,
    marginal_reverts,
    payback_steps,
    verify_plan,
)
from lightning_accel.measure import compare_paired


def plan():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 32)})
    return make_plan(model, None, ratio=2.0, method="fixed")


class Steps:
    """A step of 10 s, changed by each layer that is low rank, with a drift that pairs share."""

    def __init__(self, gains):
        self.gains = gains
        self.asked = []

    def __call__(self, variants):
        self.asked.append(dict(variants))
        return {
            name: [10.0 - sum(self.gains[layer] for layer in low) + 0.1 * k for k in range(8)]
            for name, low in variants.items()
        }


def test_everything_that_pays_is_kept():
    steps = Steps({"a": 2.0, "b": 2.0, "c": 1.0})
    decision = verify_plan(plan(), steps)
    assert decision.keep == {"a", "b", "c"}
    assert decision.pays
    assert decision.ratio.median == pytest.approx(2.0, rel=0.1)
    assert "as fast" in decision.reason
    assert len(steps.asked) == 1


def test_layers_that_do_not_pay_are_reverted_and_the_rest_is_timed_again():
    steps = Steps({"a": 2.0, "b": 2.0, "c": -1.0})
    decision = verify_plan(plan(), steps)
    assert decision.keep == {"a", "b"}
    assert set(decision.reverted) == {"c"}
    assert "costs time in the whole step" in decision.reverted["c"]
    assert steps.asked[1] == {"dense": frozenset(), "all": {"a", "b"}}
    new = apply_decision(plan(), decision)
    assert [layer.ranks is None for layer in new.layers] == [False, False, True]
    assert new.layers[2].reason == decision.reverted["c"]


def test_equal_layers_stand_or_fall_together():
    assert layer_groups(plan()) == [{"a", "b"}, {"c"}]
    decision = verify_plan(plan(), Steps({"a": -2.0, "b": 1.0, "c": 1.0}))
    assert decision.keep == {"c"}


def test_model_stays_dense_if_the_whole_does_not_pay():
    decision = verify_plan(plan(), Steps({"a": -1.0, "b": -1.0, "c": -1.0}))
    assert not decision.pays
    assert decision.keep == frozenset()
    assert decision.reason == "no layer pays in the whole step"
    assert all(layer.ranks is None for layer in apply_decision(plan(), decision).layers)


def test_a_gain_within_the_noise_does_not_count():
    steps = {"dense": [1.0, 1.3] * 4, "all": [0.99, 1.0, 0.99, 1.0, 1.3, 1.3, 1.3, 0.9]}
    decision = verify_plan(plan().dense({"c"}, "for a test"), lambda variants: steps)
    assert not decision.pays
    assert "within the noise" in decision.reason


def test_more_than_a_little_may_be_asked_for():
    steps = Steps({"a": 0.2, "b": 0.2, "c": 0.1})
    assert verify_plan(plan(), steps).pays
    decision = verify_plan(plan(), steps, min_speedup=1.2)
    assert not decision.pays
    assert "more than x1.20 is asked for" in decision.reason


def test_set_up_must_be_paid_back_in_the_steps_that_remain():
    steps = Steps({"a": 2.0, "b": 2.0, "c": 1.0})  # saves 5 s a step
    assert verify_plan(plan(), steps, setup_seconds=49.9, remaining_steps=10).pays
    decision = verify_plan(plan(), steps, setup_seconds=51.0, remaining_steps=10)
    assert not decision.pays
    assert decision.reason == "the set-up took 51.0 s, paid back after 10 steps, but 10 remain"
    assert set(decision.reverted) == {"a", "b", "c"}
    assert verify_plan(plan(), steps, setup_seconds=1e9).pays  # unknown length: pay-back is not asked for


def test_a_plan_that_keeps_everything_dense_needs_no_timing():
    dense = plan().dense({"a", "b", "c"}, "for a test")
    decision = verify_plan(dense, lambda variants: pytest.fail("timed"))
    assert (decision.pays, decision.ratio) == (False, None)


def test_reverts_are_ordered_by_loss():
    slow, slower, fast = frozenset("s"), frozenset("l"), frozenset("f")
    contributions = {
        slow: compare_paired([1.0] * 6, [1.1] * 6),
        fast: compare_paired([1.0] * 6, [0.9] * 6),
        slower: compare_paired([1.0] * 6, [1.5] * 6),
    }
    assert marginal_reverts(contributions) == [slower, slow]


def test_payback():
    assert payback_steps(10.0, 0.5) == 20.0
    assert payback_steps(10.0, 0.0) == math.inf
    assert payback_steps(10.0, -1.0) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_speedup": 0.5}, "`min_speedup` must be >= 1, got 0.5"),
        ({"setup_seconds": -1.0}, "`setup_seconds` must be >= 0, got -1.0"),
        ({"remaining_steps": -1}, "`remaining_steps` must be >= 0, got -1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        verify_plan(plan(), Steps({}), **arguments)
