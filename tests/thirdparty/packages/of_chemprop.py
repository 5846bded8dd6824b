"""chemprop: message passing learns a made-up property of molecules; the Trainer is of `lightning.pytorch`."""

import itertools

import lightning.pytorch as pl
import numpy as np
import torch
from chemprop import data, featurizers, models, nn
from chemprop.models.utils import load_model, save_model
from rdkit import Chem

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "chemprop", "chemistry", "message passing network", "RMSE"
INSTALL = (("chemprop",),)
NO_STRATEGY = ""
EPOCHS = 5

_chains, _ends = ("C", "CC", "CCC", "CCO", "CNC", "c1ccccc1", "C1CCCCC1", "C=C"), ("O", "N", "F", "Cl", "C(=O)O", "C#N")
SMILES = [a + b + c for a, b, c in itertools.product(_chains, _chains, _ends)]


def _property(smiles):
    """Heavy atoms and rings, so that it can be learned."""
    molecule = Chem.MolFromSmiles(smiles)
    return molecule.GetNumHeavyAtoms() / 10.0 + 0.5 * molecule.GetRingInfo().NumRings()


VALUES = np.array([[_property(smiles)] for smiles in SMILES], dtype="float32")
_points = [data.MoleculeDatapoint.from_smi(smiles, value) for smiles, value in zip(SMILES, VALUES, strict=True)]
_featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
TRAIN = data.MoleculeDataset([p for i, p in enumerate(_points) if i % 4], _featurizer)
HELD_OUT = data.MoleculeDataset(_points[::4], _featurizer)


def _trainer(**settings):
    return pl.Trainer(logger=False, enable_checkpointing=False, **settings)


def train(callbacks, *, strategy, devices):
    model = models.MPNN(nn.BondMessagePassing(), nn.MeanAggregation(), nn.RegressionFFN(), batch_norm=True)
    trainer = _trainer(max_epochs=EPOCHS, **trainer_settings(callbacks, strategy, devices))
    trainer.fit(model, data.build_dataloader(TRAIN, batch_size=32, num_workers=0))
    return model


def module_of(model):
    return model


def predict(model):
    trainer = _trainer(**trainer_settings([], "auto", 1))
    batches = trainer.predict(model, data.build_dataloader(HELD_OUT, batch_size=64, num_workers=0, shuffle=False))
    return torch.cat(batches).numpy()


def score(model):
    return np.sqrt(np.square(predict(model) - VALUES[::4]).mean())


def reload(model, folder):
    save_model(folder / "model.pt", model)
    return load_model(folder / "model.pt")
