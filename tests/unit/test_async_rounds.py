"""Rounds of local steps: when one closes, what each way in it weighs, and what the outer step makes of them."""

import math

import pytest
import torch
from torch import nn

from lightning_accel.async_sgd import Compression, Lease, LeaseBook, ParameterServer, Push, Settings
from lightning_accel.async_sgd.policy.encoding.compression import ErrorFeedback
from lightning_accel.async_sgd.policy.outer.outer_step import OuterStep
from lightning_accel.async_sgd.policy.outer.rounds import Rounds, shares_of
from lightning_accel.async_sgd.policy.pushes import OUTER
from lightning_accel.async_sgd.simulation.costs import Costs
from lightning_accel.async_sgd.simulation.run import simulate, simulate_times
from lightning_accel.async_sgd.store import Opening

ROUNDS = {"local_steps": 2, "min_workers": 2, "round_grace": 5.0}

# --- when


def test_a_round_closes_when_enough_have_pushed_and_the_grace_is_over():
    rounds = Rounds(Settings(**ROUNDS))
    able = {0, 1, 2}
    assert not rounds.is_due({}, able, now=0.0)
    assert not rounds.is_due({0}, able, now=100.0), "one is no quorum, however long it takes"
    assert rounds.closes_in(100.0) is None
    assert not rounds.is_due({0, 1}, able, now=100.0)
    assert not rounds.is_due({0, 1}, able, now=104.0), "the grace begins with the quorum"
    assert rounds.closes_in(104.0) == pytest.approx(1.0)
    assert rounds.is_due({0, 1}, able, now=105.0)
    rounds.closed(2)
    assert not rounds.is_due({0, 1}, able, now=106.0), "and anew in each round"


def test_a_round_does_not_wait_for_those_who_cannot_push():
    rounds = Rounds(Settings(**{**ROUNDS, "round_grace": math.inf}))
    assert rounds.is_due({0, 1, 2}, {0, 1, 2}, now=0.0), "all are there"
    rounds.closed(3)
    assert rounds.is_due({0, 1}, {1}, now=0.0), "the third has no more batches"
    rounds.closed(5)
    assert rounds.is_due({0}, set(), now=0.0), "the others are gone: nobody could make up the quorum"
    rounds.closed(6)
    assert not rounds.is_due({0, 1}, {0, 1, 2}, now=1e9), "an infinite grace waits for all"


def test_a_quorum_that_dies_is_waited_for_again():
    rounds = Rounds(Settings(**ROUNDS))
    assert not rounds.is_due({0, 1}, {0, 1, 2}, now=0.0)
    assert not rounds.is_due({0}, {0, 2}, now=4.0)
    assert not rounds.is_due({0, 2}, {0, 1, 2}, now=6.0), "its grace begins now"


def test_staleness_counts_rounds():
    rounds = Rounds(Settings(**ROUNDS))
    for version in (3, 5, 8):
        rounds.closed(version)
    assert [rounds.staleness_of(base) for base in (8, 7, 5, 4, 3, 0)] == [0, 1, 1, 2, 2, 3]


def test_shares_are_parts_of_the_samples_times_what_staleness_leaves():
    assert shares_of([30, 10], [1.0, 0.5]) == [0.75, 0.125]
    assert shares_of([0, 0], [1.0, 1.0]) == [0.5, 0.5]


def test_samples_of_a_lease_are_the_length_of_its_unit():
    book = LeaseBook(block=8)
    book.begin(0, [[1, 2, 3], 7, "name", (4, 5)])
    leases = [lease for _ in range(4) for lease in book.grant(0, 0)]
    assert sorted(leases, key=lambda lease: lease.position)[1] == Lease(0, 1, 7)
    assert book.samples([lease.id for lease in leases]) == 3 + 1 + 1 + 2


# --- how far


@pytest.mark.parametrize("outer", ["mean", "nesterov"])
def test_a_closed_round_is_a_step_of_torchs_own_optimizer_along_the_mean_way(outer):
    torch.manual_seed(0)
    start = [torch.randn(3, 2), torch.randn(4)]
    ours, theirs = [p.clone() for p in start], [nn.Parameter(p.clone()) for p in start]
    step = OuterStep(outer, momentum=0.8, rate=0.6)
    momentum = {"momentum": 0.8, "nesterov": True} if outer == "nesterov" else {}
    optimizer = torch.optim.SGD(theirs, lr=0.6, **momentum)
    for _ in range(4):
        ways = [[torch.randn_like(p) for p in start] for _ in range(3)]
        for way, share in zip(ways, (0.5, 0.2, 0.3), strict=True):
            step.gather(ours, way, share=share)
        step.close(ours)
        for i, parameter in enumerate(theirs):
            parameter.grad = 0.5 * ways[0][i] + 0.2 * ways[1][i] + 0.3 * ways[2][i]
        optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-5, atol=1e-6)


