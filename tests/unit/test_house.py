"""Rules of the house that no linter knows: sizes of modules and folders, one owner for each default."""

import importlib
import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "lightning_accel").rglob("*.py"))
BY_THE_TRAINER = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
CONF = sorted([*(ROOT / "conf" / "callbacks").glob("*.yaml"), *(ROOT / "conf" / "strategy").glob("*.yaml")])


def test_no_module_is_longer_than_350_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > 350} == {}


def test_no_folder_holds_more_than_15_modules():
    folders = {path.parent for path in MODULES}
    sizes = {str(f.relative_to(ROOT)): len([p for p in f.glob("*.py") if p.name != "__init__.py"]) for f in folders}
    assert {folder: size for folder, size in sizes.items() if size > 15} == {}


def nodes(plain):
    if isinstance(plain, dict):
        if "_target_" in plain:
            yield plain
        for value in plain.values():
            yield from nodes(value)


@pytest.mark.parametrize("path", CONF, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_default_is_that_of_the_class_and_every_argument_has_a_knob(path):
    for node in nodes(OmegaConf.to_container(OmegaConf.load(path))):
        package, _, name = node.pop("_target_").rpartition(".")
        arguments = inspect.signature(getattr(importlib.import_module(package), name)).parameters
        assert set(node) == set(arguments) - BY_THE_TRAINER
        for key, value in node.items():
            default = arguments[key].default
            assert value == (list(default) if isinstance(default, tuple) else default), key
