"""PyKEEN: embeddings of a knowledge graph by its LightningModule; the caller's Trainer is of `pytorch_lightning`."""

import numpy as np
import pytorch_lightning as pl
import torch
from pykeen.contrib.lightning import LCWALitModule
from pykeen.datasets import EagerDataset
from pykeen.triples import TriplesFactory

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "pykeen", "knowledge graphs", "ConvE", "mean rank"
INSTALL = (("pykeen",),)
NO_STRATEGY = ""
EPOCHS, ENTITIES = 5, 60

# who comes how many places after whom in a circle
_triples = np.array(
    [(f"e{i}", f"plus{step}", f"e{(i + step) % ENTITIES}") for i in range(ENTITIES) for step in range(1, 9)]
)
_whole = TriplesFactory.from_labeled_triples(_triples, create_inverse_triples=True)
TRAIN, HELD_OUT = _whole.split([0.8, 0.2], random_state=0)


def _module():
    return LCWALitModule(
        dataset=EagerDataset(TRAIN, HELD_OUT), model="conve", model_kwargs={"embedding_dim": 100}, batch_size=32
    )


def train(callbacks, *, strategy, devices):
    module = _module()
    settings = trainer_settings(callbacks, strategy, devices)
    trainer = pl.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False, **settings)
    trainer.fit(module)
    return module, trainer


def module_of(trained):
    return trained[0]


def predict(trained):
    module = trained[0].eval()
    with torch.no_grad():
        return module(HELD_OUT.mapped_triples[:, :2]).numpy()


def score(trained):
    scores, tails = predict(trained), HELD_OUT.mapped_triples[:, 2].numpy()
    own = scores[np.arange(len(tails)), tails]
    return (scores >= own[:, None]).sum(axis=1).mean()


def reload(trained, folder):
    path = folder / "model.ckpt"
    trained[1].save_checkpoint(path)
    again = _module()  # takes its data, which no checkpoint holds
    state = torch.load(path, weights_only=True)["state_dict"]
    again.load_state_dict(state)
    return again, trained[1]
