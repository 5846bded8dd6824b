"""deeptab: a transformer over the features of a table; `fit` makes a Trainer of `lightning.pytorch`."""

import numpy as np
import pandas as pd
from deeptab.models import FTTransformerRegressor

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "deeptab", "tables", "FT-Transformer", "RMSE"
INSTALL = (("deeptab",),)
NO_STRATEGY = ""
EPOCHS, ROWS, COLUMNS = 4, 700, 8

_random = np.random.default_rng(0)
_values = _random.normal(size=(ROWS, COLUMNS)).astype("float32")
TABLE = pd.DataFrame(_values, columns=[f"x{i}" for i in range(COLUMNS)])
TARGET = _values[:, 0] * _values[:, 1] + np.abs(_values[:, 2])


def train(callbacks, *, strategy, devices):
    model = FTTransformerRegressor()
    settings = trainer_settings(callbacks, strategy, devices)
    del settings["enable_model_summary"]
    model.fit(TABLE[:500], TARGET[:500], max_epochs=EPOCHS, batch_size=64, logger=False, **settings)
    return model


def module_of(model):
    return model._task_model


def predict(model):
    return np.asarray(model.predict(TABLE[500:]))


def score(model):
    return np.sqrt(np.square(predict(model).ravel() - TARGET[500:]).mean())


def reload(model, folder):
    path = str(folder / "model.pt")
    model.save(path)
    return FTTransformerRegressor.load(path)
