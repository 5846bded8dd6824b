"""Real fits of every zoo model on data of the zoo."""

import copy
import math
import statistics

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_accel import zoo

IMAGES = {"channels": 1, "image_size": 8}
# model, its arguments, data, their arguments, steps, part of the first loss that must be left at most
PAIRS = [
    ("MLP", {"width": 128}, "Digits", {}, 40, 0.6),
    ("MLP", {"in_features": 30, "num_classes": 2, "width": 64, "depth": 2}, "BreastCancer", {}, 40, 0.5),
    ("CNN", {}, "Digits", {}, 40, 0.5),
    ("CNN", {"optimizer": "sgd", "lr": 0.05}, "Digits", {}, 40, 0.5),
    ("ResNet18", {**IMAGES, "width": 8}, "Digits", {}, 40, 0.5),
    ("ViT", {**IMAGES, "dim": 48, "depth": 2, "heads": 3, "lr": 3e-3}, "Digits", {}, 60, 0.6),
    ("SupervisedAutoencoder", {"in_features": 30}, "BreastCancer", {}, 60, 0.6),
    ("SupervisedAutoencoder", {"in_features": 100}, "Classification", {"features": 100, "informative": 8}, 100, 0.75),
    ("SupervisedAutoencoder", {"num_classes": 10}, "Digits", {}, 60, 0.7),
    ("CharLM", {"hidden_size": 64}, "Topics", {"length": 32}, 60, 0.75),
    ("CharLM", {"hidden_size": 32, "cell": "lstm_cell"}, "Topics", {"length": 16}, 60, 0.8),
    ("CharLM", {"hidden_size": 32, "cell": "peephole"}, "Topics", {"length": 16}, 60, 0.8),
    ("CharLM", {"hidden_size": 32, "cell": "layer_norm"}, "Topics", {"length": 16}, 60, 0.8),
    ("CharLM", {"hidden_size": 32, "cell": "min_gru"}, "Topics", {"length": 16}, 60, 0.8),
    (
        "CharLM",
        {"hidden_size": 32, "vocab_size": 5},
        "CopyTask",
        {"delay": 1, "string_length": 1, "symbols": 3},
        60,
        0.5,
    ),
    ("RecurrentRegressor", {"hidden_size": 32}, "AddingProblem", {"length": 4, "samples": 4000}, 60, 0.5),
    ("RecurrentRegressor", {"cell": "min_gru"}, "AddingProblem", {"length": 4, "samples": 4000}, 60, 0.5),
]
IDS = [f"{model}-{arguments.get('cell', '')}-{data}" for model, arguments, data, *_ in PAIRS]


