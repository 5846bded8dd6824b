"""The server of asynchronous SGD without processes: what it applies, refuses and drops, and what it logs."""

import copy

import pytest
import torch
from torch import nn

from lightning_accel.async_sgd import LogEntry, ParameterServer, Push, Settings
from lightning_accel.async_sgd.policy.outer.outer_step import OuterStep
from lightning_accel.async_sgd.policy.pushes import ASSIGN, NO_UPDATE, OUTER
from lightning_accel.async_sgd.policy.replay import replay
from lightning_accel.async_sgd.policy.stepping import get_groups, set_groups, step_optimizer
from lightning_accel.async_sgd.store import Opening


def opened(settings=None, *, momentum=0.9, buffers=()):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=momentum)
    names = [f"b{i}" for i in range(len(buffers))]
    server = ParameterServer(Opening(["w", "b"], parameters, names, list(buffers), [optimizer]), settings or Settings())
    server.admit(0, 0)
    server.admit(1, 0)
    server.live = 2
    server.leases.begin(0, list(range(8)))
    return server


def push(sequence, *, worker=0, base=0, scale=1.0, **others):
    gradients = [torch.full((3, 2), scale), torch.full((3,), scale)]
    values = {"incarnation": 0, "optimizer": 0, "gradients": gradients, **others}
    return Push(worker=worker, sequence=sequence, base_version=base, **values)


