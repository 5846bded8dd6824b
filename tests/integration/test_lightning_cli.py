"""LightningCLI takes every callback and strategy of ours by class path, by name and from a configuration file."""

import inspect
import re

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_accel
from lightning_accel import AsyncSGDStrategy, callbacks
from lightning_accel.bench import suites  # noqa: F401  # whatever else is imported: names must stay unambiguous

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
CALLBACKS = [
    name
    for name in sorted({*callbacks.__all__, *lightning_accel.__all__})
    if inspect.isclass(kind := getattr(callbacks, name, None)) and issubclass(kind, Callback)
]
QUIET = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false"]


def cli_of(*arguments):
    return LightningCLI(BoringModel, run=False, save_config_callback=None, args=[*QUIET, *arguments])


def needed(kind):
    """Return values for the arguments that have no default."""
    known = {"parameters": "[layer.weight]", "radius": "1.0"}
    parameters = inspect.signature(kind).parameters.values()
    return [f"--trainer.callbacks.{p.name}={known[p.name]}" for p in parameters if p.default is inspect.Parameter.empty]


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("written", ["lightning_accel.{}", "lightning_accel.callbacks.{}", "{}"])
def test_a_callback_is_taken(name, written):
    if not hasattr(lightning_accel, name):
        written = written.replace("lightning_accel.{}", "lightning_accel.callbacks.{}")
    kind = getattr(callbacks, name)
    cli = cli_of(f"--trainer.callbacks+={written.format(name)}", *needed(kind))
    assert [type(callback) for callback in cli.trainer.callbacks].count(kind) == 1


@pytest.mark.parametrize("name", CALLBACKS)
def test_help_explains_every_argument_of_a_callback(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli_of(f"--trainer.callbacks.help=lightning_accel.callbacks.{name}")
    assert stop.value.code == 0
    options = re.split(r"\n +--", capsys.readouterr().out)[1:]
    explained = {option.split()[0].rpartition(".")[2]: " ".join(option.split()[1:]) for option in options}
    for argument in inspect.signature(getattr(callbacks, name)).parameters:
        text, kind = re.split(r"\((?:required, )?type: ", explained[argument])
        assert kind, argument
        assert len(text.split()) > 3, f"{argument}: {text}"
        assert "See `" not in text[:20], f"{argument}: {text}"


@pytest.mark.parametrize(
    "written",
    [
        "=async_sgd",
        ".class_path=lightning_accel.AsyncSGDStrategy",
        ".class_path=lightning_accel.strategies.AsyncSGDStrategy",
        ".class_path=AsyncSGDStrategy",
    ],
)
def test_the_strategy_is_taken(written):  # a class behind a bare `=` LightningCLI takes for a name, Lightning's own too
    cli = cli_of(f"--trainer.strategy{written}", "--trainer.devices=2")
    assert type(cli.trainer.strategy) is AsyncSGDStrategy


def test_arguments_of_the_strategy():
    cli = cli_of(
        "--trainer.strategy=lightning_accel.strategies.AsyncSGDStrategy",
        "--trainer.strategy.staleness=drop",
        "--trainer.strategy.n_push=3",
        "--trainer.devices=2",
    )
    assert cli.trainer.strategy.settings.n_push == 3


def test_a_configuration_file_fits_with_everything(tmp_path):
    trainer = {
        "max_steps": 2,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "lightning_accel.RankQuantization", "init_args": {"when": 1, "on_loss": "keep"}},
            {"class_path": "lightning_accel.SequentialFreezing"},
        ],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    cli = cli_of(f"--config={tmp_path / 'config.yaml'}")
    cli.trainer.fit(cli.model)
    assert cli.trainer.global_step == 2
