"""Modules and Trainers for tests of the asynchronous strategy; importable from spawned workers."""

import os
import signal
from collections import defaultdict

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_accel import AsyncSGDStrategy


class Noted(Dataset):
    """Sixty-four points on two sides of a plane; writes down which of them training reads."""

    def __init__(self, notes=None, size=64):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, 8, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.notes = notes

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index], index


def loader(size=64, *, shuffle=True):
    return DataLoader(Noted(size=size), batch_size=8, shuffle=shuffle)


class Classifier(pl.LightningModule):
    """An MLP with batch norm and dropout; every choice of optimizer and schedule that the tests need."""

    def __init__(self, optimizer="sgd", schedule=None, *, dropout=0.2, notes=None, width=16):
        super().__init__()
        self.save_hyperparameters(ignore=["notes"])
        self.notes = notes
        layers = [nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2)]
        if width != 16:
            layers[3:3] = [nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        if self.notes is not None:
            with open(self.notes, "a", encoding="utf-8") as file:
                file.write(f"{self.current_epoch} {os.getpid()} {' '.join(map(str, index.tolist()))}\n")
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        self.log("val/loss", nn.functional.cross_entropy(self.net(x), y))
        self.log("val/count", float(len(x)), reduce_fx="sum")

    test_step = validation_step

    def configure_optimizers(self):
        kind, schedule = self.hparams.optimizer, self.hparams.schedule
        if kind == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        elif kind == "lbfgs":
            optimizer = torch.optim.LBFGS(self.parameters())
        else:
            momentum = 0.0 if kind == "plain" else 0.9
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=momentum, nesterov=kind == "nesterov")
        if schedule == "onecycle":
            steps = self.trainer.estimated_stepping_batches
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]
        if schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}
        return optimizer


class Adversaries(pl.LightningModule):
    """Two optimizers, stepped by hand, that work against each other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(4, 8)
        self.critic = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, _, _ = batch
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(x), 4))
        first.zero_grad()
        self.manual_backward(self.critic(fake.detach()).mean() - self.critic(x).mean())
        first.step()
        second.zero_grad()
        self.manual_backward(-self.critic(fake).mean())
        second.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        critic = torch.optim.AdamW(self.critic.parameters(), lr=0.01)
        generator = torch.optim.SGD(self.generator.parameters(), lr=0.01, momentum=0.5)
        return [critic, generator], [torch.optim.lr_scheduler.ExponentialLR(generator, 0.99)]


class Clipped(Adversaries):
    """Clips the critic's weights by hand, between the steps of its two optimizers."""

    def training_step(self, batch, batch_idx):
        x, _, _ = batch
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(x), 4))
        first.zero_grad()
        self.manual_backward(self.critic(fake.detach()).mean() - self.critic(x).mean())
        first.step()
        for parameter in self.critic.parameters():
            parameter.data.clamp_(-0.05, 0.05)
        second.zero_grad()
        self.manual_backward(-self.critic(fake).mean())
        second.step()
        self.lr_schedulers().step()


