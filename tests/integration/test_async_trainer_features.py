"""What people do with a Trainer beside `fit`: finetuning, averages, tuners, further fits, checkpoints by name."""

import lightning.pytorch as pl
import pytest
import torch
from async_modules import QUICK, Classifier, DiesOnce, WaitForAll, equal, loader, seeded
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_accel import AsyncSGDStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:.*The provided params to be frozen already exist"),
]


class Pretrained(Classifier):
    """A backbone and a head; its optimizer has what is trainable."""

    def __init__(self):
        super().__init__("momentum", dropout=0.0)
        self.backbone, self.net = self.net[:3], nn.Sequential(*self.net[3:])
        self.lr, self.batch_size = 0.05, 8

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        return nn.functional.cross_entropy(self.net(self.backbone(x)), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(self.backbone(batch[0])), batch[1]))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(loader().dataset, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return loader(shuffle=False)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Decays(torch.optim.lr_scheduler.LRScheduler):
    """Holds a function that cannot be pickled, as schedulers of other packages do."""

    def __init__(self, optimizer):
        self.decay = lambda step: 0.9**step
        super().__init__(optimizer)

    def get_lr(self):
        return [rate * self.decay(self.last_epoch) for rate in self.base_lrs]


class Scheduled(Pretrained):
    """Steps its schedule by hand or not, with the argument by its name or without."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        if self.kind == "cycle":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=40)
        else:
            schedule = Decays(optimizer)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def lr_scheduler_step(self, scheduler, metric):
        if self.kind == "by name":
            scheduler.step(epoch=self.global_step)
        else:
            scheduler.step()


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, *rest):
        trainer.should_stop = trainer.global_step >= 4


def faster(epoch):
    return 1.5


def trainer_in(folder, devices, *callbacks, epochs=3, **options):
    """Return a Trainer with so many asynchronous workers, or a plain one for 0."""
    return pl.Trainer(
        accelerator="cpu", devices=devices or 1, strategy=AsyncSGDStrategy(**QUICK) if devices else "auto",
        max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks), logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, **{"enable_checkpointing": False, **options},
    )  # fmt: skip


def finetuning():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=faster, verbose=False)


@pytest.mark.parametrize(
    "make", [finetuning, lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)], ids=["finetuning", "average"]
)
def test_one_worker_finetunes_and_averages_as_a_plain_run_does(tmp_path, make):
    modules = []
    for devices in (0, 1):
        modules.append(seeded(Pretrained))
        trainer_in(tmp_path / str(devices), devices, make(), epochs=4).fit(modules[-1])
    assert equal(*modules) == []


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("kind", ["cycle", "by name", "by function"])
def test_one_worker_follows_schedules_and_what_is_saved_after_its_fit_goes_on_with_them(tmp_path, kind):
    modules = []
    for devices in (0, 1):
        trainer = trainer_in(tmp_path / str(devices), devices, epochs=2)
        trainer.fit(seeded(Scheduled, kind))
        if kind == "cycle":  # functions are in no checkpoint of a plain Trainer either
            trainer.save_checkpoint(tmp_path / f"{devices}.ckpt")
            modules.append(seeded(Scheduled, kind))
            trainer_in(tmp_path, 0, epochs=4).fit(modules[-1], ckpt_path=tmp_path / f"{devices}.ckpt")
        else:
            modules.append(trainer.lightning_module)
    assert equal(*modules) == []


@pytest.mark.slow
def test_several_workers_train_a_backbone_once_it_is_thawed(tmp_path):
    module, before = seeded(Pretrained), seeded(Pretrained)
    killed = DiesOnce(str(tmp_path / "flag"), 1, epoch=2)  # and so started again when the backbone is thawed already
    in_step = [WaitForAll(2, epoch) for epoch in range(3)]
    trainer = trainer_in(tmp_path, 2, finetuning(), killed, *in_step, epochs=4)
    trainer.fit(module)
    assert (tmp_path / "flag").exists()
    assert trainer.global_step == 32
    assert len(trainer.optimizers[0].param_groups) == 2
    assert not torch.equal(module.backbone[0].weight, before.backbone[0].weight)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert all(trainer.optimizers[0].state[p]["momentum_buffer"].any() for p in module.backbone.parameters())


def test_a_second_fit_of_one_worker_draws_on_where_the_first_stopped(tmp_path):
    modules = []
    for devices in (0, 1):
        modules.append(seeded(Pretrained))
        trainer = trainer_in(tmp_path / str(devices), devices, epochs=2)
        trainer.fit(modules[-1])
        trainer.validate(modules[-1], verbose=False)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(modules[-1])
        assert trainer.global_step == 32
    assert equal(*modules) == []


@pytest.mark.filterwarnings("ignore:Failed to compute suggestion for learning rate")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("devices", [1, 2])
def test_tuners_train_in_this_process_as_in_a_plain_trainer(tmp_path, devices):
    found = []
    for workers in (0, devices):
        module = seeded(Pretrained)
        trainer = trainer_in(tmp_path / str(workers), workers, epochs=1)
        rates = Tuner(trainer).lr_find(module, num_training=12, early_stop_threshold=None)
        size = Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=2, init_val=4)
        found.append((rates.results, module.lr, size, module.batch_size))
        trainer.fit(module)
        assert trainer.global_step == 64 // size
    assert found[0] == found[1]


@pytest.mark.parametrize("make", [LearningRateFinder, BatchSizeFinder])
def test_callbacks_that_tune_in_a_fit_are_refused_with_the_way_out(tmp_path, make):
    trainer = trainer_in(tmp_path, 2, make())
    with pytest.raises(MisconfigurationException, match=rf"`{make.__name__}` trains when a fit begins.*Tuner\(trainer"):
        trainer.fit(seeded(Pretrained))


def test_the_callers_checkpoint_callback_knows_its_folder_and_the_last_file(tmp_path):
    saved = ModelCheckpoint(monitor="val/loss", save_last=True, save_top_k=2)
    trainer = trainer_in(tmp_path, 1, saved, enable_checkpointing=True)
    module = seeded(Pretrained)
    trainer.fit(module)
    assert trainer.checkpoint_callback is saved
    assert saved.dirpath == str(tmp_path / "checkpoints")
    assert saved.last_model_path == str(tmp_path / "checkpoints" / "last.ckpt")
    assert sorted(saved.best_k_models) == sorted(str(p) for p in (tmp_path / "checkpoints").glob("epoch*.ckpt"))
    assert trainer.validate(module, ckpt_path="last", verbose=False)


class Shows(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("shown", loss, prog_bar=True)
        return loss


def test_what_was_logged_is_known_after_a_fit_as_after_a_plain_one(tmp_path):
    found = []
    for devices in (0, 1):
        trainer = trainer_in(tmp_path / str(devices), devices)
        trainer.fit(seeded(Shows, "momentum", dropout=0.0), loader(), loader(shuffle=False))
        found.append((dict(trainer.logged_metrics), dict(trainer.progress_bar_metrics)))
    assert found[0] == found[1]
    assert {"train/loss", "val/loss"} <= set(found[0][0])
    assert "shown" in found[0][1]


def test_a_fit_that_was_told_to_stop_says_so_afterwards(tmp_path):
    trainer = trainer_in(tmp_path, 1, Stops())
    trainer.fit(seeded(Pretrained))
    assert trainer.should_stop
    assert trainer.current_epoch == 1
