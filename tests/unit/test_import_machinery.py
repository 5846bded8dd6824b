"""Importing the package leaves Python's import machinery as it was, but for a finder that waits for Lightning alone."""

import subprocess
import sys

import pytest

PREAMBLE = """
import importlib.util, sys
before = list(sys.meta_path)
hooks, cache = list(sys.path_hooks), dict(sys.path_importer_cache)
import lightning_accel
waiting = [finder for finder in sys.meta_path if finder not in before]
"""

CASES = {
    "nothing but two finders is added": """
assert [f.package for f in waiting] == ["pytorch_lightning.strategies", "lightning.pytorch.strategies"], waiting
assert sys.path_hooks == hooks
assert [f for f in sys.meta_path if f in before] == before
""",
    "they find nothing else": """
for name in ("json", "lightning", "lightning.pytorch", "torch", "no_such_module", "lightning.pytorch.strategies.ddp"):
    assert all(finder.find_spec(name) is None for finder in waiting), name
assert importlib.util.find_spec("no_such_module") is None
""",
    "they are gone after the import and the name is there": """
import lightning.pytorch as pl
from lightning.pytorch.strategies import StrategyRegistry
assert "async_sgd" in StrategyRegistry
assert [f.package for f in sys.meta_path if f not in before and hasattr(f, "package")] == [
    "pytorch_lightning.strategies"
]
module = sys.modules["lightning.pytorch.strategies"]
assert type(module.__spec__.loader) is type(pl.__spec__.loader) is type(module.__loader__)
""",
    "asking where the package is does not make them forget": """
spec = importlib.util.find_spec("lightning.pytorch.strategies")
assert spec.loader.is_package("lightning.pytorch.strategies")
assert "StrategyRegistry" in spec.loader.get_source("lightning.pytorch.strategies")
import lightning.pytorch
from lightning.pytorch.strategies import StrategyRegistry
assert "async_sgd" in StrategyRegistry
""",
    "a second import of this package adds nothing": """
import importlib
importlib.reload(lightning_accel)
assert len([f for f in sys.meta_path if f not in before]) == 2
""",
}


@pytest.mark.parametrize("case", CASES)
def test_import_machinery(case):
    subprocess.run([sys.executable, "-W", "error", "-c", PREAMBLE + CASES[case]], check=True, timeout=120)
