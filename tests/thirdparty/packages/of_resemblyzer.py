"""Resemblyzer: its pretrained LSTM that embeds speakers, fine-tuned on synthesized voices in a LightningModule."""

import lightning.pytorch as pl
import numpy as np
import torch
from resemblyzer import VoiceEncoder
from resemblyzer.audio import wav_to_mel_spectrogram
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import load_from_checkpoint
from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "resemblyzer", "speaker embedding", "pretrained LSTM, 3 x 256", "cross-entropy"
INSTALL = (("--no-deps", "resemblyzer"), ("librosa", "webrtcvad-wheels"))
NO_STRATEGY = ""
EPOCHS, SPEAKERS, UTTERANCES, RATE = 3, 6, 12, 16000

_random = np.random.default_rng(0)


def _utterance(pitch, formants):
    """Half a second of harmonics under a speaker's formants, with noise, as the encoder's mel frames."""
    moments = np.arange(RATE // 2) / RATE
    frequencies = pitch * _random.uniform(0.9, 1.1) * np.arange(1, 30)
    heard = sum(np.exp(-(((frequencies - formant * _random.uniform(0.95, 1.05)) / 200) ** 2)) for formant in formants)
    wave = (heard[:, None] * np.sin(2 * np.pi * frequencies[:, None] * moments)).sum(axis=0)
    wave += 0.1 * wave.std() * _random.normal(size=wave.shape)
    return wav_to_mel_spectrogram((0.1 * wave / np.abs(wave).max()).astype("float32"))[:48]


_voices = [(_random.uniform(90, 250), _random.uniform([300, 900, 2200], [800, 2000, 3200])) for _ in range(SPEAKERS)]
_frames = np.stack([_utterance(*voice) for voice in _voices for _ in range(UTTERANCES)])
_speakers = torch.arange(SPEAKERS).repeat_interleave(UTTERANCES)
_is_held_out = torch.arange(len(_speakers)) % 3 == 0
TRAIN = TensorDataset(torch.from_numpy(_frames)[~_is_held_out], _speakers[~_is_held_out])
HELD_OUT = TensorDataset(torch.from_numpy(_frames)[_is_held_out], _speakers[_is_held_out])


class Speakers(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = VoiceEncoder("cpu", verbose=False)
        self.speakers = torch.nn.Parameter(torch.zeros(SPEAKERS, 256))

    def loss(self, frames, speakers):
        return F.cross_entropy(10.0 * self.encoder(frames) @ self.speakers.T, speakers)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)


def train(callbacks, *, strategy, devices):
    module = Speakers()
    settings = trainer_settings(callbacks, strategy, devices)
    trainer = pl.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False, **settings)
    trainer.fit(module, DataLoader(TRAIN, batch_size=8, shuffle=True))
    return module, trainer


def module_of(trained):
    return trained[0]


def predict(trained):
    with torch.no_grad():
        return trained[0].eval().encoder(HELD_OUT.tensors[0]).numpy()


def score(trained):
    with torch.no_grad():
        return trained[0].eval().loss(*HELD_OUT.tensors).item()


def reload(trained, folder):
    path = folder / "model.ckpt"
    trained[1].save_checkpoint(path)
    return load_from_checkpoint(Speakers, path), trained[1]
