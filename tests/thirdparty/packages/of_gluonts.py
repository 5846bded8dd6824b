"""GluonTS: a patch transformer; `train` makes a Trainer of `lightning.pytorch` and reloads its best checkpoint."""

import numpy as np
import torch
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch import PatchTSTEstimator

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "gluonts", "forecasting", "PatchTST", "MAE"
INSTALL = (("gluonts[torch]",),)
NO_STRATEGY = ""
EPOCHS, BATCHES, HORIZON, LENGTH = 4, 12, 8, 160

_random = np.random.default_rng(0)
_targets = [np.sin(np.arange(LENGTH) / 5 + phase) + 2.0 + 0.1 * _random.normal(size=LENGTH) for phase in range(6)]
TRAIN = ListDataset([{"start": "2020-01-01", "target": target[:-HORIZON]} for target in _targets], freq="D")


def train(callbacks, *, strategy, devices):
    estimator = PatchTSTEstimator(
        prediction_length=HORIZON,
        context_length=32,
        patch_len=8,
        d_model=64,
        nhead=4,
        dim_feedforward=256,
        num_encoder_layers=2,
        num_batches_per_epoch=BATCHES,
        batch_size=32,
        trainer_kwargs={"max_epochs": EPOCHS, "logger": False} | trainer_settings(callbacks, strategy, devices),
    )
    return estimator.train_model(TRAIN)


def module_of(output):
    return output.trained_net


def _predict(predictor):
    return np.stack([forecast.quantile(0.5) for forecast in predictor.predict(TRAIN)])


def predict(output):
    torch.manual_seed(0)
    return _predict(output.predictor if hasattr(output, "predictor") else output)


def score(output):
    return np.abs(predict(output) - np.stack([target[-HORIZON:] for target in _targets])).mean()


def reload(output, folder):
    output.predictor.serialize(folder)
    return Predictor.deserialize(folder)
