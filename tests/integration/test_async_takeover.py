"""Whoever takes over from a coordinator that died at the end validates the result in its place."""

import os
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
from async_modules import Classifier, WaitForAll, fit, loader
from async_workers import UNITS, Killed, optimizer_of, problem, run_thread_workers

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import Worker


class DiesValidating(pl.Callback):
    """Kill the coordinator's first incarnation as it begins to validate the last epoch."""

    def on_validation_epoch_start(self, trainer, pl_module):
        if trainer.sanity_checking or trainer.current_epoch + 1 < trainer.max_epochs:
            return
        if trainer.strategy._store.worker == 0 and trainer.strategy._store.incarnation == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("max_restarts", [0, 1], ids=["another worker", "the next incarnation"])
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*")
def test_a_result_is_validated_although_the_coordinator_died_validating_it(tmp_path, max_restarts):
    module = Classifier()
    strategy = AsyncSGDStrategy(max_restarts=max_restarts, heartbeat_seconds=300.0)
    trainer = fit(tmp_path, strategy, module, devices=2, callbacks=[WaitForAll(2), DiesValidating()])
    assert strategy.statistics.lost_batches == 0
    shown = float(trainer.callback_metrics["val/loss"])
    (found,) = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    ).validate(module, loader(32, shuffle=False), verbose=False)
    assert found["val/loss"] == pytest.approx(shown, rel=1e-5)
    assert torch.isfinite(torch.tensor(shown))


def test_who_takes_over_hands_over_the_steps_of_those_who_still_train():
    def work(store):
        x, y, model = problem()
        worker = Worker(store, store.settings, dict(model.named_parameters()), {}, [optimizer_of(model)])
        worker.join(worker.opening)
        worker.attach()
        if store.worker == 0 and store.incarnation == 0:  # dies with a block when all others were told of no more
            store.kv("here 1")
            assert store.lease(0, lambda: UNITS, final=True)
            store.kv("held", b"yes")
            store.kv("told of no more")
            raise Killed
        if store.worker == 1:
            store.kv("here 1", b"yes")
            store.kv("held")
        else:
            store.kv("ended its training")
        while block := store.lease(0, lambda: UNITS, final=True):
            for lease in block:
                worker.pending.append(lease.id)
                rows = torch.tensor(lease.unit)
                worker.optimizers[0].zero_grad()
                torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
                worker.optimizers[0].step()
        if store.worker == 1:
            store.kv("told of no more", b"yes")
            while not store.is_coordinator:
                time.sleep(0.01)
        else:
            store.kv("the rest is trained", b"yes")
        if store.finish():
            store.kv("ended its training", b"yes")
            store.stop(complete=True)
            handed_over.append(store.snapshot().parameters)
            store.kv("the rest is trained")  # hooks at the end take as long

    handed_over = []
    ending = run_thread_workers(2, work)
    assert ending.statistics.lost_batches == 0
    assert sorted(lease for entry in ending.log for lease in entry.leases) == [(0, i) for i in range(len(UNITS))]
    for mine, kept in zip(handed_over[-1], ending.snapshot.parameters, strict=True):
        assert torch.equal(mine, kept)
