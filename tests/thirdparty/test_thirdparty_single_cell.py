"""Models of scvi-tools: a Trainer of its own made inside ``train``, a plan around the module, manual optimization."""

import logging
import math
import warnings

import numpy as np
import pytest
import torch
from thirdparty_watch import Watch, factored, low_rank_callbacks, parameters_of

from lightning_accel.callbacks import IntraStreamScheduling, L1InfProjection
from lightning_accel.low_rank import merge

EPOCHS, CELLS, GENES, BATCH = 4, 100, 60, 64


@pytest.fixture
def cells():
    from scvi.data import synthetic_iid

    return synthetic_iid(batch_size=CELLS, n_batches=2, n_genes=GENES)


def vae(cells):
    import scvi

    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    return scvi.model.SCVI(cells, n_hidden=32, n_latent=5)


def total_vae(cells):
    import scvi

    scvi.settings.seed = 0
    columns = {"batch_key": "batch", "protein_expression_obsm_key": "protein_expression"}
    scvi.model.TOTALVI.setup_anndata(cells, **columns)
    return scvi.model.TOTALVI(cells, n_latent=5)


def train(model, *callbacks, **settings):
    """Train by the package's call; return the steps of an epoch."""
    settings = {"accelerator": "cpu", "batch_size": BATCH, "enable_progress_bar": False} | settings
    model.train(max_epochs=EPOCHS, callbacks=[*callbacks], **settings)
    return math.ceil(len(model.train_indices) / BATCH)


def latent(model):
    means = model.get_latent_representation()
    assert means.shape == (2 * CELLS, 5)
    assert np.isfinite(means).all()
    return means


def test_variational_autoencoder_becomes_low_rank_where_its_code_allows(cells, caplog):
    model, watch = vae(cells), Watch()
    dense = parameters_of(model.module)
    quantization, freezing = low_rank_callbacks()
    with caplog.at_level(logging.WARNING, logger="lightning_accel"):
        steps = train(model, quantization, freezing, watch)
    # the decoder's first layer gets the batch appended only where it is an nn.Linear
    injected = "module.decoder.px_decoder.fc_layers.Layer 0.0"
    assert f"{injected} stays dense, because the training step fails with it low rank" in caplog.text
    names = factored(watch.module)
    assert len(names) >= 4
    assert injected not in names
    assert parameters_of(model.module) < dense
    watch.check_losses(EPOCHS * steps, per_epoch=steps)
    watch.check_turns(names)
    assert all(p.requires_grad for p in model.module.parameters())

    # the package saves the module alone and loads it strictly into a new one: give it dense layers
    means = latent(model)
    merge(model.module)
    model.save("saved")
    loaded = type(model).load("saved", cells, accelerator="cpu")
    np.testing.assert_allclose(latent(loaded), means, rtol=1e-3, atol=1e-4)


def test_projection_selects_genes(cells):
    model, watch = vae(cells), Watch()
    first = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
    projection = L1InfProjection(
        target_sparsity=0.5, schedule="constant", groups="columns", parameters=f"module.{first}"
    )
    steps = train(model, projection, watch)
    assert projection.projections == EPOCHS * steps
    watch.check_losses(EPOCHS * steps, per_epoch=steps)
    weight = model.module.get_parameter(first)
    assert weight.shape[1] == GENES
    dropped = (weight == 0).all(dim=0)
    assert 0.5 <= dropped.float().mean() < 1.0
    model.save("saved")
    loaded = type(model).load("saved", cells, accelerator="cpu")
    assert torch.equal(loaded.module.get_parameter(first), weight)
    means = latent(loaded)
    assert np.array_equal(means, latent(model))


def test_ball_that_holds_everything_changes_nothing(cells):
    plain, watches = vae(cells), (Watch(), Watch())
    train(plain, watches[0])
    projected = vae(cells)
    steps = train(projected, L1InfProjection(1e9), watches[1])
    assert len(watches[0].losses) == EPOCHS * steps
    assert watches[0].losses == watches[1].losses
    assert np.array_equal(latent(projected), latent(plain))


def test_missing_recurrent_layers_are_said(cells):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(vae(cells), IntraStreamScheduling())
    assert any("found no recurrent layer in TrainingPlan" in str(w.message) for w in said)


def test_all_together_under_manual_optimization(cells, caplog):
    model = total_vae(cells)
    quantization, freezing = low_rank_callbacks()
    first = "encoder.encoder.fc_layers.Layer 0.0.weight"
    projection = L1InfProjection(target_sparsity=0.3, parameters=f"module.{first}", groups="columns")
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(model, quantization, freezing, projection, adversarial_classifier=True)
    assert "manual optimization" in caplog.text
    assert quantization.structure_state() == "low rank"
    assert factored(model.module)
    assert (model.module.get_parameter(first) == 0).all(dim=0).float().mean() >= 0.3
    losses = model.history["elbo_train"].to_numpy(dtype=float)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    latent(model)


def test_layers_that_can_not_be_low_rank_stay_dense_in_manual_optimization(cells, caplog):
    model = total_vae(cells)
    quantization, *others = low_rank_callbacks()
    with caplog.at_level(logging.INFO, logger="lightning_accel"):
        train(model, quantization, *others, adversarial_classifier=True)
    assert "stays dense, because the training step fails with it low rank: RuntimeError: mat1 and mat2" in caplog.text
    assert quantization.structure_state() == "low rank"
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
    latent(model)
