"""What asynchrony is expected to gain, and the pace of learning-rate schedules."""

import math

import pytest
import torch

from lightning_accel.async_sgd import estimate_traffic
from lightning_accel.async_sgd.estimate import copy_speed
from lightning_accel.strategies.worker_process.schedules import SharedPace, follow_pace, step_to_show


def estimate(**others):
    values = {"step_seconds": 0.1, "parameter_bytes": 10**6, "workers": 2, "copy_bytes_per_second": 1e9, **others}
    return estimate_traffic(**values)


def test_a_straggler_speaks_for_asynchrony_and_equal_workers_for_lock_step():
    slow = estimate(slowdown=3.0)
    assert slow.advice == "async"
    assert slow.async_throughput / slow.lock_step_throughput == pytest.approx(2.0, rel=0.05)
    assert estimate().advice == "ddp"


def test_large_models_push_less_often_and_a_busy_server_holds_workers_up():
    large = estimate(parameter_bytes=10**9, slowdown=3.0)
    assert large.n_push > estimate().n_push
    flooded = estimate(apply_seconds=10.0, slowdown=3.0)
    assert flooded.server_load > 1.0
    assert flooded.advice == "ddp"


def test_a_slow_link_speaks_against_lock_step_and_a_busy_server_for_shards():
    slow_link = estimate(parameter_bytes=10**8, link_bytes_per_second=1e8)
    assert slow_link.advice == "async"
    assert slow_link.lock_step_throughput == pytest.approx(2 / (0.1 + 0.95))
    assert estimate(link_bytes_per_second=1e8).lock_step_throughput == 20.0, "hidden behind the backward pass"
    assert estimate().shards == 1
    assert estimate(apply_seconds=0.2).shards == math.ceil(estimate(apply_seconds=0.2).server_load / 0.8) > 1


def test_copying_is_measured():
    assert 1e6 < copy_speed(1 << 20) < 1e13


@pytest.mark.parametrize("name", ["step_seconds", "parameter_bytes", "copy_bytes_per_second", "link_bytes_per_second"])
def test_estimates_refuse_what_makes_no_sense(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be > 0, got 0"):
        estimate(**{name: 0})


def test_alone_every_call_is_one_step():
    counts = [0, 0]
    pace = SharedPace(lambda: (counts[0], counts[1]))
    for made in (1, 1, 4, 0, 1):
        counts[0] += made
        counts[1] += made
        assert pace.advance() == 1


def test_two_workers_take_each_step_of_the_schedule_once_seen_from_either():
    counts = [0, 0]
    pace = SharedPace(lambda: (counts[0], counts[1]), limit=30)
    taken = 0
    for made in (1, 3, 2, 2, 5, 1):
        counts[0] += made
        counts[1] += 1
        taken += pace.advance()
        assert taken == counts[0]


def test_a_schedule_does_not_run_over_its_end():
    counts = [0, 0]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    follow_pace(cycle, SharedPace(lambda: (counts[0], counts[1]), limit=9), lambda: False)
    assert isinstance(cycle, torch.optim.lr_scheduler.OneCycleLR)
    optimizer.step()
    for _ in range(8):
        counts[0] += 3
        counts[1] += 1
        cycle.step()
    assert cycle.state_dict()["last_epoch"] == 9
    assert "step" not in cycle.state_dict()


def test_a_call_once_an_epoch_counts_once():
    counts = [0, 0]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    follow_pace(decay, SharedPace(lambda: (counts[0], counts[1])), lambda: True)
    counts[:] = [40, 20]
    optimizer.step()
    decay.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_no_multiple_of_a_period_is_jumped_over():
    assert step_to_show(3, 9, []) == 9
    assert step_to_show(3, 9, [5]) == 5
    assert step_to_show(5, 9, [5]) == 9
    assert step_to_show(3, 9, [100]) == 9
    assert step_to_show(3, 9, [6, 4]) == 4