def test_nothing_moves_before_a_round_closes_and_a_parameter_without_a_way_rests():
    parameters = [torch.ones(2), torch.ones(2)]
    step = OuterStep("nesterov")
    step.gather(parameters, [torch.ones(2), None], share=1.0)
    assert [p.tolist() for p in parameters] == [[1.0, 1.0], [1.0, 1.0]]
    step.close(parameters)
    assert parameters[0].tolist() == pytest.approx([1.0 - 1.9] * 2)
    assert parameters[1].tolist() == [1.0, 1.0]


def test_the_rate_is_a_factor_on_ways_that_come_one_by_one_too():
    parameter = torch.zeros(1)
    OuterStep("mean", rate=0.5).apply([parameter], [torch.ones(1)], workers=4, weight=1.0)
    assert parameter.item() == -0.125


# --- the server


def opened(settings, units, workers=3):
    parameter = nn.Parameter(torch.zeros(2))
    server = ParameterServer(Opening(["w"], [parameter], [], [], [torch.optim.SGD([parameter], lr=1.0)]), settings)
    for worker in range(workers):
        server.admit(worker, 0)
    server.live = workers
    server.leases.begin(0, units)
    return server, parameter


def way(server, worker, size, value, *, sequence=1, base=0, **others):
    """Return a push of a worker for ``size`` units that it leases here."""
    leases = []
    while len(leases) < size:
        leases += [lease.id for lease in server.leases.grant(worker, 0)]
    return Push(worker, 0, sequence, base, OUTER, [torch.full((2,), value)], leases=leases, **others)


def test_ways_of_a_round_weigh_as_many_samples_as_are_behind_them():
    units = [[0, 1, 2], [3], [4, 5, 6], [7, 8, 9]]
    server, parameter = opened(Settings(**ROUNDS, lease_batches=1, record_log=True), units)
    pushes = [way(server, 0, 2, 1.0), way(server, 1, 1, 2.0), way(server, 2, 1, 3.0)]
    assert server.apply_round(pushes, coordinator=0) == ["applied"] * 3
    assert parameter.tolist() == pytest.approx([-(4 * 1.0 + 3 * 2.0 + 3 * 3.0) / 10] * 2)
    assert server.version == 3
    assert server.steps == [3]
    assert server.leases.remaining() == 0
    assert [entry.weight for entry in server.log] == pytest.approx([0.4, 0.3, 0.3])
    assert [entry.version for entry in server.log] == [1, 2, 3]


def test_what_does_not_count_leaves_its_part_to_the_others():
    server, parameter = opened(Settings(**ROUNDS, lease_batches=1), [[0], [1], [2], [3], [4]])
    broken = way(server, 0, 1, math.nan, finite=False)
    lost = way(server, 1, 1, 7.0)
    server.leases.give_back(1, lost.leases)
    server.leases.grant(2, 0)  # another has it by now
    good = way(server, 2, 1, 2.0)
    assert server.apply_round([broken, lost, good], coordinator=0) == ["dropped", "refused", "applied"]
    assert parameter.tolist() == [-2.0, -2.0]
    assert server.statistics().dropped == server.statistics().refused == 1


def test_a_way_that_is_late_by_rounds_weighs_less_or_is_dropped():
    server, parameter = opened(Settings(**ROUNDS, lease_batches=1), [[i] for i in range(8)])
    late = way(server, 2, 1, 8.0)
    for sequence in (1, 2):
        base = server.version
        pushes = [way(server, worker, 1, 0.0, sequence=sequence, base=base) for worker in (0, 1)]
        assert server.apply_round(pushes, coordinator=0) == ["applied"] * 2
    assert server.apply_round([late], coordinator=0) == ["applied"]
    assert parameter.tolist() == [-4.0, -4.0], "two rounds late: half of its way"
    dropping, _ = opened(Settings(**ROUNDS, lease_batches=1, staleness="drop", drop_beyond=0), [[i] for i in range(8)])
    late = way(dropping, 2, 1, 8.0)
    dropping.apply_round([way(dropping, 0, 1, 1.0)], coordinator=0)
    assert dropping.apply_round([late], coordinator=0) == ["dropped"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"min_workers": -1}, r"`min_workers` must be >= 0, got -1"),
        ({"round_grace": -0.5}, r"`round_grace` must be >= 0, got -0.5"),
        ({"outer_rate": 0.0}, r"`outer_rate` must be > 0, got 0.0"),
        ({"min_workers": 2}, r"rounds are of local steps; set `local_steps`"),
        ({"local_steps": 2, "outer": "nesterov"}, r"`outer='nesterov'` steps once a round"),
        ({"local_steps": 2, "min_workers": 2, "outer": "delayed_nesterov"}, r"use `outer='nesterov'` with rounds"),
        ({"local_steps": 2, "min_workers": 2, "max_staleness": 1}, r"leave `max_staleness` out"),
    ],
)
def test_rounds_that_make_no_sense_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Settings(**arguments)


