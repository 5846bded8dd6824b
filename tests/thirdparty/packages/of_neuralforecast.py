"""neuralforecast: an LSTM forecasts noisy sines; `fit` and `predict` make Trainers of `pytorch_lightning`."""

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import LSTM

from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "neuralforecast", "forecasting", "LSTM", "MAE"
INSTALL = (("neuralforecast",),)
NO_STRATEGY = ""
STEPS, HORIZON, LENGTH, SERIES = 30, 12, 160, 6

_days = pd.date_range("2020-01-01", periods=LENGTH, freq="D")
_random = np.random.default_rng(0)
FRAME = pd.concat(
    pd.DataFrame(
        {
            "unique_id": str(phase),
            "ds": _days,
            "y": np.sin(np.arange(LENGTH) / 6 + phase) + 0.1 * _random.normal(size=LENGTH),
        }
    )
    for phase in range(SERIES)
)
TRAIN = FRAME[FRAME["ds"] < _days[-HORIZON]]
HELD_OUT = FRAME[FRAME["ds"] >= _days[-HORIZON]]


def train(callbacks, *, strategy, devices):
    trainer = trainer_settings(callbacks, strategy, devices)
    model = LSTM(
        h=HORIZON,
        input_size=36,
        encoder_hidden_size=64,
        decoder_hidden_size=64,
        max_steps=STEPS,
        windows_batch_size=32,
        logger=False,
        **trainer,
    )
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(TRAIN)
    return forecast


def module_of(forecast):
    return forecast.models[0]


def predict(forecast):
    return forecast.predict(TRAIN)["LSTM"].to_numpy()


def score(forecast):
    return np.abs(predict(forecast) - HELD_OUT["y"].to_numpy()).mean()


def reload(forecast, folder):
    path = str(folder / "saved")
    forecast.save(path)
    again = NeuralForecast.load(path)
    again.models[0].trainer_kwargs["devices"] = 1  # it keeps the number of devices, not the strategy
    return again
