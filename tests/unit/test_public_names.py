"""Importing the package is light, and every public name resolves."""

import subprocess
import sys

import pytest

import lightning_accel
import lightning_accel.callbacks


def test_import_loads_neither_torch_nor_lightning():
    code = "import sys, lightning_accel; print(sorted({'torch', 'lightning', 'hydra', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [lightning_accel, lightning_accel.callbacks], ids=lambda p: p.__name__)
def test_every_public_name_resolves(package):
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'RankQuantisation'"):
        _ = lightning_accel.RankQuantisation
