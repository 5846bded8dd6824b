"""Projections with default settings end near the accuracy of plain training, at the sparsity that was asked for."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_accel import zoo
from lightning_accel.callbacks import L1InfProjection

IMAGES = {"channels": 1, "image_size": 8}


class Watch(Callback):
    """Keep the trainable weights of the layers that a callback has chosen."""

    def __init__(self, projection):
        self.projection, self.zero = projection, {}

    def on_train_end(self, trainer, pl_module):
        targets = self.projection._run.projector.targets
        self.zero = {t.name: float((t.view() == 0).all(t.rest_dims).double().mean()) for t in targets}


def accuracy(model, data, epochs, callbacks=()):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    return found["test/accuracy"]


CASES = {
    "SAE 90 %": (zoo.SupervisedAutoencoder, {"in_features": 30}, zoo.BreastCancer, {}, 30, 0.9, 2),
    "MLP": (zoo.MLP, {**IMAGES, "width": 128, "depth": 3}, zoo.Digits, {}, 20, None, 3),
    "CNN": (zoo.CNN, {**IMAGES, "width": 16, "lr": 2e-3}, zoo.Digits, {}, 10, None, None),
    "ResNet-18": (zoo.ResNet18, {**IMAGES, "width": 32, "schedule": "cosine"}, zoo.Digits, {}, 6, None, None),
    "ViT": (zoo.ViT, {**IMAGES, "dim": 64, "depth": 2, "heads": 4, "lr": 1e-3}, zoo.Digits, {}, 20, None, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_defaults_end_within_two_points_of_plain_training_at_the_target(name):
    kind, arguments, data, settings, epochs, sparsity, layers = CASES[name]
    found = {}
    for projected in (False, True):
        seed_everything(1, verbose=False)
        torch.set_num_threads(1)
        callbacks = []
        if projected:
            projection = L1InfProjection(target_sparsity=sparsity)
            callbacks = [projection, watch := Watch(projection)]
        found[projected] = accuracy(kind(**arguments), data(**settings), epochs, callbacks)
    assert found[False] > 0.9
    assert found[True] >= found[False] - 0.02, found
    target = 0.5 if sparsity is None else sparsity
    assert len(watch.zero) >= 2
    if layers is not None:
        assert len(watch.zero) == layers, "all but what writes the output"
    for layer, zero in watch.zero.items():
        assert math.isclose(zero, target, abs_tol=0.02 if sparsity is None else 0.01), layer
