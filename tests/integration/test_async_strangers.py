"""Other people's modules in whole asynchronous fits: buffers of all kinds, random splits, predictions."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_accel

QUIET = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class ManyBuffers(LightningModule):
    """A mask, a ring with its pointer, a flag, complex numbers, one that grows, one that is replaced."""

    def __init__(self):
        super().__init__()
        self.net, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("ring", torch.zeros(3, 4))
        self.register_buffer("seen", torch.tensor(False))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("grown", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(2), persistent=False)

    def training_step(self, batch, index):
        x = batch[0]
        self.ring[self.pointer] = x.mean(0)
        self.pointer.copy_((self.pointer + 1) % 3)
        self.seen.logical_not_()
        self.phase.mul_(1j)
        self.grown = torch.cat([self.grown, x.sum().view(1)])
        self.replaced = self.replaced + 1.0
        return self.net(self.norm(x)).square().mean() + self.ring.mean() * self.net.weight.sum()

    def predict_step(self, batch, index):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(40, 4, generator=generator)), batch_size=4)


def fitted(workers):
    seed_everything(0, verbose=False)
    module = ManyBuffers()
    strategy = lightning_accel.AsyncSGDStrategy(heartbeat_seconds=300.0) if workers else "auto"
    trainer = Trainer(strategy=strategy, devices=max(1, workers), **QUIET)
    trainer.fit(module, loader())
    return trainer, module


def test_one_worker_leaves_every_buffer_as_plain_training_does_and_predicts(recwarn):
    (plain_trainer, plain), (trainer, module) = fitted(0), fitted(1)
    expected, actual = dict(plain.named_buffers()), dict(module.named_buffers())
    assert list(expected) == list(actual)
    for name, buffer in expected.items():
        assert torch.equal(buffer, actual[name]), name
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    predicted = trainer.predict(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(plain_trainer.predict(plain, loader()), predicted, strict=True))


def test_two_workers_leave_no_buffer_without_its_values(recwarn):
    trainer, module = fitted(2)
    assert trainer.strategy.statistics.dropped == 0
    assert torch.equal(module.mask, torch.full((3, 3), float("-inf")).triu(1))
    assert 0 <= int(module.pointer) < 3
    others = [b for name, b in module.named_buffers() if name != "mask"]
    assert all(bool(torch.isfinite(buffer).all()) for buffer in others)


class Split(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.prepared = False

    def prepare_data(self):
        torch.rand(7)  # a download that draws random numbers

    def setup(self, stage):
        if not hasattr(self, "parts"):
            self.parts = random_split(range(40), [30, 10])

    def train_dataloader(self):
        return DataLoader(self.parts[0], batch_size=5)


class Noted(LightningModule):
    def __init__(self, folder):
        super().__init__()
        self.folder, self.net = folder, nn.Linear(1, 1)

    def on_train_start(self):
        indices = self.trainer.datamodule.parts[0].indices
        (self.folder / f"worker{self.trainer.global_rank}.txt").write_text(str(indices), encoding="utf-8")

    def training_step(self, batch, index):
        return self.net(batch.float().view(-1, 1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_a_random_split_in_setup_is_that_of_plain_training_in_every_worker(tmp_path, recwarn):
    for devices, strategy in (1, "auto"), (2, lightning_accel.AsyncSGDStrategy(heartbeat_seconds=300.0)):
        folder = tmp_path / str(devices)
        folder.mkdir()
        seed_everything(3, verbose=False)
        Trainer(strategy=strategy, devices=devices, **QUIET).fit(Noted(folder), datamodule=Split())
    found = [file.read_text(encoding="utf-8") for file in tmp_path.glob("*/worker*.txt")]
    assert len(found) >= 2
    assert len(set(found)) == 1