@pytest.mark.parametrize("arguments", [{"min_workers": "2"}, {"min_workers": True}, {"round_grace": "1"}])
def test_settings_of_rounds_have_types(arguments):
    with pytest.raises(TypeError, match=next(iter(arguments))):
        Settings(**arguments)


def test_more_workers_than_there_are_cannot_be_waited_for():
    Settings(**ROUNDS).check_workers(2)
    with pytest.raises(ValueError, match=r"`min_workers` must be <= the number of workers 1, got 2"):
        Settings(**ROUNDS).check_workers(1)


# --- on the virtual clock


def seconds_of(workers, **settings):
    slow = [1.0] * (workers - 1) + [10.0]
    chosen = Settings(**{**ROUNDS, "lease_batches": 1, **settings})
    return simulate_times(200, settings=chosen, step_seconds=slow, costs=Costs(compute=1.0), jitter=0.0)


def test_a_quorum_does_not_go_at_the_pace_of_the_slowest():
    all_of_them = seconds_of(3, min_workers=3)
    two = seconds_of(3, min_workers=2, round_grace=0.0)
    assert all_of_them.throughput == pytest.approx(3 / 10.0, rel=0.05), "three ways of two steps in 20 s"
    assert two.throughput == pytest.approx(2.0 + 0.1, rel=0.05), "the two fast ones wait for each other alone"
    assert all_of_them.staleness_mean < 0.02, "all read what a round led to; at the end some have no more batches"
    assert two.worker_pushes[2] < two.worker_pushes[0] / 5
    waiting = seconds_of(3, min_workers=2, round_grace=2.0)
    assert waiting.throughput == pytest.approx(2 * 2 / 4.0, rel=0.15), "two seconds of steps, two of grace"


def regression():
    torch.manual_seed(0)
    x, module = torch.randn(64, 6), nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    y = torch.sin(x.sum(1, keepdim=True))
    return module, [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)] * 15


def loss_of(module, batch):
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def loss_after(settings, workers=3):
    module, batches = regression()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    found = simulate(module, loss_of, batches, optimizer, settings=settings, step_seconds=[1.0, 1.2, 2.0][:workers])
    assert sum(found.worker_pushes) * max(1, settings.local_steps) >= len(batches)
    return sum(loss_of(module, batch).item() for batch in batches[:8])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_workers": 3, "round_grace": math.inf},
        {"outer": "nesterov", "outer_momentum": 0.5, "outer_rate": 0.7},
        {"compression": Compression("int8")},
        {"compression": Compression("fp16"), "outer": "nesterov", "outer_momentum": 0.5, "outer_rate": 0.7},
    ],
    ids=str,
)
def test_every_kind_of_round_learns(settings):
    begun, batches = regression()
    before = sum(loss_of(begun, batch).item() for batch in batches[:8])
    assert loss_after(Settings(**{**ROUNDS, "local_steps": 3, **settings})) < 0.8 * before


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_compressed_gradients_train_as_whole_ones_do(name):
    whole = loss_after(Settings())
    assert loss_after(Settings(compression=Compression(name))) == pytest.approx(whole, rel=0.05)


def test_what_arrives_is_what_was_written_and_the_rest_comes_later():
    torch.manual_seed(0)
    gradient = torch.randn(50)
    feedback, other = ErrorFeedback(Compression("int8")), ErrorFeedback(Compression("int8"))
    total = sum(feedback.sent(0, gradient) for _ in range(100))
    assert (total - 100 * gradient).abs().max() < gradient.abs().max() / 100, "of 100 pushes less than one step is out"
    area = torch.empty(Compression("int8").nbytes(50, torch.float32), dtype=torch.uint8)
    other.write(0, gradient, area)
    read = Compression("int8").read(area, shape=gradient.shape, dtype=gradient.dtype)
    assert torch.equal(read, ErrorFeedback(Compression("int8")).sent(0, gradient))
