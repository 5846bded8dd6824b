"""Asynchronous SGD on Ray, on one machine: equal to plain training, every batch once, faults, what it loses."""

import logging
from collections import Counter

import pytest
import ray_fits
import torch
from async_modules import Adversaries, Classifier, DiesOnce, WaitForAll, equal, fit, seeded
from lightning.pytorch.callbacks import ModelCheckpoint
from ray_fork_server import forked_workers

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import Settings, WorkerFailedError
from lightning_accel.async_sgd.ray_engine.cluster import connected
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.run import run_on_ray

pytestmark = pytest.mark.slow

CALM = {"heartbeat_seconds": 300.0}  # a busy machine is no death


@pytest.fixture(autouse=True, scope="module")
def _ray():
    """Start Ray once, as a `fit` would for itself."""
    with pytest.MonkeyPatch.context() as patch, forked_workers(patch), connected(RayOptions(), cores=3):
        yield


@pytest.mark.parametrize(
    ("build", "arguments", "shards", "options"),
    [
        (Classifier, ("momentum", "onecycle"), 1, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}),
        (Classifier, ("adamw", "plateau"), 3, {}),
        (Adversaries, (), 2, {"validate": False}),
    ],
    ids=["momentum", "adamw", "two optimizers"],
)
def test_one_worker_on_ray_equals_plain_training_bit_for_bit(tmp_path, build, arguments, shards, options):
    plain, ours = seeded(build, *arguments), seeded(build, *arguments)
    expected = fit(tmp_path, "auto", plain, **options)
    actual = fit(tmp_path, AsyncSGDStrategy(engine="ray", shards=shards, **CALM), ours, **options)
    assert equal(plain, ours) == []
    assert actual.global_step == expected.global_step
    assert {k: float(v) for k, v in actual.callback_metrics.items()} == {
        k: float(v) for k, v in expected.callback_metrics.items()
    }
    for one, other in zip(expected.optimizers, actual.optimizers, strict=True):
        mine, theirs = one.state_dict(), other.state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        assert mine["state"].keys() == theirs["state"].keys()
        for place, state in mine["state"].items():
            values = [(value, theirs["state"][place][name]) for name, value in state.items()]
            assert all(a is b or torch.equal(a, b) for a, b in values)


def test_two_workers_on_ray_share_the_data_validate_one_cut_and_checkpoint(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", save_last=True)
    strategy = AsyncSGDStrategy(engine="ray", shards=2, deterministic_replay=True, **CALM)
    module = seeded(Classifier, "momentum", "onecycle")
    trainer = fit(tmp_path, strategy, module, devices=2, callbacks=[WaitForAll(2), best], enable_checkpointing=True)
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(2) for i in range(8))
    assert {entry.worker for entry in strategy.ending.log} == {0, 1}
    assert trainer.callback_metrics["val/count"] == 32
    assert equal(module, Classifier.load_from_checkpoint(best.last_model_path)) == []
    resumed = fit(tmp_path, "auto", seeded(Classifier, "momentum"), epochs=2, ckpt=None)
    assert resumed.global_step == trainer.global_step == 16


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed without the callbacks, on purpose
@pytest.mark.parametrize(
    "settings",
    [{"compression": "int8"}, {"local_steps": 4, "max_staleness": 2}, {"staleness": "delay_compensation"}],
    ids=str,
)
def test_rhythms_rules_and_compressions_work_on_ray(tmp_path, settings):
    strategy = AsyncSGDStrategy(engine="ray", deterministic_replay=True, **CALM, **settings)
    module = seeded(Classifier, "momentum")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    waiting = [WaitForAll(2)] if "max_staleness" not in settings else []
    fit(tmp_path, strategy, module, devices=2, callbacks=waiting, size=128)
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    if "local_steps" not in settings:
        assert leases == Counter((epoch, i) for epoch in range(2) for i in range(16))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}  # a bias before batch norm may rest
    assert not any(torch.equal(p, before[name]) for name, p in weights.items())