class ClampedBetweenSteps(pl.Callback):
    """No weight leaves [-0.05, 0.05], seen to by a callback between two batches."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for parameter in pl_module.parameters():
            parameter.data.clamp_(-0.05, 0.05)

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module, None, None, 0)


class SwapsAverageIn(pl.Callback):
    """Validates an average of the weights: swaps it in when validation starts, and out when it ends."""

    def on_train_start(self, trainer, pl_module):
        self.average = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch._foreach_lerp_(self.average, [p.detach() for p in pl_module.parameters()], 0.1)

    @torch.no_grad()
    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.trained = [p.detach().clone() for p in pl_module.parameters()]
            torch._foreach_copy_(list(pl_module.parameters()), self.average)

    @torch.no_grad()
    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            torch._foreach_copy_(list(pl_module.parameters()), self.trained)


class ClampsForValidation(pl.Callback):
    """Changes the weights when validation starts, and leaves them like that."""

    @torch.no_grad()
    def on_validation_start(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            parameter.clamp_(-0.05, 0.05)


class Follower(Classifier):
    """Has a second network that no optimizer has and that follows the first one step by step."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer, dropout=0.0)
        self.target = nn.Linear(8, 16)
        self.target.load_state_dict(self.net[0].state_dict())

    def training_step(self, batch, batch_idx):
        x = batch[0]
        return super().training_step(batch, batch_idx) + (self.net[0](x) - self.target(x).detach()).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pairs = zip(self.target.parameters(), self.net[0].parameters(), strict=True)
        for mine, theirs in pairs:
            mine.data.lerp_(theirs.data, 0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


class ForgetsMoments(pl.Callback):
    """Empties the optimizer's state at the beginning of each epoch, in place or by a new one, or loads another."""

    def __init__(self, how):
        self.how = how

    def on_train_epoch_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            if self.how == "cleared":
                optimizer.state.clear()
            elif self.how == "replaced":
                optimizer.state = defaultdict(dict)
            else:
                places = enumerate(p for group in optimizer.param_groups for p in group["params"])
                state = {place: {"momentum_buffer": torch.full_like(p, 0.01)} for place, p in places}
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class Told(torch.optim.SGD):
    """Is told of curvature beside its steps."""

    def update_hessian(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["hessian"] = parameter.grad**2


class Tells(Classifier):
    def configure_optimizers(self):
        return Told(self.parameters(), lr=0.05, momentum=0.9)

    def on_before_optimizer_step(self, optimizer):
        optimizer.update_hessian()


class Synchronized(Classifier):
    """Has a batch norm that waits for all processes."""

    def __init__(self):
        super().__init__()
        self.net[1] = nn.SyncBatchNorm(16)


class Grouped(Classifier):
    """Makes a default process group of its own."""

    def configure_model(self):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)


class Gathering(Classifier):
    """Gathers from all processes in a training step."""

    def training_step(self, batch, batch_idx):
        return self.all_gather(super().training_step(batch, batch_idx)).mean()


class RunningCell(pl.LightningModule):
    """Loops over a cell by hand."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 8)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        state = torch.zeros(len(x), 8)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return nn.functional.cross_entropy(self.head(state), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sequences():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(48, 6, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum((1, 2)) > 0).long()), batch_size=8)


class Clamped(pl.Callback):
    """A projection: no weight leaves [-0.05, 0.05] after a step."""

    def on_fit_start(self, trainer, pl_module):
        def clamp(optimizer, args, kwargs):
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.clamp_(-0.05, 0.05)

        trainer.optimizers[0].register_step_post_hook(clamp)


class DiesOnce(pl.Callback):
    """Kill the process of one rank in the middle of an epoch, the first time it gets there."""

    def __init__(self, flag, rank, epoch=0):
        self.flag, self.rank, self.epoch = flag, rank, epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch < self.epoch:
            return
        if trainer.strategy._store.worker == self.rank and batch_idx == 1 and not os.path.exists(self.flag):
            with open(self.flag, "w", encoding="utf-8"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)


class LeavesMoreThanAnEpoch(pl.Callback):
    """Kill the coordinator when the other worker is in the second epoch, which so gets more batches than it has.

    The one started again waits until the other has gone past the length of the epoch.
    """

    def setup(self, trainer, pl_module, stage):
        store = trainer.strategy._store
        if store is not None and store.incarnation > 0:
            store.kv("started again", b"yes")
            store.kv("past the length")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        store = trainer.strategy._store
        if store.incarnation > 0:
            return
        if store.worker == 0 and batch_idx == 1:
            store.kv("second epoch")
            os.kill(os.getpid(), signal.SIGKILL)
        if store.worker == 1 and trainer.current_epoch == 1 and batch_idx == 0:
            store.kv("second epoch", b"yes")
            store.kv("started again")
        if store.worker == 1 and batch_idx == trainer.num_training_batches:
            store.kv("past the length", b"yes")


class DiesAtTheEnd(pl.Callback):
    """Kill the coordinator when training is over and only the result is missing."""

    def on_fit_end(self, trainer, pl_module):
        if trainer.strategy.is_global_zero:
            os.kill(os.getpid(), signal.SIGKILL)


class WaitForAll(pl.Callback):
    """Hold every worker at its first batch of an epoch until all of them are there."""

    def __init__(self, workers, epoch=0):
        self.workers, self.epoch = workers, epoch

    @property
    def state_key(self):
        return f"WaitForAll {self.epoch}"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        store, epoch = trainer.strategy._store, trainer.current_epoch
        if (
            batch_idx == 0 and epoch >= self.epoch
        ):  # one that was started again says so, too: the first may have died before
            store.kv(f"there {self.epoch} {store.worker}", b"yes")
        if batch_idx == 0 and epoch == self.epoch and store.incarnation == 0:
            for worker in range(self.workers):
                store.kv(f"there {self.epoch} {worker}")


class TwoLoaders(Classifier):
    """Trains on two loaders at once."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


QUICK = {"start_method": "forkserver", "heartbeat_seconds": 300.0}  # a busy machine is no death


def fit(
    folder,
    strategy,
    module,
    *,
    devices=1,
    ckpt=None,
    epochs=2,
    callbacks=(),
    validate=True,
    size=64,
    data=None,
    **options,
):
    """Fit from one seed; returns the Trainer."""
    torch.manual_seed(1)
    if strategy == "async_sgd":
        strategy = AsyncSGDStrategy(**QUICK)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **options},
    )
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt)
        return trainer
    data = loader(size) if data is None else data
    trainer.fit(module, data, loader(32, shuffle=False) if validate else None, ckpt_path=ckpt)
    return trainer


def seeded(build, *arguments, **options):
    torch.manual_seed(7)
    return build(*arguments, **options)


def equal(one, other):
    """Return the names of the entries in which two modules differ."""
    return [key for key, value in one.state_dict().items() if not torch.equal(value, other.state_dict()[key])]
