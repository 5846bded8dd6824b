"""The interface of a worker to any engine is complete: a whole fit works through it alone."""

import inspect
from collections import Counter

import pytest
from async_modules import QUICK, Classifier, WaitForAll, fit, seeded

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import ParameterStore, SharedMemoryStore
from lightning_accel.async_sgd.ray_engine.client import RayStore

NAMES = {name for name in vars(ParameterStore) if not name.startswith("_")}


class Fence:
    """Shows nothing of a store but what the protocol names."""

    def __init__(self, store):
        self._behind = store

    def __getattr__(self, name):
        assert name in NAMES, f"`{name}` is not in the protocol"
        return getattr(self._behind, name)


class Fenced(AsyncSGDStrategy):
    """Lets its workers see their store through the fence."""

    def enter(self, store, trainer):
        super().enter(Fence(store), trainer)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"local_steps": 4}, {"max_staleness": 2, "validate": "pause"}], ids=str)
def test_a_fit_needs_nothing_of_a_store_but_what_the_protocol_names(tmp_path, settings):
    strategy = Fenced(deterministic_replay=True, snapshot_every_n_steps=5, **QUICK, **settings)
    waiting = [WaitForAll(2)] if "max_staleness" not in settings else []
    module = seeded(Classifier, "momentum", "onecycle")
    trainer = fit(tmp_path, strategy, module, devices=2, callbacks=waiting, size=128, gradient_clip_val=1.0)
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(2) for i in range(16))
    assert trainer.callback_metrics["val/count"] == 32


@pytest.mark.parametrize("store", [SharedMemoryStore, RayStore])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_store_of_each_engine_has_what_the_protocol_names(name, store):
    ours, theirs = getattr(store, name, None), getattr(ParameterStore, name)
    if inspect.isfunction(theirs):
        assert inspect.signature(ours).parameters.keys() == inspect.signature(theirs).parameters.keys()
        for given, wanted in zip(
            inspect.signature(ours).parameters.values(), inspect.signature(theirs).parameters.values(), strict=True
        ):
            assert (given.kind, given.default) == (wanted.kind, wanted.default)
    else:
        assert ours is not None or name in {"worker", "incarnation", "settings"}, "an attribute of each store"
