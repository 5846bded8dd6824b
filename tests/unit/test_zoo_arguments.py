"""Every argument of the zoo is checked where it is given."""

import sys

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_accel import zoo
from lightning_accel.zoo.arguments import check_choice, check_integers, check_numbers
from lightning_accel.zoo.models.cells import LayerNormLSTMCell, MinGRUCell, PeepholeLSTMCell
from lightning_accel.zoo.models.recurrent_layers import RecurrentLayers

OPTIMIZATION = [
    ({"lr": 0.0}, r"`lr` must be a finite number > 0.0, got 0.0"),
    ({"lr": float("nan")}, r"`lr` must be a finite number > 0.0, got nan"),
    ({"weight_decay": -1.0}, r"`weight_decay` must be a finite number >= 0.0, got -1.0"),
    ({"optimizer": "lbfgs"}, r"`optimizer` must be one of 'sgd', 'adam', 'adamw', got 'lbfgs'"),
    ({"schedule": "step"}, r"`schedule` must be one of 'constant', 'linear', 'cosine', got 'step'"),
    ({"warmup_steps": -1}, r"`warmup_steps` must be an integer >= 0, got -1"),
]
WITH_OPTIMIZATION = ["MLP", "CNN", "ResNet18", "ViT", "SupervisedAutoencoder", "CharLM", "RecurrentRegressor"]

