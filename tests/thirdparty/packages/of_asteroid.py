"""Asteroid: a recurrent network separates two tones; `System` runs in a Trainer of `pytorch_lightning`."""

import pytorch_lightning as pl
import torch
from asteroid.engine.system import System
from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
from asteroid.models import BaseModel, LSTMTasNet
from torch.utils.data import DataLoader, TensorDataset

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "asteroid", "speech separation", "LSTM-TasNet", "-SI-SDR, dB"
INSTALL = (
    ("--no-deps", "asteroid", "asteroid-filterbanks"),  # it asks for torch before 2.0 and Lightning before 2.0
    ("soundfile", "cached_property", "julius", "huggingface_hub", "torch_optimizer", "pandas"),
)
NO_STRATEGY = ""
EPOCHS, SAMPLES = 3, 1600


def _mixtures(count, seed):
    """Low and high tones with noise, of random frequencies."""
    random = torch.Generator().manual_seed(seed)
    frequencies = torch.stack(
        [200 + 300 * torch.rand(count, generator=random), 800 + 800 * torch.rand(count, generator=random)], dim=1
    )
    sources = torch.sin(6.2832 * frequencies[..., None] * torch.arange(SAMPLES) / 8000)
    sources = sources + 0.01 * torch.randn(sources.shape, generator=random)
    return TensorDataset(sources.sum(dim=1), sources)


TRAIN, HELD_OUT = _mixtures(64, 0), _mixtures(16, 1)
LOSS = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")


def train(callbacks, *, strategy, devices):
    model = LSTMTasNet(n_src=2, n_filters=64, kernel_size=32, stride=16, hid_size=64, n_layers=2, rnn_type="LSTM")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    system = System(model, optimizer, LOSS, DataLoader(TRAIN, batch_size=8, shuffle=True), DataLoader(HELD_OUT, 16))
    settings = trainer_settings(callbacks, strategy, devices)
    trainer = pl.Trainer(max_epochs=EPOCHS, enable_checkpointing=False, **settings)
    trainer.fit(system)
    return system


def module_of(system):
    return system


def predict(system):
    with torch.no_grad():
        return system.eval()(HELD_OUT.tensors[0]).numpy()


def score(system):
    return LOSS(torch.from_numpy(predict(system)), HELD_OUT.tensors[1]).item()


def reload(system, folder):
    path = folder / "model.pt"
    torch.save(system.model.serialize(), path)
    return System(BaseModel.from_pretrained(torch.load(path, weights_only=False)), system.optimizer, LOSS, None)
