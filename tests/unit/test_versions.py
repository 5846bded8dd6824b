"""The versions that are promised are those that continuous integration tests."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
LEGS = [leg for leg in WORKFLOW["jobs"]["versions"]["strategy"]["matrix"]["include"] if leg["torch"] != "newest"]


def promised(name):
    (found,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == name)
    return found.specifier


@pytest.mark.parametrize("name", ["torch", "lightning"])
def test_the_oldest_and_the_newest_leg_are_the_bounds(name):
    tested = sorted(Version(leg[name]) for leg in LEGS)
    bounds = {each.operator: Version(each.version) for each in promised(name)}
    assert bounds[">="] == tested[0]
    assert bounds["<"].release[:2] == (tested[-1].major, tested[-1].minor + 1)
    assert all(version in promised(name) for version in tested)


def test_the_pinned_torch_of_the_readme_is_promised():
    for path in ("README.md", ".github/CONTRIBUTING.md", ".ci/run"):
        pins = re.findall(r"torch==([\d.]+)", (ROOT / path).read_text())
        assert pins
        assert all(pin in promised("torch") for pin in pins)


def test_the_legs_span_the_pythons():
    pythons = sorted(c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.fullmatch(r".*Python :: 3\.\d+", c))
    legs = {leg["python"] for leg in LEGS}
    assert {min(pythons, key=Version), max(pythons, key=Version)} <= legs


def test_the_main_leg_runs_what_must_hold():
    assert ".ci/run" in [step.get("run") for step in WORKFLOW["jobs"]["main"]["steps"]]