def test_a_push_is_one_step_of_the_real_optimizer():
    server = opened()
    parameters = [nn.Parameter(p.detach().clone()) for p in server.parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for sequence in (1, 2):
        assert server.apply(push(sequence, base=sequence - 1)) == "applied"
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(server.parameters, parameters, strict=True))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "maximize": True}),
        (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
        (torch.optim.AdamW, {"lr": 0.01}),
        (torch.optim.AdamW, {"lr": torch.tensor(0.01)}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.NAdam, {}),
    ],
    ids=str,
)
def test_the_server_steps_to_the_bit_as_the_optimizer_would(kind, options):
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(30, 7)), nn.Parameter(torch.randn(11))]
    ours = copy.deepcopy(plain)
    expected, actual = kind(plain, **options), kind(ours, **options)
    for _ in range(10):
        gradients = [torch.randn_like(p) for p in plain]
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient.clone()
        expected.step()
        step_optimizer(actual, ours, gradients, weight=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert actual.param_groups[0].get("foreach") is None  # the user's own choice stays as it was


def test_replayed_out_of_order_and_foreign_pushes_are_refused_and_change_nothing():
    server = opened()
    server.apply(push(1))
    before = server.snapshot()
    assert server.apply(push(1)) == "refused"  # a lost acknowledgement
    assert server.apply(push(3)) == "refused"
    assert server.apply(push(2, incarnation=7)) == "refused"
    assert server.apply(push(1, worker=9)) == "refused"
    after = server.snapshot()
    assert after.version == before.version == 1
    assert all(torch.equal(a, b) for a, b in zip(before.parameters, after.parameters, strict=True))
    assert server.statistics().refused == 4


def test_a_push_with_a_revoked_lease_is_refused():
    server = opened()
    lease = server.leases.grant(0, 0)[0].id
    server.leases.revoke(0)
    assert server.apply(push(1, leases=[lease])) == "refused"
    assert server.version == 0
    assert server.leases.grant(1, 0)[0].id == lease


def test_a_gradient_that_is_not_finite_leaves_parameters_and_momentum_and_its_batch_counts():
    server = opened()
    server.apply(push(1))
    before = server.snapshot()
    lease = server.leases.grant(0, 0)[0].id
    assert server.apply(push(2, base=1, finite=False, leases=[lease])) == "dropped"
    after = server.snapshot()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters, after.parameters, strict=True))
    momentum = [s["momentum_buffer"] for s in before.optimizer_states[0]["state"].values()]
    kept = [s["momentum_buffer"] for s in after.optimizer_states[0]["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, kept, strict=True))
    assert server.statistics().dropped == 1
    assert server.leases.committed(0) == 1


def test_a_gradient_that_is_too_stale_is_dropped_and_its_batch_given_out_again():
    server = opened(Settings(staleness="drop", drop_beyond=1))
    lease = server.leases.grant(1, 0)[0].id
    for sequence in (1, 2):
        server.apply(push(sequence, base=sequence - 1))
    assert server.apply(push(1, worker=1, base=0, leases=[lease])) == "dropped"
    assert server.leases.grant(0, 0)[0].id == lease


def test_inverse_weighs_the_learning_rate_and_puts_it_back():
    server = opened(Settings(staleness="inverse"), momentum=0.0)
    for sequence in (1, 2, 3, 4):
        server.apply(push(sequence, base=sequence - 1, scale=0.0))
    before = server.parameters[1].detach().clone()
    server.apply(push(1, worker=1, base=0))  # staleness 4
    assert torch.allclose(server.parameters[1], before - 0.1 / 4)
    assert server.optimizers[0].param_groups[0]["lr"] == 0.1


def test_delay_compensation_uses_the_parameters_the_gradient_belongs_to():
    server = opened(Settings(staleness="delay_compensation", compensation=0.5), momentum=0.0)
    start = [p.detach().clone() for p in server.parameters]
    server.apply(push(1, base=0, scale=2.0))
    moved = server.parameters[1].detach().clone()
    late = push(1, worker=1, base=0, scale=1.0)
    late.base = start
    server.apply(late)
    expected = moved - 0.1 * (1.0 + 0.5 * (moved - start[1]))
    assert torch.allclose(server.parameters[1], expected)


def test_a_missing_gradient_is_not_a_zero_gradient():
    server = opened()
    server.apply(push(1))
    before = server.parameters[0].detach().clone()
    server.apply(push(2, base=1, gradients=[None, torch.ones(3)]))
    assert torch.equal(server.parameters[0], before)  # momentum would have moved it


def test_only_the_coordinator_sets_hyper_parameters():
    server = opened()
    server.apply(push(1, worker=1, groups=[{"lr": 5.0}]), from_coordinator=False)
    assert server.optimizers[0].param_groups[0]["lr"] == 0.1
    server.apply(push(1, groups=[{"lr": 0.05}]), from_coordinator=True)
    assert server.optimizers[0].param_groups[0]["lr"] == 0.05
    with pytest.raises(ValueError, match=r"the optimizer was opened with 1 parameter groups, a push has 2"):
        set_groups(server.optimizers[0], [{}, {}])


def with_norm_statistics(settings=None):
    server = opened(settings, buffers=[torch.zeros(2), torch.tensor(3), torch.zeros(2)])
    server.buffer_roles = ["average", "count", "own"]
    return server


def test_averages_move_by_a_share_counts_rise_and_all_else_is_the_coordinators():
    server = with_norm_statistics()
    sent = [torch.ones(2), torch.tensor(2), torch.ones(2)]
    server.apply(push(1, worker=1, buffers=sent), from_coordinator=False)
    assert [b.tolist() for b in server.buffers] == [[0.5, 0.5], 3, [0.0, 0.0]]
    server.apply(push(1, base=1, buffers=[torch.ones(2), torch.tensor(5), torch.ones(2)]))
    assert [b.tolist() for b in server.buffers] == [[0.75, 0.75], 5, [1.0, 1.0]]
    server.live = 1
    alone = [torch.full((2,), 0.1), torch.tensor(4), torch.tensor([float("nan"), 1.0])]
    server.apply(push(2, base=2, buffers=alone))
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(server.buffers, alone, strict=True))


def test_statistics_of_a_bad_batch_spread_into_no_buffer():
    server = with_norm_statistics()
    bad = torch.tensor([float("nan"), float("inf")])
    server.apply(push(1, buffers=[bad, torch.tensor(3), bad]))
    assert [b.tolist() for b in server.buffers] == [[0.0, 0.0], 3, [0.0, 0.0]]
    server.buffers[0].fill_(float("nan"))  # from a checkpoint, say
    server.apply(push(2, base=1, buffers=[torch.ones(2), torch.tensor(3), torch.ones(2)]))
    assert server.buffers[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.0, float("-inf")]),
        torch.tensor([1 + 2j, -3j]),
        torch.tensor([True, False]),
        torch.tensor([3, 0], dtype=torch.uint8),
        torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
    ],
    ids=["infinite", "complex", "bool", "whole", "short"],
)
@pytest.mark.parametrize("live", [1, 2])
def test_any_buffer_is_that_of_the_coordinator(value, live):
    server = opened(buffers=[torch.zeros_like(value)])
    server.live = live
    server.apply(push(1, buffers=[value.clone()]))
    server.apply(push(1, worker=1, base=1, buffers=[value.clone()]), from_coordinator=False)
    assert torch.equal(server.buffers[0], value)


@pytest.mark.parametrize("rule", ["coordinator", "recompute"])
def test_buffers_of_the_coordinator_alone(rule):
    server = opened(Settings(buffers=rule), buffers=[torch.zeros(2)])
    server.apply(push(1, worker=1, buffers=[torch.ones(2)]), from_coordinator=False)
    assert server.buffers[0].tolist() == [0.0, 0.0]
    server.apply(push(1, buffers=[torch.ones(2)]), from_coordinator=True)
    assert server.buffers[0].tolist() == [1.0, 1.0]


