import logging
import math

import compare_fits as fits
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn

from lightning_accel.evidence.measured_runs.runs import measure_fit
from lightning_accel.evidence.measured_runs.step_clock import PHASES, StepClock
from lightning_accel.lightning_private.decision_line import say_decision


class Hands:
    """A clock that only moves when someone works."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


class Worker(Callback):
    """Works in two hooks, and after the optimizer's step."""

    def __init__(self, hands):
        self.hands = hands

    def on_fit_start(self, trainer, pl_module):
        self.handles = [o.register_step_post_hook(lambda *_: self.hands.work(100.0)) for o in trainer.optimizers]

    def on_fit_end(self, trainer, pl_module):
        for handle in self.handles:
            handle.remove()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.hands.work(200.0)

    def on_after_backward(self, trainer, pl_module):
        self.hands.work(400.0)


class Busy(fits.Line):
    """Works in each phase, and outside of all."""

    def __init__(self, hands):
        super().__init__()
        self.hands = hands

    def training_step(self, batch, batch_idx):
        self.hands.work(1.0)
        return super().training_step(batch, batch_idx)

    def backward(self, loss):
        self.hands.work(2.0)
        super().backward(loss)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.hands.work(4.0)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.hands.work(8.0)

    def on_train_epoch_start(self):
        self.hands.work(16.0)


