"""Checkout, editable install and wheel offer the same, in any folder and to any Hydra app."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DEADLINE = 180  # seconds
FOREIGN_APP = """
import sys
import hydra

@hydra.main(config_path="conf", config_name="main", version_base="1.3")
def main(cfg):
    print(list(cfg.callbacks), cfg.callbacks.rank_quantization._target_)
    assert not {"torch", "lightning"} & set(sys.modules)

main()
"""


def python(*words, path=None, cwd=None):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-W", "error", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=environment,
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of what is under version control or not ignored."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("conf", "lightning_accel"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Unpack the wheel into a folder for PYTHONPATH, which comes before the editable install."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_package_list_is_that_of_the_folders():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "lightning_accel").rglob("*.py")
        if "hydra_plugins" not in path.parts
    }
    assert listed == found | {"lightning_accel.conf", "hydra_plugins"}


def test_the_wheel_holds_every_module_and_configuration(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"lightning_accel/conf/{path.relative_to(ROOT / 'conf')}" in names
    for path in (ROOT / "lightning_accel").rglob("*.py"):
        inside = path.relative_to(ROOT)
        if "hydra_plugins" in path.parts:
            inside = Path("hydra_plugins") / path.name
        assert str(inside) in names
    for name in ("lightning_accel/py.typed", "lightning_accel/evidence/report.html.j2"):
        assert name in names


def test_the_installed_wheel_trains_in_another_folder(installed, tmp_path):
    small = ["model.width=16", "model.depth=1", "debug=fast", "logger=[]", "monitoring=[]", "test=false"]
    code = f"import sys; sys.argv = ['lightning-accel', 'train', *{small!r}]; import lightning_accel.cli as c; "
    code += "print(c.__file__); c.main()"
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert len(list(tmp_path.glob("outputs/train/*/*/config.yaml"))) == 1


@pytest.mark.parametrize("way", ["editable", "wheel"])
def test_a_foreign_hydra_app_composes_our_callbacks(way, tmp_path, request):
    (tmp_path / "conf" / "callbacks").mkdir(parents=True)
    (tmp_path / "conf" / "main.yaml").write_text("defaults:\n  - callbacks: mine\n  - _self_\n")
    (tmp_path / "conf" / "callbacks" / "mine.yaml").write_text("mine:\n  _target_: a.B\n")
    (tmp_path / "app.py").write_text(FOREIGN_APP)
    path = request.getfixturevalue("installed") if way == "wheel" else None
    words = ["app.py", "callbacks=[mine,rank_quantization]", "hydra.run.dir=."]
    done = python(*words, path=path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['mine', 'rank_quantization'] lightning_accel.callbacks.RankQuantization"


def test_the_plugin_is_found_once_and_imports_nothing_but_hydra():
    (plugin,) = entry_points(group="hydra.plugins", name="lightning_accel")
    assert plugin.load().__name__ == "LightningAccelSearchPath"
    source = (ROOT / "lightning_accel/cli/hydra_plugins/lightning_accel_search_path.py").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    for node in imports:
        assert isinstance(node, ast.ImportFrom)
        assert node.module.split(".")[0] == "hydra"
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    names = [found.__name__ for found in Plugins.instance().discover(SearchPathPlugin)]
    assert names.count("LightningAccelSearchPath") == 1


def test_importing_the_package_imports_neither_torch_nor_lightning(tmp_path):
    done = python("-X", "importtime", "-c", "import lightning_accel, lightning_accel.cli.factory", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "lightning_accel.cli.factory" in imported
    assert not imported & {"torch", "lightning", "hydra", "omegaconf", "rich", "numpy"}


@pytest.mark.parametrize("group", ["lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"])
def test_trainers_ask_us_for_callbacks_and_get_none(group):
    (point,) = entry_points(group=group, name="lightning_accel")
    assert point.load()() == []


def test_lightning_cli_takes_our_callbacks_by_class_path(tmp_path):
    (tmp_path / "cli.py").write_text(
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning_accel.zoo import MLP, Digits\n"
        "cli = LightningCLI(MLP, Digits, run=False)\n"
        "print([type(callback).__name__ for callback in cli.trainer.callbacks][0])\n"
        "print(cli.config.trainer.callbacks[0].init_args.ratio)\n"
    )
    words = [
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.callbacks+=lightning_accel.callbacks.RankQuantization",
        "--trainer.callbacks.ratio=3",
    ]
    done = subprocess.run(
        [sys.executable, "cli.py", *words], capture_output=True, text=True, timeout=DEADLINE, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["RankQuantization", "3.0"]


def test_a_core_that_imports_lightning_breaks_the_contract(tmp_path):
    shutil.copytree(ROOT / "lightning_accel", tmp_path / "lightning_accel")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run():
        return subprocess.run(
            lint, capture_output=True, text=True, timeout=DEADLINE, check=False, cwd=tmp_path, env=environment
        )

    clean = run()
    assert clean.returncode == 0, clean.stdout
    planted = tmp_path / "lightning_accel" / "low_rank" / "factors" / "layers.py"
    planted.write_text("import lightning\n" + planted.read_text())
    broken = run()
    assert broken.returncode == 1
    assert "lightning_accel.low_rank.factors.layers -> lightning" in broken.stdout