def test_restore_puts_everything_back_and_refuses_what_was_based_on_it():
    server = opened()
    server.apply(push(1))
    cut = server.snapshot()
    server.apply(push(2, base=1))
    server.restore(cut)
    assert all(torch.equal(a, b) for a, b in zip(server.parameters, cut.parameters, strict=True))
    assert server.apply(push(3, base=2)) == "refused"
    assert server.apply(push(4, base=server.version)) == "applied"


def test_ways_are_damped_by_the_number_of_workers():
    server = opened()
    start = server.parameters[1].detach().clone()
    server.apply(push(1, optimizer=OUTER, scale=1.0))
    assert torch.allclose(server.parameters[1], start - 0.5)


def test_delayed_nesterov_adds_momentum_once_in_as_many_pushes_as_workers():
    parameter = torch.zeros(1)
    outer = OuterStep("delayed_nesterov", momentum=0.5)
    velocity, expected = 0.0, 0.0
    for pair in range(3):
        ways = (1.0 + pair, 3.0)
        for way in ways:
            outer.apply([parameter], [torch.tensor([way])], workers=2, weight=1.0)
            expected -= way / 2
        velocity = 0.5 * velocity + sum(ways) / 2
        expected -= 0.5 * velocity
        assert float(parameter) == pytest.approx(expected)


def test_replay_of_the_log_gives_the_same_bits():
    server = opened(Settings(record_log=True))
    parameters = [nn.Parameter(p.detach().clone()) for p in server.parameters]
    optimizer = copy.deepcopy(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    parameters = optimizer.param_groups[0]["params"]

    def gradient_of(entry, at):
        return [torch.sin(p * (1 + entry.worker)) for p in at]

    history = {0: [p.detach().clone() for p in server.parameters]}
    for worker, sequence, base in [(0, 1, 0), (1, 1, 0), (0, 2, 1), (1, 2, 2), (0, 3, 4)]:
        entry = LogEntry(worker, 0, sequence, base, 0, 0, 1.0, [], [])
        made = push(sequence, worker=worker, base=base, gradients=gradient_of(entry, history[base]))
        assert server.apply(made) == "applied"
        history[server.version] = [p.detach().clone() for p in server.published()]
    replay(server.log, parameters, [optimizer], gradient_of)
    assert all(torch.equal(a, b) for a, b in zip(server.parameters, parameters, strict=True))


def test_replay_refuses_a_log_with_holes():
    entries = [LogEntry(0, 0, 1, 0, 1, 0, 1.0, [], []), LogEntry(0, 0, 3, 1, 3, 0, 1.0, [], [])]
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    entries = [LogEntry(**{**vars(e), "groups": get_groups(optimizer)}) for e in entries]
    with pytest.raises(ValueError, match=r"the log goes from version 1 to 3; a step is missing"):
        replay(entries, [parameter], [optimizer], lambda *_: [torch.ones(1)])
    with pytest.raises(ValueError, match=r"version 1 is from before the log begins, at version 2"):
        replay(entries[1:], [parameter], [optimizer], lambda *_: [torch.ones(1)])


def test_a_push_without_update_commits_only():
    server = opened()
    lease = server.leases.grant(0, 0)[0].id
    assert server.apply(push(1, optimizer=NO_UPDATE, leases=[lease])) == "committed"
    assert server.version == 0
    assert server.leases.committed(0) == 1


def test_statistics_say_how_it_goes():
    server = opened()
    for sequence in (1, 2, 3):
        server.apply(push(sequence, base=0, pull_seconds=0.002))
    found = server.statistics()
    assert found.version == 3
    assert found.staleness_mean == 1.0
    assert found.worker_pushes == (3,)
    assert found.live_workers == 2
    assert found.pull_milliseconds == pytest.approx(2.0)
    assert found.updates_per_second > 0


def test_a_late_comer_starts_at_the_clock_of_the_slowest():
    server = opened()
    for sequence in (1, 2, 3):
        server.apply(push(sequence, base=sequence - 1))
    server.apply(push(1, worker=1, base=3))
    server.admit(2, 0)
    assert server.clocks == {0: 3, 1: 1, 2: 1}


def test_values_count_only_if_nobody_has_stepped_since():
    server = opened()
    server.apply(push(1))
    values = [None, torch.full((3,), 7.0)]
    assert server.apply(push(1, worker=1, base=0, optimizer=ASSIGN, gradients=values)) == "refused"
    assert server.apply(push(2, worker=1, base=1, optimizer=ASSIGN, gradients=values)) == "assigned"
    assert server.parameters[1].tolist() == [7.0] * 3
    assert server.version == 1
