"""pytorch-forecasting: a temporal fusion transformer; the caller's Trainer is of `lightning.pytorch`."""

import lightning.pytorch as pl
import numpy as np
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data

from lightning_accel import load_from_checkpoint
from packages import trainer_settings

DISTRIBUTION, FIELD, MODEL, METRIC = "pytorch-forecasting", "forecasting", "temporal fusion transformer", "MAE"
INSTALL = (("pytorch-forecasting",),)
NO_STRATEGY = ""
EPOCHS, BATCHES, HORIZON = 3, 8, 5

np.random.seed(0)
_frame = generate_ar_data(seasonality=10.0, timesteps=80, n_series=8)
_frame = _frame.assign(series=_frame["series"].astype(str), value=_frame["value"].astype("float32"))
DATA = TimeSeriesDataSet(
    _frame[_frame["time_idx"] < 80 - HORIZON],
    time_idx="time_idx",
    target="value",
    group_ids=["series"],
    max_encoder_length=16,
    min_encoder_length=8,
    max_prediction_length=HORIZON,
    static_categoricals=["series"],
    time_varying_known_reals=["time_idx"],
    time_varying_unknown_reals=["value"],
)
HELD_OUT = TimeSeriesDataSet.from_dataset(DATA, _frame, predict=True, stop_randomization=True)


def _loader(data, *, train):
    return data.to_dataloader(train=train, batch_size=64, num_workers=0)


def train(callbacks, *, strategy, devices):
    model = TemporalFusionTransformer.from_dataset(DATA, hidden_size=32, attention_head_size=2, learning_rate=0.01)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        limit_train_batches=BATCHES,
        gradient_clip_val=0.1,
        logger=False,
        **trainer_settings(callbacks, strategy, devices),
    )
    trainer.fit(model, _loader(DATA, train=True))
    return model, trainer


def module_of(trained):
    return trained[0]


def predict(trained):
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return trained[0].predict(_loader(HELD_OUT, train=False), trainer_kwargs=settings).numpy()


def score(trained):
    actual = np.concatenate([y[0].numpy() for _, y in _loader(HELD_OUT, train=False)])
    return np.abs(predict(trained) - actual).mean()


def reload(trained, folder):
    model, trainer = trained
    path = str(folder / "model.ckpt")
    trainer.save_checkpoint(path)
    return load_from_checkpoint(type(model), path, weights_only=False), trainer
