"""Staleness rules, leases, compression and settings of asynchronous SGD."""

import math

import pytest
import torch
from torch import nn

from lightning_accel.async_sgd import Compression, LeaseBook, Settings
from lightning_accel.async_sgd.policy.encoding.compression import ErrorFeedback
from lightning_accel.async_sgd.policy.rules import (
    compensate_delay,
    expected_gain,
    has_slack,
    learning_rate_weight,
    staleness_of,
)


@pytest.mark.parametrize(
    ("rule", "staleness", "weight"),
    [
        ("none", 9, 1.0),
        ("delay_compensation", 9, 1.0),
        ("look_ahead", 4, 0.25),  # of local steps
        ("inverse", 0, 1.0),
        ("inverse", 1, 1.0),
        ("inverse", 4, 0.25),
        ("drop", 3, 1.0),
        ("drop", 4, None),
    ],
)
def test_weight_of_a_stale_gradient(rule, staleness, weight):
    assert learning_rate_weight(staleness, rule=rule, threshold=3) == weight


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"`rule` must be one of look_ahead, inverse, none, delay_compensation, drop"):
        learning_rate_weight(0, rule="gently", threshold=0)


def test_a_gradient_from_the_future_is_refused():
    assert staleness_of(5, 3) == 2
    with pytest.raises(ValueError, match=r"`base_version` must be <= `version` 5"):
        staleness_of(5, 6)


def test_delay_compensation_is_exact_for_the_gradient_it_models():
    # for g(w) with g' = strength * g(base)^2 along the way, the first-order step is the line through base
    base, current = torch.tensor([1.0, -2.0]), torch.tensor([1.5, -2.0])
    gradient = torch.tensor([3.0, 0.5])
    found = compensate_delay(gradient, current, base, strength=0.1)
    assert torch.allclose(found, torch.tensor([3.0 + 0.1 * 9.0 * 0.5, 0.5]))
    assert torch.equal(compensate_delay(gradient, base, base, strength=0.1), gradient)


def test_slack_is_counted_from_the_slowest():
    assert has_slack(5, [5, 3], max_staleness=2)
    assert not has_slack(5, [5, 2], max_staleness=2)
    assert has_slack(5, [5, 0], max_staleness=None)
    assert has_slack(5, [], max_staleness=0)


def test_expected_gain_of_one_straggler():
    assert expected_gain(2, 3.0) == pytest.approx((1 + 1 / 3) / (2 / 3))
    assert expected_gain(8, 1.0) == 1.0
    with pytest.raises(ValueError, match=r"`workers` must be >= 1, got 0"):
        expected_gain(0, 1.0)
    with pytest.raises(ValueError, match=r"`slowdown` must be >= 1, got 0.5"):
        expected_gain(2, 0.5)


def test_a_dead_workers_units_go_to_the_next_who_asks_and_each_is_committed_once():
    book = LeaseBook(block=2)
    book.begin(0, list("abcdef"))
    first = book.grant(0, 0)
    second = book.grant(1, 0)
    assert [lease.unit for lease in first + second] == list("abcd")[: len(first) + len(second)]
    book.commit(0, [lease.id for lease in first])
    assert book.revoke(1) == len(second)
    again = book.grant(0, 0)
    assert again[0].id == second[0].id
    with pytest.raises(ValueError, match=r"worker 1 does not hold all of the leases"):
        book.commit(1, [second[0].id])


def test_an_epoch_that_was_interrupted_goes_on_with_what_is_left():
    book = LeaseBook(block=8)
    book.begin(3, list(range(4)), done=[0, 2])
    left = [lease.unit for _ in range(4) for lease in book.grant(0, 3)]
    assert left == [1, 3]
    assert book.state() == [{"epoch": 3, "units": [0, 1, 2, 3], "done": [0, 2]}]
    assert book.has_order(2)
    assert not book.has_order(4)


def test_grants_shrink_towards_the_end_and_leave_the_reserve():
    book = LeaseBook(block=4)
    book.begin(0, list(range(10)))
    sizes = []
    while block := book.grant(0, 0, workers=2, reserve=3):
        sizes.append(len(block))
    assert sum(sizes) == 7
    assert sizes[-1] == 1
    assert book.fresh(0) == 3


