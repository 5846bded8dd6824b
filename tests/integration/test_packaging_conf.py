"""Every configuration file composes, and everything it names exists."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_accel.cli import COMMANDS
from lightning_accel.cli.compose import compose, targets

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*/*.yaml"))
LISTS = ("callbacks", "monitoring", "logger")


def plain(name, *overrides):
    return OmegaConf.to_container(compose(name, overrides), resolve=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_composes(name):
    missing = [key for key, value in plain(name).items() if value == "???"]
    assert missing == (["ckpt"] if name == "export" else [])


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes_and_names_things_that_exist(option):
    depth = len(option.parts) - 1 if option.parts[0] == "hydra" else 1
    group, name = "/".join(option.parts[:depth]), "/".join(option.parts[depth:])
    if group == "hydra/sweeper/sampler":
        group, name = "sweep=optuna", f"{group}={name}"
    words = [group, name] if "=" in group else [f"{group}=[{name}]" if group in LISTS else f"{group}={name}"]
    found = list(targets(plain("train", *words)))
    assert found
    for target in found:
        assert callable(pkgutil.resolve_name(target)), target


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_says_what_it_is_for(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), path


def test_another_app_sees_the_groups_of_accelerators_alone(tmp_path):
    (tmp_path / "conf" / "callbacks").mkdir(parents=True)
    (tmp_path / "conf" / "callbacks" / "mine.yaml").write_text("mine: {patience: 3}\n")
    (tmp_path / "conf" / "train.yaml").write_text("defaults:\n  - callbacks: mine\n  - optional strategy: null\n")
    (tmp_path / "app.py").write_text(
        "import hydra\n\n\n@hydra.main(version_base='1.3', config_path='conf', config_name='train')\n"
        "def main(cfg):\n    print(sorted(cfg.callbacks), cfg.trainer.strategy._target_)\n\n\nmain()\n"
    )

    def app(*arguments):
        command = [sys.executable, "app.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout

    groups = [line.split(":")[0] for line in app("--help").split("==")[2].splitlines() if ": " in line]
    assert groups == ["callbacks", "strategy"]
    said = app("callbacks=[mine,rank_quantization]", "strategy=async_sgd", "hydra.run.dir=.")
    assert said == "['mine', 'rank_quantization'] lightning_accel.strategies.AsyncSGDStrategy\n"
