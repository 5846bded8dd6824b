"""A callback that has stepped aside costs nothing a step: Lightning passes over its hooks, for this run alone."""

import copy
import pickle

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.profilers import SimpleProfiler
from low_rank_models import BATCHES, Classifier, train

from lightning_accel.callbacks import RankQuantization, SequentialFreezing
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


def test_callbacks_that_step_aside_are_called_at_the_first_batch_alone(tmp_path):
    ranks, freezing = RankQuantization(), SequentialFreezing()  # eighteen steps are too few to try
    of_ranks, of_freezing = fit([ranks, freezing], tmp_path)
    for calls in (of_ranks, of_freezing):
        assert calls["on_train_batch_start"] == 1
        assert max(calls.values()) <= 3, calls
    assert of_ranks["on_train_batch_end"] == 1
    assert all_hooks_callable(ranks)
    assert all_hooks_callable(freezing)


def test_freezing_goes_on_at_every_batch_after_the_switch(tmp_path):
    ranks, freezing = RankQuantization(ratio=2.0, method="fixed", when="setup", on_loss="keep"), SequentialFreezing()
    of_ranks, of_freezing = fit([ranks, freezing], tmp_path)
    assert of_ranks["on_train_batch_start"] == 1
    assert of_freezing["on_train_batch_start"] == of_freezing["on_train_batch_end"] == STEPS
    assert of_freezing["on_train_epoch_end"] == EPOCHS
    assert "on_after_backward" not in of_freezing


def test_switch_that_comes_late_is_waited_for(tmp_path):
    ranks = RankQuantization(ratio=2.0, method="fixed", when=1, on_loss="keep")
    (calls,) = fit([ranks], tmp_path)
    assert calls["on_train_batch_start"] == calls["on_train_batch_end"] == BATCHES + 1


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
    assert calls["on_train_batch_start"] == 1


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
    assert calls["on_train_batch_start"] == 1
    assert all_hooks_callable(copies.copy)