def test_lease_book_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"`block` must be >= 1, got 0"):
        LeaseBook(block=0)
    book = LeaseBook()
    book.begin(0, [1])
    with pytest.raises(ValueError, match=r"the order of epoch 0 is already known"):
        book.begin(0, [1])


@pytest.mark.parametrize("name", ["none", "fp16", "int8", "topk"])
def test_compression_reads_what_it_wrote(name):
    compression = Compression(name, kept=0.25)
    gradient = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    area = torch.zeros(compression.nbytes(40, torch.float32), dtype=torch.uint8)
    compression.write(gradient, area)
    found = compression.read(area, shape=gradient.shape, dtype=gradient.dtype)
    if name == "none":
        assert torch.equal(found, gradient)
    elif name == "topk":
        largest = gradient.abs().flatten().topk(10).values.min()
        assert torch.equal(found, torch.where(gradient.abs() >= largest, gradient, 0.0))
    else:
        step = {"fp16": 2**-11 * 4.0, "int8": float(gradient.abs().max()) / 254}[name]
        assert (found - gradient).abs().max() <= step * 1.001


@pytest.mark.parametrize("name", ["fp16", "int8", "topk"])
def test_zero_gradients_and_large_ones_survive_compression(name):
    compression = Compression(name, kept=1.0)
    for gradient in (torch.zeros(7), torch.full((7,), 1e6)):
        area = torch.zeros(compression.nbytes(7, torch.float32), dtype=torch.uint8)
        compression.write(gradient, area)
        assert compression.read(area, shape=gradient.shape, dtype=gradient.dtype).isfinite().all()


def test_error_feedback_sends_late_what_it_kept_back():
    compression = Compression("topk", kept=0.1)
    feedback = ErrorFeedback(compression)
    gradient = torch.linspace(0.1, 1.0, 10)
    received = torch.zeros(10)
    area = torch.zeros(compression.nbytes(10, torch.float32), dtype=torch.uint8)
    for _ in range(400):
        feedback.write(0, gradient, area)
        received += compression.read(area, shape=gradient.shape, dtype=gradient.dtype)
    assert torch.allclose(received / 400, gradient, atol=0.05)


def test_compression_refuses_unknown_names_and_fractions():
    with pytest.raises(ValueError, match=r"`compression` must be one of none, fp16, int8, topk, got 'zip'"):
        Compression("zip")
    with pytest.raises(ValueError, match=r"`kept` must be in \(0, 1\], got 0.0"):
        Compression("topk", kept=0.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n_push": 0}, r"`n_push` must be >= 1, got 0"),
        ({"n_fetch": 0}, r"`n_fetch` must be >= 1, got 0"),
        ({"local_steps": -1}, r"`local_steps` must be >= 0, got -1"),
        ({"max_staleness": -1}, r"`max_staleness` must be >= 0 or None, got -1"),
        ({"heartbeat_seconds": 0.0}, r"`heartbeat_seconds` must be > 0, got 0.0"),
        ({"straggler_grace": -1.0}, r"`straggler_grace` must be >= 0, got -1.0"),
        ({"stall_seconds": 0.0}, r"`stall_seconds` must be > 0 or None, got 0.0"),
        ({"outer_momentum": 1.0}, r"`outer_momentum` must be in \[0, 1\), got 1.0"),
        ({"buffers": "recomputed"}, r"`buffers` must be one of mean, coordinator, recompute, got 'recomputed'"),
        ({"validate": "later"}, r"`validate` must be one of coordinator, pause, got 'later'"),
        ({"local_steps": 2, "n_push": 2}, r"`local_steps` already says when to push and pull"),
        ({"local_steps": 2, "overlap": True}, r"with `local_steps` a push is waited for; leave `overlap` off"),
        ({"local_steps": 2, "staleness": "delay_compensation"}, r"`delay_compensation` needs gradients"),
    ],
)
def test_settings_refuse_what_makes_no_sense(arguments, match):
    with pytest.raises(ValueError, match=match):
        Settings(**arguments)


def test_finiteness_does_not_overflow():
    from lightning_accel.async_sgd.shared_memory.pushing import is_finite

    huge = torch.full((1000,), 3e38)
    assert is_finite([huge, -huge])
    assert is_finite([])
    assert is_finite([torch.empty(0)])
    for bad in (math.nan, math.inf, -math.inf):
        assert not is_finite([torch.zeros(3), nn.Parameter(torch.tensor([1.0, bad]))])