@pytest.mark.parametrize("compression", ["fp16", "int8"])
def test_rounds_with_nesterov_steps_and_compressed_ways_on_ray(tmp_path, compression):
    rounds = {"local_steps": 4, "min_workers": 2, "outer": "nesterov", "outer_momentum": 0.5, "outer_rate": 0.7}
    strategy = AsyncSGDStrategy(
        engine="ray", shards=2, compression=compression, deterministic_replay=True, **CALM, **rounds
    )
    module = seeded(Classifier, "momentum", dropout=0.0)
    trainer = fit(tmp_path, strategy, module, devices=2, callbacks=[WaitForAll(2)], size=256, epochs=3)
    log = strategy.ending.log
    leases = Counter(lease for entry in log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(3) for i in range(32))
    assert {entry.worker for entry in log} == {0, 1}
    assert any(0.0 < entry.weight < 1.0 for entry in log), "ways of two workers make a round"
    assert trainer.callback_metrics["val/loss"] < 0.5


@pytest.mark.parametrize("stage", ["half-way", "before the flag", "after the flag"])
def test_a_worker_killed_in_a_push_leaves_whole_pushes_and_every_batch_once(stage):
    victim = 0 if stage == "half-way" else 1  # worker 0 coordinates
    _, ending = run_on_ray(
        ray_fits.train,
        (2, (victim, stage, 3)),
        workers=2,
        settings=Settings(record_log=True, **CALM),
        options=RayOptions(shards=2),
    )
    leases = Counter(lease for entry in ending.log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(2) for i in range(ray_fits.BATCHES))
    assert [entry.version for entry in ending.log] == list(range(1, 1 + len(ending.log)))
    assert ending.statistics.restarts == 1
    assert all(torch.isfinite(p).all() for p in ending.snapshot.parameters)


def test_a_worker_killed_in_a_fit_is_started_again_and_no_batch_is_lost(tmp_path):
    strategy = AsyncSGDStrategy(engine="ray", deterministic_replay=True, **CALM)
    callbacks = [WaitForAll(2), DiesOnce(str(tmp_path / "flag"), rank=1)]
    trainer = fit(tmp_path, strategy, seeded(Classifier, "momentum"), devices=2, size=128, callbacks=callbacks)
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(2) for i in range(16))
    assert strategy.statistics.restarts == 1
    assert trainer.callback_metrics["val/count"] == 32


@pytest.mark.parametrize(("shards", "devices"), [(1, 1), (2, 2)])
def test_a_killed_shard_comes_back_and_loses_no_more_versions_than_it_may(tmp_path, caplog, shards, devices):
    strategy = AsyncSGDStrategy(engine="ray", shards=shards, shard_snapshot_steps=4, deterministic_replay=True, **CALM)
    module = seeded(Classifier, "momentum", dropout=0.0)
    callbacks = [WaitForAll(devices), ray_fits.KillsAShard(str(tmp_path / "flag"))]
    with caplog.at_level(logging.WARNING, "lightning_accel"):
        trainer = fit(tmp_path, strategy, module, devices=devices, size=256, epochs=3, callbacks=callbacks)
    assert (tmp_path / "flag").exists()
    assert 0 <= strategy.statistics.lost_versions <= 2 * 4
    assert "shard 0 is gone; another takes its place" in caplog.text
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    expected = Counter((epoch, i) for epoch in range(3) for i in range(32))
    assert leases <= expected
    missing = expected - leases
    assert missing.total() <= (2 if devices == 1 else 0), "a loop that is alone has counted what was under way"
    assert trainer.callback_metrics["val/loss"] < 0.5


def test_an_exception_in_a_worker_on_ray_ends_the_run_and_is_its_cause():
    with pytest.raises(WorkerFailedError, match="divides by zero") as found:
        run_on_ray(ray_fits.fail, (), workers=1, settings=Settings(), options=RayOptions())
    assert isinstance(found.value.__cause__, ArithmeticError)
