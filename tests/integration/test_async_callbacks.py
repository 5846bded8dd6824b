"""Callbacks that change parameters, layers or gradients reach every asynchronous worker and the server."""

import functools
import logging

import pytest
import torch
from async_modules import (
    QUICK,
    ClampedBetweenSteps,
    ClampsForValidation,
    Classifier,
    Clipped,
    DiesOnce,
    Follower,
    ForgetsMoments,
    RunningCell,
    SwapsAverageIn,
    Tells,
    WaitForAll,
    fit,
    seeded,
    sequences,
)
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_accel import AsyncSGDStrategy, load_from_checkpoint
from lightning_accel.async_sgd import WorkerFailedError
from lightning_accel.callbacks import (
    IntraStreamScheduling,
    L1InfProjection,
    MultilevelProjection,
    RankQuantization,
    SequentialFreezing,
)
from lightning_accel.low_rank import low_rank_layers

pytestmark = pytest.mark.slow


def equal(one, other):
    return [key for key, value in one.state_dict().items() if not torch.equal(value, other.state_dict()[key])]


def low_rank(**settings):
    return RankQuantization(**{"ratio": 2.0, "method": "fixed", "when": 1, "on_loss": "keep", **settings})


def test_one_worker_switches_ranks_as_a_plain_run_does(tmp_path):
    plain, ours = (seeded(Classifier, "momentum", width=32) for _ in range(2))
    fit(tmp_path, "auto", plain, epochs=3, callbacks=[low_rank(), SequentialFreezing()])
    trainer = fit(tmp_path, "async_sgd", ours, epochs=3, callbacks=[low_rank(), SequentialFreezing()])
    assert low_rank_layers(plain)
    assert equal(plain, ours) == []
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in ours.parameters()}
    assert set(trainer.optimizers[0].state) == set(ours.parameters())


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_ranks_switched_by_one_of_two_workers_reach_the_other_the_server_and_the_checkpoint(tmp_path, optimizer):
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True, filename="end")
    callback = low_rank()
    module = seeded(Classifier, optimizer, width=32)
    trainer = fit(
        tmp_path,
        AsyncSGDStrategy(deterministic_replay=True, **QUICK),
        module,
        devices=2,
        epochs=4,
        size=256,
        callbacks=[WaitForAll(2), WaitForAll(2, epoch=3), callback, SequentialFreezing(), saved],
        enable_checkpointing=True,
    )
    assert low_rank_layers(module)
    assert callback.structure_state() == "low rank"
    assert callback.plan is not None
    assert list(dict(module.named_parameters())) == trainer.strategy.ending.state.names
    log = trainer.strategy.ending.log
    assert {entry.worker for entry in log if entry.leases[0][0] == 3} == {0, 1}, "both train the new layers"
    seen = sorted(lease for entry in log for lease in entry.leases)
    assert seen == [(epoch, i) for epoch in range(4) for i in range(32)]
    assert all(p.requires_grad and torch.isfinite(p).all() for p in module.parameters())
    again = load_from_checkpoint(Classifier, saved.last_model_path)
    assert equal(module, again) == []
    resumed = fit(
        tmp_path,
        "async_sgd",
        seeded(Classifier, optimizer, width=32),
        devices=2,
        epochs=5,
        ckpt=saved.last_model_path,
        callbacks=[low_rank(), SequentialFreezing()],
        size=256,
    )
    assert low_rank_layers(resumed.lightning_module)


def test_a_worker_that_is_started_again_after_the_switch_gets_the_new_layers(tmp_path):
    module = seeded(Classifier, "momentum", width=32)
    trainer = fit(
        tmp_path,
        AsyncSGDStrategy(deterministic_replay=True, **QUICK),
        module,
        devices=2,
        epochs=3,
        size=256,
        callbacks=[WaitForAll(2), low_rank(), DiesOnce(str(tmp_path / "died"), 1, epoch=2)],
    )
    assert trainer.strategy.statistics.restarts == 1
    assert low_rank_layers(module)
    seen = sorted(lease for entry in trainer.strategy.ending.log for lease in entry.leases)
    assert seen == [(epoch, i) for epoch in range(3) for i in range(32)]


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "projection",
    [
        lambda: L1InfProjection(1.0, parameters=("net.0.*",), module_types=None),
        lambda: MultilevelProjection(1.0, norms=("l1", "l2"), parameters=("net.0.*",), module_types=None),
    ],
    ids=["l1inf", "multilevel"],
)
def test_projected_weights_are_the_servers(tmp_path, devices, projection):
    module = seeded(Classifier, "momentum")
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True)
    options = {"callbacks": [projection(), saved], "enable_checkpointing": True}
    fit(tmp_path, "async_sgd", module, devices=devices, **options)
    weight = module.net[0].weight.detach()
    if isinstance(options["callbacks"][0], L1InfProjection):
        assert float(weight.abs().amax(1).sum()) <= 1.0 + 1e-5
    else:
        assert float(weight.norm(dim=1).sum()) <= 1.0 + 1e-5
    if devices == 1:
        plain = seeded(Classifier, "momentum")
        fit(tmp_path, "auto", plain, callbacks=[projection()])
        assert equal(plain, module) == []


