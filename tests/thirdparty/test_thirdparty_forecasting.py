"""Models of pytorch-forecasting: the caller's Trainer, gated networks with shared modules, LSTMs that pack inside."""

import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from thirdparty_watch import Watch, factored, low_rank_callbacks, parameters_of

from lightning_accel import load_from_checkpoint
from lightning_accel.callbacks import IntraStreamScheduling, L1InfProjection, RankQuantization, SequentialFreezing
from lightning_accel.low_rank import merge

EPOCHS, BATCHES = 3, 6


@pytest.fixture(scope="module")
def series():
    from pytorch_forecasting.data.examples import generate_ar_data

    frame = generate_ar_data(seasonality=10.0, timesteps=80, n_series=8)
    return frame.assign(series=frame["series"].astype(str), value=frame["value"].astype("float32"))


def windows(series, **settings):
    from pytorch_forecasting import TimeSeriesDataSet

    return TimeSeriesDataSet(
        series,
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        max_encoder_length=16,
        max_prediction_length=5,
        time_varying_unknown_reals=["value"],
        **settings,
    )


@pytest.fixture(scope="module")
def univariate(series):
    return windows(series)


@pytest.fixture(scope="module")
def covariates(series):
    """Encoders of different lengths, which is why the LSTMs get packed sequences."""
    return windows(series, min_encoder_length=8, static_categoricals=["series"], time_varying_known_reals=["time_idx"])


def transformer(data):
    from pytorch_forecasting import TemporalFusionTransformer

    pl.seed_everything(0, verbose=False)
    return TemporalFusionTransformer.from_dataset(data, hidden_size=8, attention_head_size=2, learning_rate=0.01)


def deep_ar(data):
    from pytorch_forecasting import DeepAR

    pl.seed_everything(0, verbose=False)
    return DeepAR.from_dataset(data, hidden_size=8, rnn_layers=1, learning_rate=0.01)


def n_beats(data):
    from pytorch_forecasting import NBeats

    pl.seed_everything(0, verbose=False)
    sizes = {
        "widths": [32, 32],
        "num_blocks": [1, 1],
        "num_block_layers": [2, 2],
        "expansion_coefficient_lengths": [3, 7],
    }
    return NBeats.from_dataset(data, learning_rate=0.01, **sizes)


def fit(model, data, *callbacks, epochs=EPOCHS, ckpt_path=None, **settings):
    """Train; return what was watched, and the Trainer."""
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=BATCHES,
        callbacks=[*callbacks, watch],
        gradient_clip_val=0.1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    pl.seed_everything(1, verbose=False)
    loader = data.to_dataloader(train=True, batch_size=64, num_workers=0)
    trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=False)
    return watch, trainer


