"""Every accelerator in every package that is installed: it acts or says why not, and the package works on."""

import importlib
from importlib import metadata

import pytest
from package_run import measure
from table import MODULES, constant_of


def is_installed(path):
    try:
        metadata.version(constant_of(path, "DISTRIBUTION"))
    except metadata.PackageNotFoundError:
        return False
    return True


INSTALLED = [path.stem for path in MODULES.values() if path.parent.name == "packages" and is_installed(path)]


@pytest.mark.filterwarnings("ignore")  # the packages' own; what ours say is collected and asserted
@pytest.mark.parametrize("name", INSTALLED)
def test_every_accelerator_acts_or_says_why_not_and_the_package_saves_loads_and_predicts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some packages write where they are
    rows = measure(importlib.import_module(f"packages.{name}"), pairs=1)
    assert {row.arm: row.error for row in rows if row.verdict == "crashes"} == {}
    for row in rows:
        assert row.said or row.verdict.startswith(("refuses", "can not be given")), row.arm
        assert row.saved_and_loaded or row.verdict.startswith(("refuses", "can not be given")), row.arm
    assert any(row.verdict.startswith("acts") for row in rows)
