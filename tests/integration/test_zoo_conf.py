"""Every configuration of the zoo composes, trains, and says what fits where it does not."""

import importlib
import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from omegaconf import OmegaConf

CONF = Path(importlib.import_module("lightning_accel.conf").__file__).parent
OF_ZOO = [
    (group, path.stem)
    for group in ("model", "data")
    for path in sorted((CONF / group).glob("*.yaml"))
    if "lightning_accel.zoo." in path.read_text()
]
MODELS = [name for group, name in OF_ZOO if group == "model"]
EXPERIMENTS = [
    "adding",
    "char_lm",
    "cnn_digits",
    "copy",
    "gan_digits",
    "mlp_digits",
    "mlp_low_rank",
    "resnet18_digits",
    "resnet18_low_rank",
    "sae_breast_cancer",
    "sae_synthetic",
    "vit_digits",
    "vit_low_rank",
]
FITS_DIGITS = {"mlp", "cnn", "resnet18", "vit", "sae", "gan"}
# What keeps these fits short; the experiments themselves are as they are.
SMALL = {
    "resnet18_digits": ["model.width=4"],
    "resnet18_low_rank": ["model.width=4"],
    "vit_digits": ["model.dim=24", "model.depth=2"],
    "vit_low_rank": ["model.dim=24", "model.depth=2"],
    "mlp_digits": ["model.width=32"],
    "mlp_low_rank": ["model.width=32"],
    "char_lm": ["model.hidden_size=16"],
}


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("train", list(overrides))


def fit(config):
    seed_everything(config.seed, verbose=False)
    model, data = instantiate(config.model), instantiate(config.data)
    trainer = Trainer(
        max_steps=2,
        max_epochs=config.trainer.max_epochs,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    return trainer


def test_all_models_and_data_are_there():
    assert {"mlp", "cnn", "resnet18", "vit", "sae", "char_lm", "gan", "recurrent_regressor"} <= set(MODELS)
    data = {name for group, name in OF_ZOO if group == "data"}
    assert {"digits", "breast_cancer", "classification", "topics", "adding", "copy"} <= data


@pytest.mark.parametrize(("group", "name"), OF_ZOO)
def test_every_argument_has_a_commented_knob(group, name):
    node = composed(f"{group}={name}")[group]
    package, _, cls = node._target_.rpartition(".")
    arguments = inspect.signature(getattr(importlib.import_module(package), cls)).parameters
    assert set(node) - {"_target_"} == set(arguments)
    own = [line for line in (CONF / group / f"{name}.yaml").read_text().splitlines() if line.strip()]
    assert own[0].startswith("#")
    for argument in arguments:
        assert any(line.strip().startswith(f"{argument}:") and "  # " in line for line in own), argument


@pytest.mark.parametrize(("group", "name"), OF_ZOO)
def test_defaults_are_those_of_the_class(group, name):
    node = OmegaConf.to_container(composed(f"{group}={name}")[group], resolve=False)
    package, _, cls = node.pop("_target_").rpartition(".")
    arguments = inspect.signature(getattr(importlib.import_module(package), cls)).parameters
    for key, value in node.items():
        if not str(value).startswith("${"):
            assert value == arguments[key].default, key


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains_and_logs_its_metric(name):
    config = composed(f"experiment={name}", *SMALL.get(name, []))
    trainer = fit(config)
    assert trainer.global_step == 2
    assert config.optimized_metric in trainer.callback_metrics
    assert config.optimized_mode == ("min" if "loss" in config.optimized_metric else "max")


@pytest.mark.parametrize("name", MODELS)
def test_model_trains_on_the_default_data_or_names_other_data(name):
    small = {"resnet18": ["model.width=4"], "vit": ["model.dim=24", "model.depth=2"]}
    config = composed(f"model={name}", *small.get(name, []))
    if name in FITS_DIGITS:
        assert fit(config).global_step == 2
    else:
        with pytest.raises(ValueError, match=r"Choose data of \w+, `data="):
            fit(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=mlp", "data=breast_cancer"],
        ["model=mlp", "data=digits", "data.image_size=16", "data.channels=3"],
        ["model=sae", "data=digits"],
        ["model=cnn", "data=digits", "data.image_size=16"],
        ["model=char_lm", "data=copy", "model.hidden_size=8"],
    ],
    ids=" ".join,
)
def test_models_take_their_sizes_from_the_data(overrides):
    assert fit(composed(*overrides)).global_step == 2


@pytest.mark.parametrize(
    ("model", "data"), [("mlp", "topics"), ("vit", "breast_cancer"), ("gan", "classification"), ("cnn", "adding")]
)
def test_wrong_data_are_named(model, data):
    with pytest.raises(ValueError, match=r"Choose (image )?data .*`data=digits`"):
        fit(composed(f"model={model}", f"data={data}"))
