"""Hooks stay callable for everyone who calls them, and a run leaves nothing behind that changes the next."""

import copy
import pickle

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.profilers import SimpleProfiler
from low_rank_models import BATCHES, Classifier, train

from lightning_accel.callbacks import (
    IntraStreamScheduling,
    L1InfProjection,
    MultilevelProjection,
    RankQuantization,
    SequentialFreezing,
)
from lightning_accel.low_rank import low_rank_layers

EPOCHS = 3
STEPS = EPOCHS * BATCHES


def hook_calls(profiler, callback):
    """How often Lightning called each hook of ``callback``."""
    head = f"[Callback]{callback.state_key}."
    return {name.removeprefix(head): len(t) for name, t in profiler.recorded_durations.items() if head in name}


def fit(callbacks, root, module=None):
    profiler = SimpleProfiler()
    train(module or Classifier(), callbacks, root, epochs=EPOCHS, profiler=profiler)
    return [hook_calls(profiler, callback) for callback in callbacks]


def all_hooks_callable(callback):
    return all(callable(getattr(callback, name)) for name in dir(Callback) if name.startswith("on_"))


class Delegating(Callback):
    """What other people's wrappers do: every hook is passed on."""

    def __init__(self, inner):
        self.inner = inner


def _passed_on(name):
    def hook(self, *args, **kwargs):
        assert callable(getattr(self.inner, name)), name
        return getattr(self.inner, name)(*args, **kwargs)

    return hook


for _name in [n for n in dir(Callback) if n.startswith("on_") and "checkpoint" not in n] + ["setup", "teardown"]:
    setattr(Delegating, _name, _passed_on(_name))


@pytest.mark.parametrize("stops", [False, True], ids=["whole", "with an exception"])
@pytest.mark.parametrize(
    "make",
    [
        RankQuantization,
        lambda: RankQuantization(ratio=2.0, method="fixed", when="setup", on_loss="keep"),
        lambda: L1InfProjection(target_sparsity=0.5),
        lambda: MultilevelProjection(target_sparsity=0.5),
        lambda: IntraStreamScheduling(schedule="loop"),
        SequentialFreezing,
    ],
    ids=["ranks aside", "ranks kept", "l1inf", "multilevel", "recurrent", "freezing"],
)
def test_every_hook_stays_callable_for_a_callback_that_delegates(make, stops, tmp_path):
    inner = make()
    helper = [RankQuantization(ratio=2.0, method="fixed", when="setup", on_loss="keep")]
    callbacks = [*(helper if isinstance(inner, SequentialFreezing) else []), Delegating(inner)]
    if stops:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            train(Breaks(), callbacks, tmp_path)
    else:
        train(Classifier(), callbacks, tmp_path, epochs=2)
    assert all_hooks_callable(inner)


def test_hooks_of_a_subclass_and_of_the_instance_stay(tmp_path):
    class Watching(RankQuantization):
        before = after = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self.before += 1

        def on_after_backward(self, trainer, pl_module):
            self.after += 1

    watching = Watching()
    ended = []
    watching.on_train_batch_end = lambda *_: ended.append(1)
    fit([watching], tmp_path)
    assert watching.before == watching.after == len(ended) == STEPS


class Breaks(Classifier):
    def training_step(self, batch, batch_idx):
        if self.steps == BATCHES:
            raise RuntimeError("broken on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("how", ["again", "copied", "pickled", "after an error"])
def test_another_run_decides_anew(how, tmp_path):
    ranks = RankQuantization(ratio=2.0, method="fixed", when="auto", on_loss="keep")
    if how == "after an error":
        with pytest.raises(RuntimeError, match="broken on purpose"):
            train(Breaks(), [ranks], tmp_path)
    else:
        train(Classifier(), [ranks], tmp_path)
    assert all_hooks_callable(ranks)
    other = {"copied": copy.deepcopy, "pickled": lambda c: pickle.loads(pickle.dumps(c))}.get(how, lambda c: c)(ranks)
    module = Classifier()
    (calls,) = fit([other], tmp_path, module)
    assert low_rank_layers(module)
    assert calls["on_train_batch_start"] == STEPS


def test_a_copy_made_in_the_middle_of_a_run_is_whole_in_its_own(tmp_path):
    class Copies(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == BATCHES:
                self.copy = pickle.loads(pickle.dumps(trainer.callbacks[0]))

    copies = Copies()
    fit([RankQuantization(ratio=2.0, method="fixed", on_loss="keep"), copies], tmp_path)
    module = Classifier()
    (calls,) = fit([copies.copy], tmp_path, module)
    assert low_rank_layers(module)
    assert calls["on_train_batch_start"] == STEPS
    assert all_hooks_callable(copies.copy)