@pytest.mark.parametrize("devices", [1, 2])
def test_parameters_changed_between_steps_are_the_servers(tmp_path, devices):
    module = seeded(Classifier, "momentum")
    fit(tmp_path, "async_sgd", module, devices=devices, callbacks=[ClampedBetweenSteps()])
    assert max(float(p.detach().abs().max()) for p in module.parameters()) <= 0.05 + 1e-9
    if devices == 1:
        plain = seeded(Classifier, "momentum")
        fit(tmp_path, "auto", plain, callbacks=[ClampedBetweenSteps()])
        assert equal(plain, module) == []


def test_weights_clipped_by_hand_between_two_optimizers_equal_plain_training(tmp_path):
    plain, ours = seeded(Clipped), seeded(Clipped)
    fit(tmp_path, "auto", plain, validate=False)
    fit(tmp_path, "async_sgd", ours, validate=False)
    assert equal(plain, ours) == []


def test_an_average_of_weights_ends_in_the_module(tmp_path):
    plain, ours = seeded(Classifier, "momentum"), seeded(Classifier, "momentum")
    fit(tmp_path, "auto", plain, callbacks=[EMAWeightAveraging(decay=0.5)])
    fit(tmp_path, "async_sgd", ours, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert equal(plain, ours) == []


@pytest.mark.parametrize("callback", [SwapsAverageIn, ClampsForValidation])
def test_checkpoints_of_a_validation_hold_what_callbacks_made_of_the_weights_by_then(tmp_path, callback):
    modules, states, losses = [], [], []
    for strategy in "auto", "async_sgd":
        modules.append(seeded(Classifier, "momentum"))
        saved = ModelCheckpoint(tmp_path / strategy, save_last=True)
        options = {"callbacks": [callback(), saved], "enable_checkpointing": True}
        trainer = fit(tmp_path, strategy, modules[-1], **options)
        states.append(torch.load(saved.last_model_path, weights_only=True)["state_dict"])
        losses.append(trainer.callback_metrics["val/loss"])
    assert equal(*modules) == []
    assert [key for key, value in states[0].items() if not torch.equal(value, states[1][key])] == []
    assert losses[0] == losses[1]


@pytest.mark.parametrize("devices", [1, 2])
def test_what_no_optimizer_has_follows_local_steps_as_it_does_plain_ones(tmp_path, devices):
    plain, ours = seeded(Follower), seeded(Follower)
    before = plain.target.weight.detach().clone()
    fit(tmp_path, "auto", plain)
    fit(tmp_path, AsyncSGDStrategy(local_steps=2, **QUICK), ours, devices=devices)
    assert not torch.equal(ours.target.weight, before)
    if devices == 1:
        pairs = zip(plain.parameters(), ours.parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(ForgetsMoments, how) for how in ("cleared", "replaced", "loaded")),
        lambda: L1InfProjection(
            target_sparsity=0.5, mode="project_then_retrain", retrain_epoch=1, rewind="init", parameters=("net.0.*",)
        ),
    ],
    ids=["cleared", "replaced", "loaded", "rewound"],
)
def test_moments_that_a_callback_forgets_are_forgotten_by_the_server(tmp_path, make):
    plain, ours = seeded(Classifier, "momentum"), seeded(Classifier, "momentum")
    fit(tmp_path, "auto", plain, epochs=3, callbacks=[make()])
    fit(tmp_path, "async_sgd", ours, epochs=3, callbacks=[make()])
    assert equal(plain, ours) == []
    trainer = fit(tmp_path, "async_sgd", seeded(Classifier, "momentum"), epochs=3, callbacks=[make()], devices=2)
    assert trainer.global_step == 24


def test_what_is_written_into_the_state_of_an_optimizer_in_a_worker_is_refused(tmp_path):
    with pytest.raises(WorkerFailedError, match="can be cleared or loaded in a worker, not read or written"):
        fit(tmp_path, "async_sgd", seeded(Tells))


def test_parameters_changed_between_steps_and_compression_exclude_each_other(tmp_path):
    with pytest.raises(WorkerFailedError, match=r"parameters were changed between two steps.*`compression='none'`"):
        fit(tmp_path, AsyncSGDStrategy(compression="fp16", **QUICK), seeded(Follower))


@pytest.mark.parametrize("devices", [1, 2])
def test_recurrent_schedules_run_in_every_worker(tmp_path, devices):
    module, callback = seeded(RunningCell), IntraStreamScheduling("native")
    fit(tmp_path, "async_sgd", module, devices=devices, callbacks=[callback], data=sequences(), validate=False)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    if devices == 1:
        plain = seeded(RunningCell)
        fit(tmp_path, "auto", plain, callbacks=[IntraStreamScheduling("native")], data=sequences(), validate=False)
        assert equal(plain, module) == []


def test_a_run_too_short_for_low_rank_says_so_and_stays_dense(tmp_path, caplog):
    module = seeded(Classifier, "momentum", width=32)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        fit(tmp_path, "async_sgd", module, devices=2, callbacks=[RankQuantization(when=1), SequentialFreezing()])
    assert not low_rank_layers(module)
