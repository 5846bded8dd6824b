"""Callbacks that wait for the length of a fit, or have stepped aside, ask nothing twice: counted, not timed."""

from collections import Counter

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
from lightning_accel.callbacks.layer_exchange import holders
from lightning_accel.callbacks.rank_quantization import callback as _callback
from lightning_accel.callbacks.rank_quantization import decision as _decision
from lightning_accel.callbacks.rank_quantization import progress as _progress
from lightning_accel.callbacks.sequential_freezing import callback as _freezing

STEPS = 20  # an epoch


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(12, generator=generator) for _ in range(4 * STEPS))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 12))

    def training_step(self, batch, _):
        return (self.net(batch) - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.fixture
def asked(monkeypatch):
    """Counts calls of what looks through callbacks, modules or holders."""
    counts = Counter()

    def count(place, name):
        function = getattr(place, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(place, name, counted)

    count(_progress.Progress, "remaining")
    count(_progress, "every_callback")
    count(_decision, "why_not_exchanged")
    count(_callback, "why_not_exchanged")
    count(holders, "why_not_followed")
    count(_freezing, "low_rank_layers")
    count(_callback, "low_rank_layers")
    return counts


def fit(data, **limits):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callback = RankQuantization()
    trainer = Trainer(accelerator="cpu", callbacks=[callback, SequentialFreezing()], **off, **limits)
    trainer.fit(Net(), DataLoader(data, 4))
    return callback


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 3 * STEPS}])
def test_short_fit_on_data_without_a_length_is_asked_about_once_an_epoch(asked, limits):
    callback = fit(Stream(), **limits)
    assert callback.structure_state() == "dense"
    assert asked["remaining"] <= 3
    assert asked["every_callback"] <= 6
    assert asked["why_not_exchanged"] == asked["why_not_followed"] == 0
    assert asked["low_rank_layers"] <= 10


def test_short_fit_is_asked_about_once(asked):
    callback = fit([torch.zeros(12)] * 4 * STEPS, max_epochs=2)
    assert callback.structure_state() == "dense"
    assert "steps remain" in callback.plan.reason
    assert asked["remaining"] == 1
    assert asked["why_not_exchanged"] == 0
    assert asked["low_rank_layers"] <= 8
