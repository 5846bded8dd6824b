"""The module and the Trainer that the tests of rank quantization and sequential freezing share."""

import random

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, BATCHES = 16, 4, 6


class Classifier(LightningModule):
    """An MLP with dropout, batch norm and a training step that keeps its own counts and draws random numbers."""

    def __init__(self, *, width=32, trained=True, optimizer="SGD", settings=None, manual=False, noisy=True, seed=0):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.1 if noisy else 0.0),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        )
        if trained:
            look_trained(self.net)
        self.automatic_optimization = not manual
        self.steps = 0
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.steps += 1
        x, y = batch
        self.seen.append(float(x.sum()))
        if self.hparams["noisy"]:
            x = x.mul_(1.0 + 0.01 * random.random() + 0.01 * float(torch.rand(())))
        loss = cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        if self.automatic_optimization:
            return {"loss": loss}
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        settings = self.hparams["settings"] or {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
        return getattr(torch.optim, self.hparams["optimizer"])(self.parameters(), **settings)


@torch.no_grad()
def look_trained(network):
    """Give the weights quickly falling singular values."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((u * (s[0] * 0.7 ** torch.arange(len(s)))) @ v)


def batches(size=8):
    """Six batches in fixed order; a new loader, data and all."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCHES * size, FEATURES, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(dim=1)), batch_size=size)


def train(module, callbacks, root, *, epochs=2, ckpt_path=None, **settings):
    """Fit and return the Trainer."""
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=root,
        accelerator="cpu",
        logger=settings.pop("logger", False),
        enable_checkpointing=settings.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    torch.manual_seed(1)
    random.seed(1)
    trainer.fit(module, batches(), batches(), ckpt_path=ckpt_path)
    return trainer
