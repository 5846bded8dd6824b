"""Whoever takes over from a coordinator that died at the end validates the result in its place."""

import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from async_modules import Classifier, WaitForAll, fit, loader

from lightning_accel import AsyncSGDStrategy


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