WRONG = [
    ("MLP", {"in_features": 0}, r"`in_features` must be an integer >= 1, got 0"),
    ("MLP", {"num_classes": 1}, r"`num_classes` must be an integer >= 2, got 1"),
    ("MLP", {"width": 0}, r"`width` must be an integer >= 1, got 0"),
    ("MLP", {"depth": "4"}, r"`depth` must be an integer >= 1, got '4'"),
    ("MLP", {"dropout": 1.0}, r"`dropout` must be a finite number >= 0.0 and < 1.0, got 1.0"),
    ("CNN", {"image_size": 9}, r"`image_size` must be even for the 2x2 pooling, got 9"),
    ("CNN", {"dropout": -0.1}, r"`dropout` must be a finite number >= 0.0 and < 1.0, got -0.1"),
    ("CNN", {"hidden": 0}, r"`hidden` must be an integer >= 1, got 0"),
    ("ResNet18", {"image_size": 4}, r"`image_size` must be an integer >= 8, got 4"),
    ("ResNet18", {"width": True}, r"`width` must be an integer >= 1, got True"),
    ("ViT", {"image_size": 30}, r"`image_size` must be a multiple of `patch_size` = 4, got 30"),
    ("ViT", {"dim": 100}, r"`dim` must be a multiple of `heads` = 6, got 100"),
    ("ViT", {"depth": 0}, r"`depth` must be an integer >= 1, got 0"),
    ("SupervisedAutoencoder", {"in_features": -3}, r"`in_features` must be an integer >= 1, got -3"),
    ("SupervisedAutoencoder", {"reconstruction_weight": -0.1}, r"`reconstruction_weight` must be a finite number >= 0"),
    ("CharLM", {"vocab_size": 1}, r"`vocab_size` must be an integer >= 2, got 1"),
    ("CharLM", {"cell": "gru"}, r"`cell` must be one of 'lstm', 'lstm_cell', 'peephole', .*, got 'gru'"),
    ("CharLM", {"layers": 0}, r"`layers` must be an integer >= 1, got 0"),
    ("RecurrentRegressor", {"tolerance": 0.0}, r"`tolerance` must be a finite number > 0.0, got 0.0"),
    ("GAN", {"lr": -1.0}, r"`lr` must be a finite number > 0.0, got -1.0"),
    ("GAN", {"beta1": 1.0}, r"`beta1` must be a finite number >= 0.0 and < 1.0, got 1.0"),
    ("GAN", {"latent_dim": 0}, r"`latent_dim` must be an integer >= 1, got 0"),
    ("Digits", {"channels": 2}, r"`channels` must be 1 or 3, got 2"),
    ("Digits", {"image_size": 7}, r"`image_size` must be an integer >= 8, got 7"),
    ("Digits", {"batch_size": 0}, r"`batch_size` must be an integer >= 1, got 0"),
    ("Digits", {"val_fraction": 0.0}, r"`val_fraction` must be a finite number > 0.0 and < 0.5, got 0.0"),
    ("Digits", {"test_fraction": 0.5}, r"`test_fraction` must be a finite number > 0.0 and < 0.5, got 0.5"),
    ("Digits", {"seed": None}, r"`seed` must be an integer >= 0, got None"),
    ("BreastCancer", {"seed": -1}, r"`seed` must be an integer >= 0, got -1"),
    ("Classification", {"informative": 1001}, r"`informative` must be <= `features` = 1000, got 1001"),
    ("Classification", {"informative": 2, "classes": 5}, r"`informative` must be >= 3 to hold 5 clusters"),
    ("Classification", {"samples": 39}, r"`samples` must be an integer >= 40, got 39"),
    ("Classification", {"class_sep": 0.0}, r"`class_sep` must be a finite number > 0.0, got 0.0"),
    ("Classification", {"label_noise": 1.0}, r"`label_noise` must be a finite number >= 0.0 and < 1.0"),
    ("Topics", {"length": 0}, r"`length` must be an integer >= 1, got 0"),
    ("Topics", {"length": 20_000}, r"`length` must be <= 10000 for 5 % of the text"),
    ("AddingProblem", {"length": 1}, r"`length` must be an integer >= 2, got 1"),
    ("AddingProblem", {"samples": 9}, r"`samples` must be an integer >= 10, got 9"),
    ("CopyTask", {"delay": 0}, r"`delay` must be an integer >= 1, got 0"),
    ("CopyTask", {"symbols": 1}, r"`symbols` must be an integer >= 2, got 1"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_constructor_refuses(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(zoo, name)(**arguments)


@pytest.mark.parametrize("name", WITH_OPTIMIZATION)
@pytest.mark.parametrize(("arguments", "message"), OPTIMIZATION, ids=lambda value: str(value)[:30])
def test_constructor_refuses_optimization(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(zoo, name)(**arguments)


def test_checks_name_the_first_wrong_value():
    check_integers(2, a=2, b=3)
    check_numbers(0.0, 1.0, a=0, b=0.5)
    check_choice("c", "x", ("x", "y"))
    with pytest.raises(ValueError, match="`b` must be an integer >= 2, got 1"):
        check_integers(2, a=2, b=1, c=0)
    with pytest.raises(ValueError, match=r"`b` must be a finite number >= 0.0, got inf"):
        check_numbers(0.0, a=1.0, b=float("inf"))


@pytest.mark.parametrize("cell", [PeepholeLSTMCell, LayerNormLSTMCell, MinGRUCell])
def test_cells_refuse_sizes_below_one(cell):
    with pytest.raises(ValueError, match="`hidden_size` must be an integer >= 1, got 0"):
        cell(3, 0)


def test_recurrent_layers_refuse_an_unknown_cell():
    with pytest.raises(ValueError, match="`cell` must be one of"):
        RecurrentLayers("rnn", 2, 3, 1)


IMAGE_MODELS = [("CNN", {}), ("ResNet18", {"channels": 1, "width": 4}), ("ViT", {"channels": 1, "dim": 12})]


@pytest.mark.parametrize(("name", "arguments"), IMAGE_MODELS)
@pytest.mark.parametrize("x", [torch.zeros(2, 30), torch.zeros(2, 1, 7, 7), torch.zeros(2, 1, 8, 8, dtype=torch.int64)])
def test_image_models_refuse_other_batches(name, arguments, x):
    model = getattr(zoo, name)(image_size=8, **arguments)
    with pytest.raises(
        ValueError, match=r"`x` must be floating-point images of shape \(batch, 1, 8, 8\), got .*digits"
    ):
        model(x)


@pytest.mark.parametrize("name", ["MLP", "SupervisedAutoencoder"])
@pytest.mark.parametrize("x", [torch.zeros(2, 30), torch.zeros(2, 64, dtype=torch.int64)])
def test_feature_models_refuse_other_batches(name, x):
    with pytest.raises(ValueError, match=r"`x` must hold 64 floating-point features a sample, got .*data=digits"):
        getattr(zoo, name)()(x)


def test_sequence_models_refuse_other_batches():
    with pytest.raises(ValueError, match=r"`tokens` must be int64 of shape \(batch, time\), got torch.float32.*topics"):
        zoo.CharLM(hidden_size=4)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"`x` must be floating-point of shape \(batch, time, 2\).*data=adding"):
        zoo.RecurrentRegressor(hidden_size=4)(torch.zeros(2, 5, 3))


def trainer(**arguments):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_gan_refuses_other_batches_in_fit():
    with pytest.raises(ValueError, match=r"`x` must be floating-point images of shape \(batch, 1, 8, 8\), got"):
        trainer(max_steps=1).fit(zoo.GAN(), zoo.BreastCancer())


def test_char_lm_refuses_data_with_more_tokens():
    with pytest.raises(ValueError, match=r"`vocab_size` must be >= 22, .* got 10. Set `model.vocab_size=22`"):
        trainer(max_steps=1).fit(zoo.CharLM(vocab_size=10, hidden_size=4), zoo.CopyTask(symbols=20, samples=100))


def test_falling_schedule_needs_an_end():
    model = zoo.MLP(width=4, depth=1, schedule="cosine")
    with pytest.raises(ValueError, match="`schedule='cosine'` needs an end, got a Trainer without one"):
        trainer(max_epochs=-1).fit(model, zoo.Digits())


@pytest.mark.parametrize("name", ["Digits", "BreastCancer", "Classification"])
def test_missing_scikit_learn_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'`pip install "lightning-accel\[examples\]"`'):
        getattr(zoo, name)().prepare_data()


def test_missing_corpus_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match=r"ships without `pydoc_data.topics`.*data=copy"):
        zoo.Topics().prepare_data()


def test_zoo_is_lazy_and_lists_its_names():
    assert set(dir(zoo)) == set(zoo.__all__)
    assert all(getattr(zoo, name).__name__ == name for name in zoo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Transformer'"):
        zoo.Transformer  # noqa: B018
