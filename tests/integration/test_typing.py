"""Type checkers of users see the public names as what they are, and find a misspelled argument."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mypy import api as mypy

ROOT = Path(__file__).parents[2]
PACKAGES = ["", ".callbacks", ".low_rank", ".projection", ".recurrent", ".async_sgd", ".strategies", ".zoo"]
MISTAKES = '''from lightning_accel import AsyncSGDStrategy, L1InfProjection, RankQuantization

good: list[RankQuantization] = [RankQuantization(ratio=2.0)]


class Mine(L1InfProjection):
    """A user's own."""


wrong = [RankQuantization(ration=2.0), AsyncSGDStrategy(n_pushes=2), Mine(radius="large")]
'''


def user_script():
    lines = []
    for package in PACKAGES:
        module = importlib.import_module(f"lightning_accel{package}")
        names = [name for name in module.__all__ if not name.startswith("__")]
        lines.append(f"from lightning_accel{package} import (\n    " + ",\n    ".join(names) + ",\n)")
        lines += [f"print({name})" for name in names]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, folder / f"example_{example.name}")
    (folder / "every_name.py").write_text(user_script())
    (folder / "mistakes.py").write_text(MISTAKES)
    # as for an installed package, whose own files are not checked again
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-lightning_accel.*]\nfollow_imports = silent\n")
    paths = [str(ROOT), *[path for path in sys.path if path.endswith("site-packages")]]
    settings = {"typeCheckingMode": "standard", "extraPaths": paths, "pythonPlatform": "Linux"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.slow
def test_mypy_strict_accepts_every_public_name_and_finds_mistakes(folder, monkeypatch):
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    monkeypatch.chdir(folder)
    out, problems, _ = mypy.run(["--config-file", "mypy.ini", "--cache-dir", str(folder / "cache"), "."])
    errors = [line for line in out.splitlines() if ": error:" in line]
    assert not problems
    assert [line.split(":")[0] for line in errors] == ["mistakes.py"] * 3, out
    for word in ("ration", "n_pushes", "radius"):
        assert word in out


@pytest.mark.slow
def test_pyright_accepts_every_public_name_and_finds_mistakes(folder):
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [entry for entry in found if entry["severity"] == "error"]
    assert [Path(entry["file"]).name for entry in errors] == ["mistakes.py"] * 3, errors
