"""Other people's modules in whole asynchronous fits: buffers, layers made late, random splits, loaders, predictions."""

import pathlib
import queue
import threading

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
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


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return (self(batch[0]) - 1.0).square().mean()

    def predict_step(self, batch, index):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class MadeInSetup(Plain):
    """Makes a head, which shares a bias with what was there, and a scale, when it knows its data."""

    def __init__(self):
        super().__init__()
        self.head = None

    def setup(self, stage):
        if self.head is None:
            self.head, self.scale = nn.Linear(8, 2), nn.Parameter(torch.ones(2))
            self.head.bias = self.net[2].bias
            self.head.register_buffer("shift", torch.ones(2), persistent=False)

    def forward(self, x):
        return (self.head(self.net[:2](x)) + self.head.shift) * self.scale


class MadeInConfigureModel(Plain):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


class LazyInSetup(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(2))

    def setup(self, stage):
        self.net(torch.zeros(2, 4))


class SavesLess(Plain):
    """Leaves a layer that is trained out of its state dict."""

    def state_dict(self, *arguments, **options):
        state = super().state_dict(*arguments, **options)
        return {key: value for key, value in state.items() if not key.startswith("net.0")}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=False, assign=assign)


class Freezes(Plain):
    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch == 0)


def trained(make, strategy, *, data=None, devices=1, **options):
    seed_everything(0, verbose=False)
    module = make()
    trainer = Trainer(strategy=strategy, devices=devices, **{**QUIET, **options})
    trainer.fit(module, loader() if data is None else data)
    return trainer, module


def asynchronous():
    return lightning_accel.AsyncSGDStrategy(heartbeat_seconds=300.0)


@pytest.mark.parametrize("make", [MadeInSetup, MadeInConfigureModel, LazyInSetup, SavesLess, Freezes])
def test_layers_made_when_the_fit_begins_or_saved_in_part_come_back_as_a_plain_fit_leaves_them(make, recwarn):
    (plain_trainer, plain), (trainer, module) = trained(make, "auto"), trained(make, asynchronous())
    expected, actual = dict(plain.named_parameters()), dict(module.named_parameters())
    assert list(expected) == list(actual)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert [p.requires_grad for p in expected.values()] == [p.requires_grad for p in actual.values()]
    pairs = zip(plain_trainer.predict(plain, loader()), trainer.predict(module, loader()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class MadeAndFails(MadeInSetup):
    def training_step(self, batch, index):
        if self.global_step == 12:
            raise ValueError("out of luck")
        return super().training_step(batch, index)


def test_layers_made_when_the_fit_begins_are_in_what_is_left_of_a_fit_that_fails(tmp_path, recwarn):
    left = []
    for name, strategy in ("plain", "auto"), ("async", asynchronous()):
        seed_everything(0, verbose=False)
        module, trainer = MadeAndFails(), Trainer(strategy=strategy, devices=1, **QUIET)
        with pytest.raises((ValueError, RuntimeError), match="out of luck"):
            trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        left.append(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"])
    assert list(left[0]) == list(left[1])
    assert all(torch.equal(value, left[1][key]) for key, value in left[0].items())


class Reparametrized(Plain):
    def setup(self, stage):
        if stage == "fit":
            nn.utils.parametrizations.weight_norm(self.net[0])


def test_what_can_not_come_back_is_named(caplog, recwarn):
    trained(Reparametrized, asynchronous())
    assert "what was trained of `net.0.parametrizations.weight.original0`" in caplog.text


class LazyAtTheFirstBatch(LazyInSetup):
    def setup(self, stage):
        pass


def test_lazy_layers_without_a_shape_are_refused_with_the_way_out(recwarn):
    with pytest.raises(RuntimeError, match=r"`net\.0\.weight` has no shape yet.* in `setup`"):
        trained(LazyAtTheFirstBatch, asynchronous())


class SharesMemory(Plain):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 4)
        self.other.weight.data = self.net[0].weight.data.t()


def test_two_parameters_in_one_place_of_memory_are_refused():
    with pytest.raises(MisconfigurationException, match=r"`net\.0\.weight` and `other\.weight` are two parameters"):
        trained(SharesMemory, asynchronous())


class Background:
    """Draws from an iterator in a thread, as loaders do that load ahead."""

    def __init__(self, batches):
        self.waiting, self.batches = queue.Queue(3), batches
        threading.Thread(target=self.draw, daemon=True).start()

    def draw(self):
        for batch in self.batches:
            self.waiting.put(batch)
        self.waiting.put(None)

    def __iter__(self):
        while (batch := self.waiting.get()) is not None:
            yield batch


class BackgroundLoader(DataLoader):
    def __iter__(self):
        return iter(Background(super().__iter__()))


class DrawnOnce(DataLoader):
    """Draws all that it gives from an iterator that it has made before."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.drawn = list(super().__iter__())

    def __iter__(self):
        return iter(self.drawn)


def points(kind):
    return kind(TensorDataset(torch.randn(200, 4, generator=torch.Generator().manual_seed(0))), batch_size=4)


@pytest.mark.parametrize("kind", [BackgroundLoader, DrawnOnce])
def test_loaders_of_their_own_way_are_plain_training_with_one_worker_and_refused_with_several(kind, recwarn):
    plain, module = (trained(Plain, s, data=points(kind), max_epochs=3)[1] for s in ("auto", asynchronous()))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=rf"{kind.__name__} (draws|gives) .* or `devices=1`"):
        trained(Plain, asynchronous(), data=points(kind), devices=2)


class Indexed(torch.utils.data.Dataset):
    """Its ``indices`` are no numbers, but paths, or lists of several lengths."""

    def __init__(self, *, paths):
        self.indices = [(pathlib.Path(f"{i}"), i) if paths else [i] * (1 + i % 3) for i in range(40)]

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return (torch.full((4,), index / 40.0),)


class IndexedData(LightningDataModule):
    def __init__(self, *, paths):
        super().__init__()
        self.paths = paths

    def setup(self, stage):
        self.data = Indexed(paths=self.paths)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4)


@pytest.mark.parametrize("paths", [True, False])
def test_indices_that_are_no_numbers_are_no_other_data(paths, recwarn):
    trainer, _ = trained(Plain, asynchronous(), data=IndexedData(paths=paths), devices=2)
    assert trainer.global_step == 20