class Losses(Callback):
    """Keep the loss of every training step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def trainer(callbacks=(), **arguments):
    return Trainer(
        **{"accelerator": "cpu", "logger": False, **arguments},
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def build(model, arguments, data, options):
    seed_everything(1, verbose=False)
    return getattr(zoo, model)(**arguments), getattr(zoo, data)(**options)


def assert_equal(expected, actual):
    expected, actual = expected.state_dict(), actual.state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_loss_falls_and_metrics_are_logged(pair):
    *what, steps, left = pair
    module, datamodule = build(*what)
    losses = Losses()
    run = trainer([losses], max_steps=steps, max_epochs=100)
    run.fit(module, datamodule)
    assert len(losses.values) == steps
    assert statistics.mean(losses.values[-5:]) < left * losses.values[0]
    run.validate(module, datamodule, verbose=False)
    assert set(run.callback_metrics) == {"val/loss", "val/accuracy"}
    result = run.test(module, datamodule, verbose=False)[0]
    assert set(result) == {"test/loss", "test/accuracy"}
    assert 0 <= result["test/accuracy"] <= 1
    assert math.isfinite(result["test/loss"])


def test_gan_draws_images_closer_to_the_digits():
    module, data = build("GAN", {}, "Digits", {})
    run = trainer(max_epochs=40)  # after 20 the two networks still chase each other: 0.46 to 0.91 of the first loss
    before = run.validate(module, data, verbose=False)[0]["val/loss"]
    run.fit(module, data)
    assert {"train/generator_loss", "train/discriminator_loss", "train/loss"} <= set(run.callback_metrics)
    assert run.test(module, data, verbose=False)[0]["test/loss"] < 0.5 * before
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4], PAIRS[9], ("GAN", {}, "Digits", {})], ids=lambda pair: pair[0])
def test_equal_seeds_train_equal_models(pair):
    def trained():
        module, data = build(*pair[:4])
        trainer(max_steps=6).fit(module, data)
        return module

    assert_equal(trained(), trained())


@pytest.mark.parametrize("pair", [*PAIRS[:1], *PAIRS[2:6:2], *PAIRS[5:8:2], *PAIRS[9:16:3]], ids=lambda pair: pair[0])
def test_checkpoint_comes_back_through_load_from_checkpoint(pair, tmp_path):
    module, data = build(*pair[:4])
    run = trainer(max_steps=3)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    loaded = type(module).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert_equal(module, loaded)
    assert dict(loaded.hparams) == dict(module.hparams)
    results = [trainer().test(each, data, verbose=False)[0] for each in (module, loaded)]
    assert results[0] == results[1]


def test_gan_checkpoint_comes_back(tmp_path):
    module, data = build("GAN", {"hidden_size": 16}, "Digits", {})
    run = trainer(max_steps=4)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "gan.ckpt")
    assert_equal(module, zoo.GAN.load_from_checkpoint(tmp_path / "gan.ckpt", weights_only=True))


def test_trained_module_can_be_copied():
    module, data = build(*PAIRS[0][:4])
    trainer(max_steps=2).fit(module, data)
    assert_equal(module, copy.deepcopy(module))


def test_schedule_warms_up_and_ends_at_zero():
    module, data = build("MLP", {"width": 8, "schedule": "linear", "warmup_steps": 2, "lr": 0.1}, "Digits", {})
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    run = trainer([Rates()], max_steps=6)
    run.fit(module, data)
    assert seen == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])
    assert run.optimizers[0].param_groups[0]["lr"] == 0


@pytest.mark.parametrize("pair", [PAIRS[2], PAIRS[4]], ids=lambda pair: pair[0])
@pytest.mark.parametrize(("steps", "limit"), [(7, 1.0), (19, 1.0), (23, 1.0), (4, 4), (6, 4)])
def test_resumed_run_equals_uninterrupted_run(pair, steps, limit, tmp_path):
    """In the middle of an epoch, at its end, and with epochs that are cut short."""
    arguments = {"max_steps": 25 if limit == 1.0 else 10, "limit_val_batches": 0, "limit_train_batches": limit}

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == steps:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, data = build(*pair[:4])
    trainer([Save()], **arguments).fit(whole, data)
    resumed, data = build(*pair[:4])
    with torch.no_grad():
        next(resumed.parameters()).zero_()
    trainer(**arguments).fit(resumed, data, ckpt_path=tmp_path / "middle.ckpt")
    assert_equal(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "strategy"), [("MLP", "ddp_spawn"), ("GAN", "ddp_spawn_find_unused_parameters_true")]
)
def test_two_processes_train_and_evaluate_as_one(model, strategy):
    module, data = build(model, {}, "Digits", {"batch_size": 32})
    run = trainer(strategy=strategy, devices=2, max_epochs=4)
    run.fit(module, data)
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    alone = trainer().validate(module, data, verbose=False)[0]
    if model == "MLP":
        assert logged["val/accuracy"] > 0.85
        # The sampler of two processes counts one image twice, for there is an odd number of them.
        assert logged["val/accuracy"] == pytest.approx(alone["val/accuracy"], abs=0.01)
    else:
        assert logged["val/loss"] == pytest.approx(alone["val/loss"], abs=0.1)
