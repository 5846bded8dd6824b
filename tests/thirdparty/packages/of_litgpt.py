"""LitGPT: a small Pythia learns a made-up text, in the LightningModule that its documentation shows."""

import lightning.pytorch as pl
import litgpt
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_accel import load_from_checkpoint
from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "litgpt", "language models", "Pythia, 2 x 128", "cross-entropy"
INSTALL = (("litgpt",),)
NO_STRATEGY = ""
EPOCHS, LENGTH, WORDS = 3, 64, 128

_random = torch.Generator().manual_seed(0)
_next = torch.randint(WORDS, (WORDS, 2), generator=_random)  # each word is followed by one of two


def _text(length):
    words = [0]
    for choice in torch.randint(2, (length,), generator=_random).tolist():
        words.append(int(_next[words[-1], choice]))
    return torch.tensor(words)


TRAIN = _text(LENGTH * 112).unfold(0, LENGTH + 1, LENGTH)
HELD_OUT = _text(LENGTH * 32).unfold(0, LENGTH + 1, LENGTH)


class LitLLM(pl.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"n_layer": 2, "padded_vocab_size": WORDS, "block_size": LENGTH}
        self.model = litgpt.GPT(litgpt.Config.from_name("pythia-14m", **sizes))
        self.model.apply(self.model._init_weights)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def train(callbacks, *, strategy, devices):
    module = LitLLM()
    settings = trainer_settings(callbacks, strategy, devices)
    trainer = pl.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False, **settings)
    trainer.fit(module, DataLoader(TRAIN, batch_size=16, shuffle=True))
    return module, trainer


def module_of(trained):
    return trained[0]


def predict(trained):
    with torch.no_grad():
        return trained[0].eval().model(HELD_OUT[:, :-1]).numpy()


def score(trained):
    logits = torch.from_numpy(predict(trained))
    return F.cross_entropy(logits.flatten(0, 1), HELD_OUT[:, 1:].flatten()).item()


def reload(trained, folder):
    path = folder / "model.ckpt"
    trained[1].save_checkpoint(path)
    return load_from_checkpoint(LitLLM, path), trained[1]
