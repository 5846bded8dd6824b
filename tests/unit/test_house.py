"""Rules of the house that no linter knows: sizes of modules and folders, one owner for each default."""

import ast
import importlib
import inspect
from pathlib import Path

import grimp
import pytest
from omegaconf import OmegaConf

from lightning_accel.torch_private import USED_IN_PLACE

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


def test_no_modules_import_each_other():
    """No circle, however long, between modules; a package's `__init__` is one of them.

    All imports count: inside functions, and under `TYPE_CHECKING`. What is loaded by a name in a string does not.
    """
    graph = grimp.build_graph("lightning_accel", cache_dir=None)
    left = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while ends := {m for m in left if not left[m] & left.keys() or m not in set().union(*left.values())}:
        left = {module: imported for module, imported in left.items() if module not in ends}
    assert left == {}


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


FENCE = {ROOT / "lightning_accel" / "torch_private.py", *(ROOT / "lightning_accel" / "lightning_private").glob("*.py")}
NOT_OF_TORCH = {
    "_exit": "public in `os`",
    "_fields": "public in named tuples, as `_replace`",
    "_replace": "",
    "_target_": "a key of Hydra",
    "_raylet": "of Ray, see `ray_private`",
    "_trial_id": "of Optuna, see `handle_of`",
    "_GlobalStateSnapshot": "parts of Lightning's launcher, see `launcher_module`",
    "_MultiProcessingLauncher": "",
    "_WorkerOutput": "",
    "_check_missing_main_guard": "",
}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """Yield the private names that code takes from other objects than its own instance."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in "self cls"):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_accel"):
            yield from (alias.name for alias in node.names)


def own_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_private_names_of_other_packages_stand_behind_the_fence_or_with_a_reason():
    trees = {path: ast.parse(path.read_text()) for path in MODULES}
    own = {name for tree in trees.values() for name in own_names(tree)}
    used = {name for path in set(trees) - FENCE for name in private_names(trees[path]) if private(name)}
    assert used - own - set(USED_IN_PLACE) - set(NOT_OF_TORCH) == set()
    assert (set(USED_IN_PLACE) | set(NOT_OF_TORCH)) - used == set()
