"""Asynchronous training on a virtual clock: what it costs to share cores, a server, a link; and that the rules act."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_accel.async_sgd import Settings
from lightning_accel.async_sgd.simulation.advice import advise, ideal_throughput, reach_of_one_server, throughput
from lightning_accel.async_sgd.simulation.clock import Clock, Cores, Queue
from lightning_accel.async_sgd.simulation.costs import Costs, draw_slowness
from lightning_accel.async_sgd.simulation.lock_step import simulate_lock_step
from lightning_accel.async_sgd.simulation.run import simulate, simulate_times
from lightning_accel.async_sgd.simulation.training import Nothing, Training

EACH = Settings()


def run_of(costs, workers=1, settings=EACH, *, batches=400, jitter=0.0):
    return simulate_times(batches, settings=settings, step_seconds=[costs.step] * workers, costs=costs, jitter=jitter)


def regression():
    torch.manual_seed(0)
    x, module = torch.randn(64, 6), nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    y = torch.sin(x.sum(1, keepdim=True))
    return module, [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)] * 10


def loss_of(module, batch):
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def descent(module):
    return torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)


def trained(settings, workers, *, costs=None):
    module, batches = regression()
    steps = [1.0] * workers
    found = simulate(module, loss_of, batches, descent(module), settings=settings, step_seconds=steps, costs=costs)
    return found, [p.detach().clone() for p in module.parameters()], module, batches


def test_cores_are_shared_evenly_by_workers_and_the_server():
    clock, ends = Clock(), {}
    cores = Cores(clock, 2)
    server = Queue(clock, cores)
    for name in "abc":
        cores.run(2.0, lambda name=name: ends.setdefault(name, clock.now))
    server.serve(1.0, lambda: ends.setdefault("server", clock.now))
    clock.run(lambda: False)
    assert ends["server"] == pytest.approx(2.0), "four on two cores: half of one each"
    # 1 of 2 is computed then; the rest at the rate of 2/3
    assert [ends[name] for name in "abc"] == pytest.approx([3.5, 3.5, 3.5])
    assert server.seconds == pytest.approx(2.0), "it was busy"


def test_one_core_is_shared_with_the_server():
    clock, ends = Clock(), []
    cores = Cores(clock, 1)
    cores.run(1.0, lambda: ends.append(clock.now))
    Queue(clock, cores).serve(0.5, lambda: ends.append(clock.now))
    clock.run(lambda: False)
    assert ends == pytest.approx([1.0, 1.5])


def test_the_server_takes_an_idle_core_where_there_is_one():
    clock, ends = Clock(), {}
    cores = Cores(clock, 2)
    server = Queue(clock, cores)
    assert not cores.all_busy_beside(), "only who calls has a core"
    cores.run(2.0, lambda: ends.setdefault("worker", clock.now))
    assert cores.all_busy_beside()
    server.serve(0.5, lambda: ends.setdefault("server", clock.now))
    clock.run(lambda: False)
    assert ends == pytest.approx({"server": 0.5, "worker": 2.0})


def test_else_it_shares_somebodys_core_every_other_time():
    clock, ends = Clock(), []
    cores = Cores(clock, 2)
    for _ in range(2):
        cores.run(2.0, lambda: ends.append(clock.now))
        Queue(clock, cores).serve(0.5, lambda: ends.append(clock.now), crowded=True)
        clock.run(lambda: False)
    assert ends == pytest.approx([1.0, 2.5, 2.5 + 0.5, 2.5 + 2.0])


def test_two_that_compute_on_two_cores_interrupt_each_other():
    costs = Costs(compute=0.1, apply=0.02, cores=2)
    assert run_of(costs, 2, jitter=0.1).throughput == pytest.approx(2.0 / 0.14, rel=0.03), "half of its time each"
    assert run_of(replace(costs, cores=3), 2, jitter=0.1).throughput == pytest.approx(2.0 / 0.12, rel=0.03)
    waiting = Costs(compute=0.001, wait=0.099, apply=0.02, cores=2)
    assert run_of(waiting, 2, jitter=0.1).throughput == pytest.approx(2.0 / 0.12, rel=0.03)


def test_a_queue_serves_one_after_another():
    clock, ends = Clock(), []
    queue = Queue(clock)
    for seconds in (1.0, 0.0, 2.0):
        queue.serve(seconds, lambda: ends.append(clock.now))
    clock.run(lambda: False)
    assert ends == [1.0, 1.0, 3.0]
    assert queue.seconds == 3.0


def test_a_worker_alone_pays_for_every_part_of_its_step():
    costs = Costs(compute=0.1, push=0.01, pull=0.02, apply=0.03, message=0.001)
    assert run_of(costs).throughput == pytest.approx(1.0 / (0.16 + 2 * 0.001 + 2 * 0.001 / 4), rel=0.01)
    overlapping = run_of(costs, settings=Settings(overlap=True)).throughput
    assert overlapping == pytest.approx(1.0 / (0.13 + 0.001 / 2), rel=0.03), "the server's time is hidden"


def test_rarer_pushes_and_pulls_cost_less():
    costs = Costs(compute=0.1, push=0.1, apply=0.1, pull=0.1)
    rare = run_of(costs, settings=Settings(n_push=4, n_fetch=4)).throughput
    assert run_of(costs).throughput == pytest.approx(1.0 / 0.4, rel=0.02)
    assert rare == pytest.approx(4.0 / 0.7, rel=0.05)
    local = Costs(compute=0.1, push=0.1, apply=0.1, pull=0.1, update=0.05)
    assert run_of(local, settings=Settings(local_steps=4)).throughput == pytest.approx(4.0 / 0.9, rel=0.05)


@pytest.mark.parametrize(("cores", "expected"), [(None, 30.0), (2, 20.0), (1, 10.0)])
def test_workers_that_compute_compete_for_cores(cores, expected):
    assert run_of(Costs(compute=0.1, cores=cores), 3).throughput == pytest.approx(expected, rel=0.02)


def test_workers_that_wait_do_not():
    assert run_of(Costs(compute=0.001, wait=0.099, cores=1), 3).throughput == pytest.approx(30.0, rel=0.02)


def test_a_busy_server_and_a_busy_link_bound_all_workers():
    slow = Costs(compute=0.1, apply=0.05)
    assert run_of(slow, 8).throughput == pytest.approx(20.0, rel=0.05)
    assert run_of(slow, 8).server_load > 0.95
    assert run_of(Costs(compute=0.1, apply=0.05, shards=4), 8).throughput > 50.0
    link = Costs(compute=0.1, push_bytes=100, pull_bytes=10, link=1000.0)
    found = run_of(link, 8)
    assert found.throughput == pytest.approx(10.0, rel=0.05)
    assert found.link_load > 0.95
    assert run_of(Costs(compute=0.1, push_bytes=100, pull_bytes=10, link=1000.0, shards=4), 8).throughput > 25.0


def test_the_fast_wait_for_the_slow_with_max_staleness():
    def shares(settings):
        steps = [1.0, 1.0, 4.0]
        return simulate_times(300, settings=settings, step_seconds=steps, jitter=0.0).worker_pushes

    free, bound = shares(EACH), shares(Settings(max_staleness=1, lease_batches=1))
    assert free[0] > 3 * free[2]
    assert max(bound) - min(bound) <= 2


def test_too_stale_pushes_are_dropped_and_given_out_again():
    found = run_of(Costs(compute=1.0), 12, Settings(staleness="drop", drop_beyond=5), batches=240, jitter=0.1)
    assert found.dropped > 0
    lost = run_of(Costs(compute=1.0), 200, Settings(staleness="drop", drop_beyond=5), batches=400)
    assert lost.dropped > 1000, "ends although hardly any push counts"
    assert 0.0 <= lost.throughput < 60.0


@pytest.mark.parametrize(
    "settings",
    [
        Settings(staleness="none"),
        Settings(n_push=2, n_fetch=2),
        Settings(local_steps=2),
        Settings(local_steps=2, outer="delayed_nesterov"),
        Settings(staleness="delay_compensation"),
        Settings(overlap=True, n_push=2, n_fetch=3),
        Settings(max_staleness=2),
    ],
    ids=str,
)
def test_every_rhythm_trains_each_batch_once_and_learns(settings):
    found, parameters, module, batches = trained(settings, 3, costs=Costs(compute=1.0, apply=0.1, pull=0.1))
    begun, _ = regression()
    with torch.no_grad():
        before = sum(loss_of(begun, batch).item() for batch in batches)
        after = sum(loss_of(module, batch).item() for batch in batches)
    assert after < 0.95 * before
    per_push = settings.local_steps or settings.n_push
    assert len(batches) / per_push <= sum(found.worker_pushes) <= len(batches) / per_push + 3
    again = trained(settings, 3, costs=Costs(compute=1.0, apply=0.1, pull=0.1))[1]
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


def test_gradients_of_several_steps_are_their_mean():
    _, parameters, _, batches = trained(Settings(n_push=2, n_fetch=2), 1)
    plain, _ = regression()
    optimizer = descent(plain)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        ((loss_of(plain, first) + loss_of(plain, second)) / 2).backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, plain.parameters(), strict=True))


def test_what_is_watched_are_the_servers_parameters():
    module, batches = regression()
    seen = []
    simulate(
        module, loss_of, batches, descent(module), settings=EACH, step_seconds=[1.0, 1.0],
        observe=lambda seconds, count, values: seen.append((seconds, count, values[0].sum().item())),
    )  # fmt: skip
    assert [count for _, count, _ in seen] == list(range(1, len(batches) + 1))
    assert [seconds for seconds, _, _ in seen] == sorted(seconds for seconds, _, _ in seen)
    assert seen[-1][2] == next(module.parameters()).sum().item()


def test_lock_step_is_a_larger_batch_at_the_pace_of_the_slowest():
    module, batches = regression()
    found = simulate_lock_step(
        Training(module, loss_of, batches, descent(module)),
        step_seconds=[1.0, 3.0], costs=Costs(compute=1.0, update=0.5), jitter=0.0,
    )  # fmt: skip
    assert found.throughput == pytest.approx(2 / 3.5)
    plain, _ = regression()
    optimizer = descent(plain)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        ((loss_of(plain, first) + loss_of(plain, second)) / 2).backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_lock_step_waits_for_links_and_cores():
    link = Costs(compute=1.0, pull_bytes=100, link=50.0)
    found = simulate_lock_step(Nothing(20), step_seconds=[1.0, 1.0], costs=link, jitter=0.0)
    assert found.throughput == pytest.approx(2 / (1.0 + 2.0 - 0.5))
    crowded = simulate_lock_step(Nothing(20), step_seconds=[1.0] * 4, costs=Costs(compute=1.0, cores=2), jitter=0.0)
    assert crowded.throughput == pytest.approx(2.0)


def test_advice_pushes_less_often_where_links_are_slow_and_shards_where_that_does_not_do():
    near = Costs(compute=0.1, apply=1e-4)
    assert (advise(near, [1.0] * 4, EACH).n_push, advise(near, [1.0] * 4, EACH).shards) == (1, 1)
    far = Costs(compute=0.1, push_bytes=10**7, pull_bytes=10**7, link=1e9, apply=1e-3)
    found = advise(far, [1.0] * 4, EACH)
    assert found.n_push > 1
    assert found.shards == 1
    assert found.throughput >= 0.9 * found.ideal
    many = advise(Costs(compute=0.1, apply=0.1), [1.0] * 64, EACH)
    assert many.shards > 1
    assert many.throughput >= 0.9 * many.ideal


def test_where_one_server_saturates_is_where_throughput_ends_to_grow():
    costs = Costs(compute=0.1, apply=0.01)
    reach = reach_of_one_server(costs, costs.step)
    assert reach == pytest.approx(8.8)
    below, beyond = (throughput(costs, [1.0] * count, EACH) for count in (4, 32))
    assert below.server_load < 0.8 < beyond.server_load
    assert below.throughput > 0.85 * ideal_throughput(costs, [1.0] * 4)
    assert beyond.throughput < 0.5 * ideal_throughput(costs, [1.0] * 32)


def test_speeds_are_distributed_as_asked():
    assert draw_slowness("equal", 3, 2.0) == [1.0] * 3
    assert draw_slowness("one_slow", 3, 2.0) == [1.0, 1.0, 2.0]
    assert draw_slowness("half_slow", 5, 2.0) == [1.0, 1.0, 1.0, 2.0, 2.0]
    drawn = draw_slowness("lognormal", 1000, 3.0)
    assert drawn == sorted(drawn)
    assert drawn[950] == pytest.approx(3.0, rel=0.02)
    assert math.prod(drawn) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compute": -1.0}, "`compute` must be"),
        ({"compute": 0.0}, "a step must take some time"),
        ({"compute": 1.0, "cores": 0}, "`cores` must be"),
        ({"compute": 1.0, "link": 0.0}, "`link` must be"),
        ({"compute": 1.0, "shards": 0}, "`shards` must be"),
        ({"compute": 1.0, "push_bytes": -1}, "`push_bytes` must be"),
    ],
)
def test_costs_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Costs(**values)


def test_speeds_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="`speeds` must be"):
        draw_slowness("odd", 2, 2.0)
    with pytest.raises(ValueError, match="`slowdown` must be"):
        draw_slowness("equal", 2, 0.5)