class Manual(fits.Line):
    """Two steps a batch, the second by the raw optimizer, on batches without a size."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for raw in (False, True):
            optimizer = self.optimizers(use_pl_optimizer=not raw)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def _clocked(model, tmp_path, *, callbacks=(), **changes):
    torch.manual_seed(0)
    trainer = fits.trainer(tmp_path, callbacks=callbacks, **changes)
    clock = StepClock()
    clock.attach(trainer)
    clock.start()
    trainer.fit(model, datamodule=fits.Blobs())
    clock.end_epoch()
    return clock, trainer


def test_time_is_booked_on_the_phase_that_took_it(tmp_path, monkeypatch):
    hands = Hands()
    monkeypatch.setattr("lightning_accel.evidence.measured_runs.step_clock.time", hands)
    clock, _ = _clocked(Busy(hands), tmp_path, callbacks=[Worker(hands)])
    expected = {"forward": 1.0, "backward": 2.0, "optimizer": 4.0, "callbacks": 700.0, "other": 8.0}
    assert list(expected) == list(PHASES)
    assert clock.steps == [expected] * (8 - 2)  # one step of each epoch was counted, not timed
    assert clock.samples == [16] * 6
    assert clock.stages == [(10, 10)] * 6
    assert clock.setup_seconds == 16.0
    assert [p["seconds"] for p in clock.curve] == [16.0 + 4 * 715.0, 2 * (16.0 + 4 * 715.0)]


def test_hooks_are_gone_after_the_fit(tmp_path):
    _, trainer = _clocked(fits.Line(), tmp_path)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_operations_are_counted_in_the_last_four_epochs(tmp_path):
    clock, _ = _clocked(fits.Line(), tmp_path, epochs=6)
    assert clock.flops == [2 * (2 * 16 * 4 * 2)] * 4
    assert len(clock.steps) == 6 * 4 - 4


def test_manual_optimization_and_raw_optimizers_are_clocked(tmp_path):
    clock, _ = _clocked(Manual(), tmp_path)
    assert all(step["backward"] > 0 and step["optimizer"] > 0 for step in clock.steps)
    assert clock.flops == [2 * 2 * (2 * 16 * 4 * 2)] * 2


def test_curve_has_a_point_a_validation(tmp_path):
    clock, _ = _clocked(fits.Line(), tmp_path, epochs=3)
    assert [(p["epoch"], p["step"]) for p in clock.curve] == [(0, 4), (1, 8), (2, 12)]
    assert all(set(p["metrics"]) == {"val/loss", "val/accuracy"} for p in clock.curve)
    seconds = [p["seconds"] for p in clock.curve]
    assert seconds == sorted(seconds)
    assert clock.setup_seconds < seconds[0]


def test_curve_without_validation_has_a_point_an_epoch(tmp_path):
    class Unvalidated(LightningModule):
        configure_optimizers = fits.Line.configure_optimizers

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            loss = fits.Line.training_step(self, batch, batch_idx)
            self.log("train/loss", loss)
            return loss

    class Train(LightningDataModule):
        setup = fits.Blobs.setup
        train_dataloader = fits.Blobs.train_dataloader

    clock = StepClock()
    trainer = fits.trainer(tmp_path)
    clock.attach(trainer)
    trainer.fit(Unvalidated(), datamodule=Train())
    assert [p["epoch"] for p in clock.curve] == [0, 1]
    assert set(clock.curve[0]["metrics"]) == {"train/loss"}


def test_counting_ends_with_a_failing_fit(tmp_path):
    class Fails(fits.Line):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("in the counted step")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="in the counted step"):
        _clocked(Fails(), tmp_path)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


class _Speaks(Callback):
    def on_fit_start(self, trainer, pl_module):
        logging.getLogger("lightning_accel.callbacks.x").info("stays dense: %s", "too short")
        say_decision(trainer, "Accelerator", "leaves the model alone.")
        logging.getLogger("elsewhere").warning("not ours")


def _measure(make, tmp_path, **changes):
    values = {"arm": "a", "pair": 0, "seed": 1, "order": 0, "folder": tmp_path, "count_flops": False}
    return measure_fit(make, **{**values, **changes})


def test_what_accelerators_say_is_kept(tmp_path):
    level = logging.getLogger("lightning_accel").level
    run = _measure(
        lambda seed, folder: (fits.trainer(folder, callbacks=[_Speaks()]), fits.Line(), fits.Blobs()), tmp_path
    )
    assert run.messages == ["stays dense: too short", "Accelerator: leaves the model alone."]
    assert logging.getLogger("lightning_accel").level == level


def test_metric_that_diverged_is_none_and_size_of_odd_batches_zero(tmp_path):
    class Odd(fits.Line):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.layer(batch.x), batch.y)

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", math.nan, batch_size=1)

    class Batch:
        def __init__(self, x, y):
            self.x, self.y = x, y

    class Objects(fits.Blobs):
        def train_dataloader(self):
            x = torch.ones(16, 4)
            return torch.utils.data.DataLoader(range(4), collate_fn=lambda _: Batch(x, torch.zeros(16).long()))

        def val_dataloader(self):
            return torch.utils.data.DataLoader([0.0])

    run = _measure(lambda seed, folder: (fits.trainer(folder), Odd(), Objects()), tmp_path)
    assert 0 < run.callback_seconds < run.fit_seconds
    assert run.metrics == {"val/loss": None}
    assert run.curve[0]["metrics"] == {"val/loss": None}
    assert run.samples_per_second is None
    assert run.step_seconds > 0


class _FreezesThenValidatesSlowly(Callback):
    """Freezes the bias in the second epoch; validating takes a minute."""

    def __init__(self, hands):
        self.hands = hands

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.layer.bias.requires_grad_(trainer.current_epoch == 0)

    def on_validation_epoch_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.hands.work(60.0)


def test_stages_of_training_and_validations_are_told_apart(tmp_path, monkeypatch):
    hands = Hands()
    for module in ("step_clock", "runs"):
        monkeypatch.setattr(f"lightning_accel.evidence.measured_runs.{module}.time", hands)
    callbacks = [_FreezesThenValidatesSlowly(hands)]

    def make(seed, folder):
        trainer = fits.trainer(folder, callbacks=callbacks, val_check_interval=2)
        return trainer, Busy(hands), fits.Blobs()

    run = _measure(make, tmp_path)
    assert run.validation_seconds == 4 * 60.0
    assert run.loading_seconds == 0.0  # although validations stand between two steps
    assert run.stages == [
        {"parameters": 10, "trained": 10, "steps": 4, "seconds": 60.0},
        {"parameters": 10, "trained": 8, "steps": 4, "seconds": 60.0},
    ]
    assert run.fit_seconds == 4 * 60.0 + 2 * 60.0 + 2 * 16.0
