"""Model-parallel replicas: processes that are one worker train as one process does, and die as one."""

import os

import pytest
import torch
from async_replicas import KillOneRank, SpreadBlock, SpreadMLP, data
from lightning.pytorch import Trainer

from lightning_accel.strategies.for_lightning import AsyncSGDStrategy


def fit(
    module, *, devices=2, epochs=1, callbacks=(), loader=None, ckpt_path=None, strategy=None, clip=None, **settings
):
    trainer = Trainer(
        gradient_clip_val=clip,
        accumulate_grad_batches=2 if clip else 1,
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=strategy or AsyncSGDStrategy(devices_per_replica=2, **settings),
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data() if loader is None else loader, data(2), ckpt_path=ckpt_path)
    return trainer


def plain(module, **settings):
    fit(module, devices=1, strategy="auto", **settings)
    return module


def assert_close(module, other):
    for (name, ours), theirs in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", [SpreadMLP, SpreadBlock])
def test_two_processes_train_a_spread_model_as_one_does_a_whole_one(model, optimizer):
    module = model(optimizer)
    before = [p.detach().clone() for p in module.parameters() if p.ndim > 1]
    trainer = fit(module)
    assert trainer.strategy.num_processes == 1
    assert trainer.global_step == 24
    assert_close(module, plain(model(optimizer)))
    after = [p for p in module.parameters() if p.ndim > 1]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.callback_metrics["val"] > 0


def children():
    """Processes that this one has started, zombies included."""
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return set(file.read().split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize(("worker", "rank"), [(1, 0), (1, 1), (0, 1)], ids=["leader", "follower", "of the coordinator"])
def test_a_replica_that_loses_a_rank_comes_back_and_the_others_go_on(worker, rank):
    before = children()
    module = SpreadMLP()
    killer = KillOneRank(worker, rank, batch=4)
    trainer = fit(module, devices=4, epochs=3, callbacks=[killer], loader=data(48), start_method="fork")
    statistics = trainer.strategy.statistics
    assert statistics.restarts == 1
    assert statistics.lost_batches == 0
    assert statistics.version == 3 * 48, "every batch once an epoch"
    assert children() == before, "no process is left"
    x, y = (torch.cat(parts) for parts in zip(*data(48), strict=True))
    begun = SpreadMLP()
    with torch.no_grad():
        assert (module(x) - y).square().mean() < 0.5 * (begun(x) - y).square().mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_replica_that_dies_for_good_leaves_its_batches_to_the_others():
    killer = KillOneRank(1, 1, batch=2)
    trainer = fit(SpreadMLP(), devices=4, epochs=2, callbacks=[killer], max_restarts=0, start_method="fork")
    assert trainer.strategy.statistics.restarts == 0
    assert trainer.strategy.statistics.version == 2 * 24


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_checkpoints_of_replicas_are_whole_and_go_on_anywhere(tmp_path):
    first = SpreadMLP()
    trainer = fit(first)
    path = tmp_path / "whole.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)
    assert all(type(value) is torch.Tensor for value in state["state_dict"].values())
    resumed, alone = SpreadMLP(), SpreadMLP()
    fit(resumed, epochs=2, ckpt_path=path)
    plain(alone, epochs=2)
    assert_close(resumed, alone)
    in_plain = SpreadMLP()
    plain(in_plain, epochs=2, ckpt_path=path)
    assert_close(in_plain, alone)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_gradient_that_is_not_finite_in_one_rank_is_dropped_by_all():
    class Broken(SpreadMLP):
        def on_after_backward(self):
            store = self.trainer.strategy._store
            if store.ranks.rank == 1 and self.trainer.fit_loop.total_batch_idx == 3:
                self.up.weight.grad.to_local().fill_(float("nan"))

    module = Broken()
    trainer = fit(module)
    assert trainer.strategy.statistics.dropped == 1
    assert trainer.strategy.statistics.version == 23
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_clipping_and_accumulation_are_those_of_one_process():
    module, alone = SpreadMLP(), SpreadMLP()
    fit(module, clip=0.05)
    plain(alone, clip=0.05)
    assert_close(module, alone)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_what_a_follower_alone_raises_ends_the_run_with_its_traceback():
    class Failing(SpreadMLP):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.strategy._store.ranks.rank == 1 and batch_idx == 2:
                raise KeyError("only here")

    with pytest.raises(RuntimeError, match="KeyError: 'only here'"):
        fit(Failing())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_clipping_by_a_norm_over_spread_and_other_layers_is_refused():
    with pytest.raises(RuntimeError, match="the norm of gradients of which some are spread"):
        fit(SpreadBlock(), clip=0.05)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_processes_that_all_have_the_whole_model_train_it():
    class Whole(SpreadMLP):
        def configure_model(self):
            pass

    module, alone = Whole(), Whole()
    fit(module)
    plain(alone)
    assert_close(module, alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_steps": 4}, "`local_steps=4` needs all of the parameters"),
        ({"compression": "fp16"}, "`compression=fp16` needs all of the parameters"),
        ({"staleness": "delay_compensation"}, "`staleness=delay_compensation` needs all of the parameters"),
        ({"buffers": "recompute"}, "`buffers=recompute` needs all of the parameters"),
    ],
)
def test_what_needs_all_parameters_in_one_process_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AsyncSGDStrategy(devices_per_replica=2, **settings)


def test_devices_that_make_no_whole_replicas_are_refused():
    with pytest.raises(ValueError, match="`devices_per_replica` must be"):
        AsyncSGDStrategy(devices_per_replica=0)
    with pytest.raises(Exception, match="`devices` must be a multiple of `devices_per_replica=2`, got 3"):
        fit(SpreadMLP(), devices=3)
