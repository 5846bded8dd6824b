"""Rounds of local steps with real workers: every batch counts once, whoever dies, and nobody waits for the gone."""

import math
import threading
from collections import Counter

import pytest
import torch
from async_modules import QUICK, Classifier, WaitForAll, fit, seeded
from async_workers import PUSH_STAGES, UNITS, Killed, optimizer_of, problem, run_thread_workers
from torch import nn

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import Worker

ROUNDS = {"local_steps": 2, "min_workers": 2, "round_grace": 60.0}  # a round that waited for it would be seen


def run(workers, epochs, *, die=None, all_there=True, **settings):
    """Train in threads by local steps; ``die`` is told the store, the number of ways so far and each stage."""

    def function(store):
        x, y, model = problem()
        optimizer = optimizer_of(model)
        worker = Worker(store, store.settings, dict(model.named_parameters()), {}, [optimizer])
        membership = worker.join(worker.opening)
        worker.attach()
        store.probe = lambda stage: die and die(store, sum(worker.own_steps), stage)
        store.kv(f"here {store.worker}", b"yes")
        for other in range(workers if all_there and store.incarnation == 0 else 0):
            store.kv(f"here {other}")
        for epoch in range(membership.epoch, epochs):
            while block := store.lease(epoch, lambda: UNITS, final=epoch == epochs - 1):
                for lease in block:
                    worker.pending.append(lease.id)
                    rows = torch.tensor(lease.unit)
                    optimizer.zero_grad()
                    nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
                    optimizer.step()
            worker.flush()

    return run_thread_workers(workers, function, **{**ROUNDS, **settings})


def leases_of(ending):
    return Counter(lease for entry in ending.log for lease in entry.leases)


@pytest.mark.parametrize("outer", ["mean", "nesterov"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_batch_is_in_one_way_that_counts(workers, outer):
    settings = {"min_workers": min(2, workers), "outer": outer, "outer_momentum": 0.5, "outer_rate": 0.5}
    ending = run(workers, 3, **settings)
    assert leases_of(ending) == Counter((epoch, i) for epoch in range(3) for i in range(len(UNITS)))
    assert ending.statistics.refused == ending.statistics.dropped == 0
    if workers > 1:
        assert any(entry.weight < 1.0 for entry in ending.log), "several ways in a round"
    x, y, model = problem()
    before = nn.functional.mse_loss(model(x), y)
    for parameter, value in zip(model.parameters(), ending.snapshot.parameters, strict=True):
        parameter.data.copy_(value)
    assert nn.functional.mse_loss(model(x), y) < 0.7 * before


@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
@pytest.mark.parametrize("stage", PUSH_STAGES)
def test_a_way_whose_worker_dies_counts_whole_or_not_at_all(stage, victim):
    def die(store, ways, now):
        if store.worker == victim and ways == 1 and now == stage and store.incarnation == 0:
            raise Killed

    ending = run(2, 2, die=die, max_restarts=1)
    assert leases_of(ending) == Counter((epoch, i) for epoch in range(2) for i in range(len(UNITS)))
    assert ending.statistics.restarts == 1


def test_a_round_whose_quorum_died_for_good_closes_with_who_is_left():
    def die(store, ways, now):
        if store.worker == 1 and now == "before":
            raise Killed

    ending = run(2, 2, die=die, max_restarts=0)
    assert {entry.worker for entry in ending.log} == {0}
    assert leases_of(ending) == Counter((epoch, i) for epoch in range(2) for i in range(len(UNITS)))


@pytest.mark.timeout(120)
def test_a_way_that_waits_when_the_run_ends_is_refused_and_its_worker_goes():
    waits = threading.Event()

    def function(store):
        x, y, model = problem()
        worker = Worker(store, store.settings, dict(model.named_parameters()), {}, [optimizer_of(model)])
        worker.join(worker.opening)
        worker.attach()
        store.kv(f"here {store.worker}", b"yes")
        store.kv(f"here {1 - store.worker}")
        if store.is_coordinator:  # could push, so the round of the other stays open
            assert waits.wait(60)
            store.stop()
            return
        store.probe = lambda stage: stage == "after the bell" and waits.set()
        for _ in range(2):
            nn.functional.mse_loss(model(x), y).backward()
            worker.optimizers[0].step()

    ending = run_thread_workers(2, function, **{**ROUNDS, "round_grace": math.inf})
    assert ending.statistics.refused == 1
    assert ending.statistics.version == 0


def test_more_workers_in_a_round_than_there_are_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"`min_workers` must be <= the number of workers 2, got 3"):
        run(2, 1, min_workers=3)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "int8"])
def test_a_fit_by_rounds_with_nesterov_steps_learns(tmp_path, compression):
    rounds = {"local_steps": 4, "min_workers": 2, "outer": "nesterov", "outer_momentum": 0.5, "outer_rate": 0.7}
    strategy = AsyncSGDStrategy(compression=compression, deterministic_replay=True, **QUICK, **rounds)
    module = seeded(Classifier, "momentum", dropout=0.0)
    trainer = fit(tmp_path, strategy, module, devices=2, callbacks=[WaitForAll(2)], size=256, epochs=3)
    assert leases_of(strategy.ending) == Counter((epoch, i) for epoch in range(3) for i in range(32))
    assert any(0.0 < entry.weight < 1.0 for entry in strategy.ending.log), "ways of two workers make a round"
    assert trainer.callback_metrics["val/loss"] < 0.5
    assert trainer.global_step > 0
