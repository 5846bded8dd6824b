"""Every public name has an example in its docstring, and the example runs."""

import doctest
import importlib
import inspect

import pytest

# Parts of an engine, which are of use only together; `lightning_accel.async_sgd`'s README shows them at work.
ENGINE = {
    *("GraphCell", "StepSchedule", "LogEntry", "ParameterServer", "ParameterStore", "Push", "SharedMemoryStore"),
    *("Snapshot", "Statistics", "Worker", "replay", "run_workers"),
}
PACKAGES = ["", ".callbacks", ".low_rank", ".projection", ".recurrent", ".async_sgd", ".strategies"]


def public_names():
    seen = {}
    for package in PACKAGES:
        module = importlib.import_module(f"lightning_accel{package}")
        for name in module.__all__:
            thing = getattr(module, name)
            if name not in ENGINE and (inspect.isclass(thing) or inspect.isfunction(thing)) and id(thing) not in seen:
                seen[id(thing)] = pytest.param(thing, id=f"lightning_accel{package}.{name}")
    return list(seen.values())


@pytest.mark.parametrize("thing", public_names())
@pytest.mark.usefixtures("_own_folder")
def test_example_runs(thing):
    text = inspect.getdoc(thing) or ""
    test = doctest.DocTestParser().get_doctest(text, {}, thing.__qualname__, None, 0)
    assert test.examples, f"{thing.__qualname__} has no example in its docstring"
    out = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=out.append)
    assert not runner.failures, "".join(out)


@pytest.fixture
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
