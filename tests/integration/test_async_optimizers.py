"""Every optimizer of torch and every kind of buffer: one worker is plain training, several keep what is the model's."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from async_modules import Classifier, Noted, equal, fit, seeded
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_accel.async_sgd import WorkerFailedError

NAMES = "Adadelta Adafactor Adagrad Adam Adamax ASGD Muon NAdam RAdam RMSprop Rprop"


class Any(Classifier):
    """Trained by any optimizer of torch; Muon gets the matrices alone."""

    def __init__(self, name):
        super().__init__(dropout=0.0)
        self.name = name

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim == 2]
        return getattr(torch.optim, self.name)(matrices if self.name == "Muon" else self.parameters(), lr=0.01)


class ByHand(Any):
    """The same in manual optimization, where a step is made under the precision's autocast."""

    def __init__(self, name):
        super().__init__(name)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


MAKE = {
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "bool": lambda: torch.zeros(3, dtype=torch.bool),
    "nan": lambda: torch.full((3,), float("nan")),
    "int8": lambda: torch.zeros(3, dtype=torch.int8),
    "bfloat16": lambda: torch.zeros(3, dtype=torch.bfloat16),
    "float64": lambda: torch.zeros(3, dtype=torch.float64),
    "scalar": lambda: torch.tensor(0),
    "empty": lambda: torch.zeros(0, 3),
    "expanded": lambda: torch.ones(1).expand(3),
    "replaced": lambda: torch.zeros(3),
}


class Keeps(Classifier):
    """Has one more buffer, which each step changes."""

    def __init__(self, kind, *, persistent=True):
        super().__init__(dropout=0.0)
        self.kind = kind
        self.register_buffer("kept", MAKE[kind](), persistent=persistent)

    def training_step(self, batch, batch_idx):
        if self.kind == "bool":
            self.kept.logical_not_()
        elif self.kind == "nan":
            self.kept[0] = batch_idx
        elif self.kind in {"expanded", "replaced"}:
            self.kept = self.kept + batch[0].mean()
        else:
            self.kept += 2 if batch_idx % 3 else -1  # down, too
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.split())
def test_one_worker_is_plain_training_with_every_optimizer_of_torch(tmp_path, name):
    plain, ours = seeded(Any, name), seeded(Any, name)
    fit(tmp_path, "auto", plain)
    fit(tmp_path, "async_sgd", ours)
    assert equal(plain, ours) == []


@pytest.mark.parametrize("name", [pytest.param("AdamW", marks=pytest.mark.slow), "Adafactor"])
def test_steps_by_hand_are_cast_as_in_a_plain_trainer(tmp_path, name):
    plain, ours = seeded(ByHand, name), seeded(ByHand, name)
    fit(tmp_path, "auto", plain, precision="bf16-mixed")
    fit(tmp_path, "async_sgd", ours, precision="bf16-mixed")
    assert equal(plain, ours) == []


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_one_worker_in_half_precision_is_plain_training(tmp_path, optimizer):
    plain, ours = (seeded(Classifier, optimizer, dropout=0.0) for _ in range(2))
    fit(tmp_path, "auto", plain, precision="bf16-true", epochs=4)
    fit(tmp_path, "async_sgd", ours, precision="bf16-true", epochs=4)
    assert equal(plain, ours) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_buffers_of_every_kind_end_as_in_a_plain_trainer(tmp_path, kind):
    plain, ours, shared = (seeded(Keeps, kind) for _ in range(3))
    fit(tmp_path, "auto", plain)
    fit(tmp_path, "async_sgd", ours)
    assert equal(plain, ours) == (["kept"] if kind == "nan" else [])  # NaN is not equal to itself
    assert torch.equal(plain.kept.isnan(), ours.kept.isnan())
    fit(tmp_path, "async_sgd", shared, devices=2)
    assert (shared.kept.dtype, shared.kept.shape) == (plain.kept.dtype, plain.kept.shape)
    if kind == "nan":
        assert shared.kept.isnan().tolist() == [False, True, True]
    elif kind == "bool":
        assert len(set(shared.kept.tolist())) == 1  # of one worker, as a whole
    else:
        assert shared.kept.isfinite().all()


class Draws(pl.LightningDataModule):
    """Splits its data in `setup` by numbers that no seed rules."""

    def setup(self, stage):
        self.kept = np.random.default_rng().permutation(64)[:48]

    def train_dataloader(self):
        return DataLoader(Subset(Noted(), self.kept.tolist()), batch_size=8)


def test_a_split_that_no_seed_rules_is_refused_with_several_workers(tmp_path):
    with pytest.raises(WorkerFailedError, match="other training data than the first worker"):
        fit(tmp_path, "async_sgd", Classifier(), data=Draws(), devices=2)
    assert fit(tmp_path, "async_sgd", Classifier(), data=Draws()).global_step == 12
