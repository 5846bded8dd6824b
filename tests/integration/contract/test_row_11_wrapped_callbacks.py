"""Row 11: callbacks that a user's own callback delegates to, or that are subclassed, act as they do by themselves."""

import pytest
from accelerators import cases
from contract_models import ContractModule, loader
from contract_runs import assert_equal_modules, fit, trainer
from lightning.pytorch import Callback

HOOKS = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]


class Delegate(Callback):
    """Hands every hook on to another callback, as switches, schedules and profilers of callbacks do."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def state_key(self):
        return f"Delegate of {self.inner.state_key}"

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)


def _forward(hook):
    def call(self, *args, **kwargs):
        return getattr(self.inner, hook)(*args, **kwargs)

    return call


for _hook in HOOKS:
    setattr(Delegate, _hook, _forward(_hook))


def subclassed(callback):
    """Make it one of a class that a user derived."""
    callback.__class__ = type(f"My{type(callback).__name__}", (type(callback),), {"__module__": __name__})
    return callback


@pytest.mark.parametrize("how", [Delegate, subclassed])
@pytest.mark.parametrize("entry", cases(lambda entry: bool(entry.callbacks())))
def test_wrapped_and_derived_callbacks_act_alike(entry, how, tmp_path):
    expected, _ = fit(entry, tmp_path / "itself")
    module, _ = fit(entry, tmp_path / "wrapped", callbacks=[how(callback) for callback in entry.callbacks()])
    assert entry.acted(module)
    assert_equal_modules(expected, module, tolerance=1e-6)  # schedules chosen by a clock differ by rounding


@pytest.mark.parametrize("entry", cases(lambda entry: bool(entry.callbacks())))
def test_two_trainers_may_share_the_callbacks(entry, tmp_path):
    callbacks = entry.callbacks()
    for folder in ("one", "other"):
        module = ContractModule(entry.name)
        runner = trainer(tmp_path / folder, callbacks, max_epochs=entry.epochs)
        runner.fit(module, loader(entry.data()), loader(entry.data()))
        assert entry.acted(module), folder
