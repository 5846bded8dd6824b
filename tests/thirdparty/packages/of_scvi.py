"""scvi-tools: a variational autoencoder of cell counts; `train` makes a Trainer of `lightning.pytorch`."""

import scvi
from scvi.data import synthetic_iid

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "scvi-tools", "single-cell biology", "scVI", "-ELBO"
INSTALL = (("scvi-tools",),)
NO_STRATEGY = ""
EPOCHS = 6

CELLS = synthetic_iid(batch_size=200, n_batches=2, n_genes=200)
scvi.model.SCVI.setup_anndata(CELLS, batch_key="batch")


def train(callbacks, *, strategy, devices):
    model = scvi.model.SCVI(CELLS, n_hidden=128, n_latent=10, n_layers=2)
    settings = trainer_settings(callbacks, strategy, devices)
    del settings["enable_model_summary"]
    model.train(max_epochs=EPOCHS, batch_size=64, **settings)
    return model


def module_of(model):
    return model.module


def predict(model):
    return model.get_latent_representation()


def score(model):
    scvi.settings.seed = 0
    return -float(model.get_elbo())


def reload(model, folder):
    model.save(str(folder / "saved"))
    return scvi.model.SCVI.load(str(folder / "saved"), CELLS, accelerator="cpu")
