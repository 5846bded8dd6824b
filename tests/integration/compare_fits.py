"""Small real fits for the tests of `compare`; functions of a module, as worker processes import them by name."""

import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Blobs(LightningDataModule):
    """Two classes that a line separates."""

    def setup(self, stage=None):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(96, 4, generator=generator)
        y = (x.sum(1) > 0).long()
        self.train, self.val = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=32)


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        out = self.layer(batch[0])
        self.log("val/loss", nn.functional.cross_entropy(out, batch[1]))
        self.log("val/accuracy", (out.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Burden(Callback):
    """Plants a slow-down: matrix products after every batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        x = torch.ones(200, 200)
        for _ in range(20):
            x = x @ x / 200.0


class Crash(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("the loss went for a walk")


class Kill(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)


class Litter(Callback):
    """Leave many files in the folder of the run."""

    def on_fit_end(self, trainer, pl_module):
        for number in range(2000):
            Path(trainer.default_root_dir, f"{number}.txt").touch()


class Cached(Callback):
    def __init__(self, cache_dir=None):
        self.cache_dir = cache_dir


def trainer(folder: Path, *, callbacks=(), epochs=2, val_check_interval=1.0) -> Trainer:
    return Trainer(
        val_check_interval=val_check_interval,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


def plain(seed: int, folder: Path):
    return trainer(folder), Line(), Blobs()


def burdened(seed: int, folder: Path):
    return trainer(folder, callbacks=[Burden()]), Line(), Blobs()


def littering(seed: int, folder: Path):
    return trainer(folder, callbacks=[Litter()]), Line(), Blobs()


def crashing(seed: int, folder: Path):
    return trainer(folder, callbacks=[Crash()]), Line(), Blobs()


def killed(seed: int, folder: Path):
    return trainer(folder, callbacks=[Kill()]), Line(), Blobs()


def endless(seed: int, folder: Path):
    return trainer(folder, epochs=10**9), Line(), Blobs()