def predict(model, data):
    loader = data.to_dataloader(train=False, batch_size=64, num_workers=0)
    forecasts = model.predict(
        loader, trainer_kwargs={"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    )
    assert forecasts.shape == (len(data), 5)
    assert torch.isfinite(forecasts).all()
    return forecasts


@pytest.mark.parametrize("make", [transformer, n_beats])
def test_layers_become_low_rank_and_rest_in_turns(make, covariates, univariate):
    data = univariate if make is n_beats else covariates
    model = make(data)
    dense = parameters_of(model)
    quantization, freezing = low_rank_callbacks()
    watch, trainer = fit(model, data, quantization, freezing)
    names = factored(model)
    assert names == [layer.name for layer in quantization.plan.layers if layer.ranks is not None]
    assert parameters_of(model) < 0.8 * dense
    watch.check_losses(EPOCHS * BATCHES, per_epoch=BATCHES)
    watch.check_turns(names)
    assert all(p.requires_grad for p in model.parameters())

    # the package keeps objects of its own in its checkpoints
    path = trainer.checkpoint_callback.best_model_path
    loaded = load_from_checkpoint(type(model), path, weights_only=False)
    assert factored(loaded) == names
    forecasts = predict(model, data)
    assert torch.equal(predict(loaded, data), forecasts)
    assert set(merge(model)) == set(names)
    torch.testing.assert_close(predict(model, data), forecasts, rtol=1e-3, atol=1e-4)


def test_resumed_run_keeps_its_layers_and_decides_nothing(univariate, caplog):
    first, trainer = fit(n_beats(univariate), univariate, *low_rank_callbacks())
    path = trainer.checkpoint_callback.best_model_path
    resumed = n_beats(univariate)
    quantization, freezing = low_rank_callbacks()
    caplog.clear()  # of what the first run decided
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        watch, _ = fit(resumed, univariate, quantization, freezing, epochs=EPOCHS + 1, ckpt_path=path)
    assert "so it was decided in an earlier fit, or before the checkpoint" in caplog.text
    assert "a whole step takes" not in caplog.text
    assert factored(resumed) == factored(trainer.lightning_module)
    assert len(watch.losses) == BATCHES
    assert max(watch.losses) < first.losses[0]
    watch.check_turns(factored(resumed))


def test_short_run_stays_as_it_is(univariate, caplog):
    plain, untouched = n_beats(univariate), n_beats(univariate)
    expected, _ = fit(plain, univariate)
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        watch, _ = fit(untouched, univariate, RankQuantization(), SequentialFreezing())
    assert "the model stays dense: 18 steps remain" in caplog.text
    assert "steps aside: RankQuantization left the model dense" in caplog.text
    assert watch.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), plain.parameters(), strict=True))


def test_projection_clears_groups_of_a_transformer(covariates):
    model = transformer(covariates)
    projection = L1InfProjection(target_sparsity=0.5, schedule="constant", parameters="*.fc1.weight")
    watch, trainer = fit(model, covariates, projection)
    watch.check_losses(EPOCHS * BATCHES, per_epoch=BATCHES)
    assert projection.projections == EPOCHS * BATCHES
    weights = {name: p for name, p in model.named_parameters() if name.endswith(".fc1.weight")}
    assert len(weights) > 10
    for weight in weights.values():
        assert (weight == 0).all(dim=1).float().mean() >= 0.5
    path = trainer.checkpoint_callback.best_model_path
    loaded = type(model).load_from_checkpoint(path, weights_only=False)
    assert torch.equal(predict(loaded, covariates), predict(model, covariates))


@pytest.mark.parametrize(("make", "layers"), [(transformer, ["lstm_encoder", "lstm_decoder"]), (deep_ar, ["rnn"])])
def test_packed_lstms_run_padded_with_the_same_results(make, layers, covariates):
    plain, scheduled = make(covariates), make(covariates)
    # in double precision: in single, rounding alone drives two runs apart by a thousandth
    expected, _ = fit(plain, covariates, precision="64-true")
    scheduling = IntraStreamScheduling()
    watch, trainer = fit(scheduled, covariates, scheduling, precision="64-true")
    assert [line.split(":")[0] for line in scheduling.report] == layers
    assert all("packed calls run padded" in line for line in scheduling.report)
    watch.check_losses(EPOCHS * BATCHES, per_epoch=BATCHES)
    assert watch.losses == pytest.approx(expected.losses, rel=1e-7)
    assert scheduled.state_dict().keys() == plain.state_dict().keys()
    path = trainer.checkpoint_callback.best_model_path
    loaded = type(scheduled).load_from_checkpoint(path, weights_only=False)
    pl.seed_everything(2, verbose=False)
    forecasts = predict(scheduled.float(), covariates)
    pl.seed_everything(2, verbose=False)
    assert torch.equal(predict(loaded, covariates), forecasts)


def test_nothing_to_act_on_is_said(univariate):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(n_beats(univariate), univariate, IntraStreamScheduling())
    assert any("found no recurrent layer in NBeats" in str(w.message) for w in said)
    with pytest.raises(MisconfigurationException, match="found no low-rank layer in NBeats"):
        fit(n_beats(univariate), univariate, SequentialFreezing())
