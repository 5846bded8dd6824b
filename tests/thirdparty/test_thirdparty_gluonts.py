"""Models of GluonTS: a Trainer made inside ``train``, failures swallowed, the best checkpoint reloaded strictly."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from thirdparty_watch import Watch, factored, low_rank_callbacks

from lightning_accel.callbacks import IntraStreamScheduling, L1InfProjection, RankQuantization

EPOCHS, BATCHES, HORIZON = 4, 6, 8


@pytest.fixture(scope="module")
def series():
    from gluonts.dataset.common import ListDataset

    random, days = np.random.default_rng(0), np.arange(120)
    targets = [np.sin(days / 5 + phase) + 2.0 + 0.1 * random.normal(size=len(days)) for phase in range(6)]
    return ListDataset([{"start": "2020-01-01", "target": target} for target in targets], freq="D")


def train(make, series, *callbacks, **settings):
    """Train by the package's call; return what was watched and what it returned."""
    watch = Watch()
    trainer = {
        "max_epochs": EPOCHS,
        "callbacks": [*callbacks, watch],
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    estimator = make(
        prediction_length=HORIZON, num_batches_per_epoch=BATCHES, batch_size=16, trainer_kwargs=trainer, **settings
    )
    pl.seed_everything(0, verbose=False)
    output = estimator.train_model(series)
    assert output.trainer.current_epoch == EPOCHS  # failures are swallowed
    return watch, output


def forecasts(output, series):
    pl.seed_everything(1, verbose=False)
    means = np.stack([forecast.mean for forecast in output.predictor.predict(series)])
    assert means.shape == (len(series), HORIZON)
    assert np.isfinite(means).all()
    return means


def patch_transformer(**settings):
    from gluonts.torch import PatchTSTEstimator

    sizes = {"context_length": 32, "patch_len": 8, "d_model": 16, "nhead": 2, "dim_feedforward": 32}
    return PatchTSTEstimator(**sizes, num_encoder_layers=1, **settings)


def feed_forward(**settings):
    from gluonts.torch import SimpleFeedForwardEstimator

    return SimpleFeedForwardEstimator(context_length=32, hidden_dimensions=[32, 32], **settings)


def deep_ar(**settings):
    from gluonts.torch import DeepAREstimator

    return DeepAREstimator(freq="D", context_length=16, hidden_size=8, **settings)


def keys_of_best(output):
    path = output.trainer.checkpoint_callback.best_model_path
    return torch.load(path, weights_only=True)["state_dict"].keys()


def test_low_rank_transformer_takes_its_best_checkpoint_back(series):
    quantization, freezing = low_rank_callbacks()
    watch, output = train(patch_transformer, series, quantization, freezing, lr=0.01)
    names = factored(output.trained_net)
    assert names == ["model.patch_proj", "model.flatten"]
    assert f"{names[0]}.factor_in" in keys_of_best(output)
    watch.check_losses(EPOCHS * BATCHES, per_epoch=BATCHES)
    watch.check_turns(names)
    forecasts(output, series)


def test_best_checkpoint_from_before_the_switch_makes_the_model_dense_again(series):
    # a tiny rank and no learning after the switch: the dense epochs stay the best
    quantization = RankQuantization(50.0, method="fixed", when=EPOCHS - 1, on_loss="keep", min_energy=0.0)
    watch, output = train(feed_forward, series, quantization, lr=0.003)
    assert quantization.structure_state() == "low rank"
    assert "model.nn.0.weight" in keys_of_best(output)
    assert factored(output.trained_net) == []
    assert watch.losses[-1] > watch.losses[-BATCHES - 1]
    forecasts(output, series)


def test_projection_clears_neurons(series):
    projection = L1InfProjection(target_sparsity=0.5, schedule="constant", parameters="model.nn.*weight")
    watch, output = train(feed_forward, series, projection, lr=0.01)
    watch.check_losses(EPOCHS * BATCHES, per_epoch=BATCHES)
    assert projection.projections == EPOCHS * BATCHES
    for index in (0, 2):
        weight = output.trained_net.get_parameter(f"model.nn.{index}.weight")
        assert (weight == 0).all(dim=1).float().mean() >= 0.5
    forecasts(output, series)


def test_lstm_that_is_not_packed_stays_exactly_as_it_is(series):
    plain, expected = train(deep_ar, series)
    scheduling = IntraStreamScheduling()
    watch, output = train(deep_ar, series, scheduling)
    assert scheduling.report == ["model.rnn: torch's kernel, nothing to gain"]
    assert watch.losses == plain.losses
    assert np.array_equal(forecasts(output, series), forecasts(expected, series))
