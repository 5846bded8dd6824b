"""The rows can fail: an inert accelerator in an entry's place turns at least half of them red."""

import dataclasses
import importlib
import inspect
import itertools
import warnings
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from accelerators import ACCELERATORS
from lightning.pytorch import Callback

# Row 4 starts processes and rows 5 and 10 compare pairs of entries; these are about one entry each.
ROWS = sorted(p.stem for p in Path(__file__).parent.glob("test_row_*.py") if p.stem[9:11] not in ("04", "05", "10"))


class Inert(Callback):
    """Does nothing."""


def inert(entry):
    """Return the entry with a callback (or no strategy) that does nothing in the accelerator's place."""

    def nothing():
        return [Inert()]

    return dataclasses.replace(
        entry,
        callbacks=nothing,
        neutral=nothing,
        steps_aside=None if entry.steps_aside is None else nothing,
        strategy=lambda: "auto",
        neutral_strategy=lambda: "auto",
        other_strategy=lambda: "auto",
    )


def calls_of(row, entry):
    """Yield the tests of a row for one entry, those that look for acting first: the function, and other arguments."""
    named = vars(importlib.import_module(row)).items()
    functions = [function for name, function in named if name.startswith("test_")]
    for function in sorted(functions, key=lambda function: "entry.acted" not in inspect.getsource(function)):
        if "entry" not in inspect.signature(function).parameters:
            continue
        axes = {}
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize" and "entry" not in mark.args[0]:
                axes[mark.args[0]] = [v.values[0] if isinstance(v, ParameterSet) else v for v in mark.args[1]]
            elif mark.name == "parametrize" and mark.args[0] != "entry":  # pairs of an entry and something else
                (other,) = (argument for argument in mark.args[0] if argument != "entry")
                axes[other] = [pair.values[1] for pair in mark.args[1] if pair.values[0].name == entry.name]
        for values in itertools.product(*axes.values()):
            yield function, dict(zip(axes, values, strict=True))


def is_red(row, entry, request, folder):
    """Say whether a test of the row fails with the entry."""
    for index, (function, settings) in enumerate(calls_of(row, entry)):
        own = {"entry": entry, "tmp_path": folder / f"{row}{index}"}
        own["tmp_path"].mkdir()
        wanted = inspect.signature(function).parameters
        if "caplog" in wanted:
            own["caplog"] = request.getfixturevalue("caplog")
        try:
            function(**{name: value for name, value in (own | settings).items() if name in wanted})
        except (Exception, pytest.fail.Exception):
            return True
    return False


@pytest.mark.parametrize("entry", ACCELERATORS, ids=lambda entry: entry.name)
def test_inert_accelerator_turns_rows_red(entry, request, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        red = {row: is_red(row, inert(entry), request, tmp_path) for row in ROWS if any(calls_of(row, entry))}
    assert sum(red.values()) >= len(red) / 2, {row: "red" if it else "green" for row, it in red.items()}
    assert len(red) >= 8
