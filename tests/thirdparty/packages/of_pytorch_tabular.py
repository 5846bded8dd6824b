"""pytorch-tabular: a feed-forward network on a table; `fit` makes a Trainer of `pytorch_lightning`."""

import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "pytorch-tabular", "tables", "category embedding", "RMSE"
INSTALL = (("pytorch-tabular",),)
NO_STRATEGY = ""
EPOCHS, ROWS, COLUMNS = 5, 1200, 12

_random = np.random.default_rng(0)
_values = _random.normal(size=(ROWS, COLUMNS))
_names = [f"x{i}" for i in range(COLUMNS)]
FRAME = pd.DataFrame(_values, columns=_names).assign(
    kind=_random.choice(["a", "b", "c"], ROWS), y=_values[:, 0] * _values[:, 1] + np.abs(_values[:, 2])
)
TRAIN, HELD_OUT = FRAME.iloc[:1000], FRAME.iloc[1000:]


def train(callbacks, *, strategy, devices):
    settings = trainer_settings([], strategy, devices)
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=_names, categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="regression", layers="256-256-128"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=64,
            max_epochs=EPOCHS,
            accelerator="cpu",
            devices=devices,
            progress_bar="none",
            early_stopping=None,
            checkpoints=None,
            load_best=False,
            trainer_kwargs={"strategy": strategy, "enable_model_summary": settings["enable_model_summary"]},
        ),
        verbose=False,
    )
    model.fit(train=TRAIN, validation=HELD_OUT, callbacks=callbacks)
    return model


def module_of(model):
    return model.model


def predict(model):
    return model.predict(HELD_OUT)["y_prediction"].to_numpy()


def score(model):
    return np.sqrt(np.square(predict(model) - HELD_OUT["y"].to_numpy()).mean())


def reload(model, folder):
    path = str(folder / "saved")
    model.save_model(path)
    return TabularModel.load_model(path)
