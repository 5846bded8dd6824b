"""darts: N-HiTS forecasts a noisy sine; `fit` makes a Trainer of `pytorch_lightning`."""

import numpy as np
from darts import TimeSeries
from darts.models import NHiTSModel

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "darts", "forecasting", "N-HiTS", "MAE"
INSTALL = (("darts",),)
NO_STRATEGY = ""
EPOCHS, HORIZON, LENGTH = 6, 12, 300

_times = np.arange(LENGTH)
_noise = np.random.default_rng(0).normal(size=LENGTH)
SERIES = TimeSeries.from_values((np.sin(_times / 6) + 0.1 * _noise).astype("float32"))
TRAIN, HELD_OUT = SERIES[:-HORIZON], SERIES[-HORIZON:]


def train(callbacks, *, strategy, devices):
    trainer = trainer_settings(callbacks, strategy, devices)
    model = NHiTSModel(36, HORIZON, n_epochs=EPOCHS, batch_size=32, pl_trainer_kwargs=trainer)
    return model.fit(TRAIN)


def module_of(model):
    return model.model


def predict(model):
    return model.predict(HORIZON, series=TRAIN, verbose=False).values()


def score(model):
    return np.abs(predict(model) - HELD_OUT.values()).mean()


def reload(model, folder):
    path = str(folder / "model.pt")
    model.save(path)  # callbacks are pickled with it, hence `trusted`
    return NHiTSModel.load(path, pl_trainer_kwargs={"accelerator": "cpu"}, trusted=True)
