"""What was trained survives every ending: slow hooks, exceptions, Ctrl-C, SIGTERM, a coordinator dead at the end."""

import contextlib
import gc
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from async_modules import QUICK, Classifier, DiesAtTheEnd, WaitForAll, equal, fit, loader, seeded
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import WorkerFailedError


class SlowEnd(pl.Callback):
    """Takes its time in a hook at the end, for longer than a straggler would get."""

    def __init__(self, hook, seconds):
        def slow(trainer, pl_module, stage=None):
            if trainer.strategy._store is not None:
                time.sleep(seconds)

        self.hook, self.seconds = hook, seconds
        self._slow = slow

    def __getstate__(self):
        return self.hook, self.seconds

    def __setstate__(self, state):
        self.__init__(*state)

    def on_train_end(self, trainer, pl_module):
        if self.hook == "on_train_end":
            self._slow(trainer, pl_module)

    def on_fit_end(self, trainer, pl_module):
        if self.hook == "on_fit_end":
            self._slow(trainer, pl_module)

    def teardown(self, trainer, pl_module, stage):
        if self.hook == "teardown":
            self._slow(trainer, pl_module)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
def test_a_hook_at_the_end_may_take_longer_than_any_grace(tmp_path, hook):
    module, strategy = seeded(Classifier, "momentum"), AsyncSGDStrategy(straggler_grace=0.2, **QUICK)
    trainer = fit(tmp_path, strategy, module, devices=2, callbacks=[WaitForAll(2), SlowEnd(hook, 1.5)])
    assert trainer.global_step == 16
    assert equal(seeded(Classifier, "momentum"), module) != []
    assert trainer.callback_metrics["val/count"] == 32


class Fails(Classifier):
    """Raises after so many steps of all workers, in the worker of this number."""

    def __init__(self, steps=40, worker=0, **options):
        super().__init__("momentum", "onecycle", **options)
        self.steps, self.worker = steps, worker

    def training_step(self, batch, batch_idx):
        store = getattr(self.trainer.strategy, "_store", None)
        if store is not None and store.worker == self.worker and self.trainer.global_step >= self.steps:
            raise ValueError("out of luck")
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize("worker", [0, 1], ids=["coordinator", "worker"])
def test_a_run_that_fails_leaves_what_was_trained_in_the_module_and_in_every_checkpoint(tmp_path, worker):
    module = seeded(Fails, 40, worker)
    rescuers = [
        ModelCheckpoint(tmp_path / "a", save_on_exception=True, every_n_epochs=1000),
        OnExceptionCheckpoint(tmp_path / "b"),
    ]
    # 40 steps are five epochs only if nobody is ahead: a worker may train most of the next ones meanwhile
    in_step = [WaitForAll(2, epoch) for epoch in range(5)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=AsyncSGDStrategy(**QUICK), max_epochs=20, logger=False,
        callbacks=[*in_step, *rescuers], default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(WorkerFailedError, match="out of luck"):
        trainer.fit(module, loader())
    changed = set(equal(seeded(Fails, 40, worker), module))
    assert {"net.0.weight", "net.1.running_mean", "net.4.weight"} <= changed
    assert trainer.global_step >= 40
    assert trainer.strategy.statistics.version == trainer.global_step
    trainer.save_checkpoint(tmp_path / "by hand.ckpt")
    found = [*tmp_path.glob("[ab]/*.ckpt"), tmp_path / "by hand.ckpt"]
    assert len(found) == 3
    for path in found:
        saved = torch.load(path, weights_only=True)
        assert saved["global_step"] == trainer.global_step
        assert saved["epoch"] == trainer.current_epoch >= 4
        state = module.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in saved["state_dict"].items())
        assert saved["optimizer_states"][0]["state"], "momentum"
        assert saved["lr_schedulers"], "the schedule"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_what_is_saved_after_a_failure_resumes_and_trains_on_what_is_left(tmp_path):
    module = seeded(Fails, 20)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=AsyncSGDStrategy(**QUICK), max_epochs=4, logger=False,
        enable_checkpointing=False, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(WorkerFailedError, match="out of luck"):
        trainer.fit(module, loader())
    assert (trainer.global_step, trainer.current_epoch) == (20, 2)
    trainer.save_checkpoint(tmp_path / "rescued.ckpt")
    for strategy in ("async_sgd", "auto"):
        notes = tmp_path / f"notes {strategy}"
        resumed = seeded(Fails, 10**6, notes=str(notes))
        again = fit(tmp_path, strategy, resumed, epochs=4, ckpt=tmp_path / "rescued.ckpt", validate=False)
        assert (again.global_step, again.current_epoch) == (32, 4)
        lines = [line.split() for line in notes.read_text(encoding="utf-8").splitlines()]
        assert Counter(line[0] for line in lines) == {"2": 4, "3": 8}


def interrupt(number, flag):
    """Send this process a signal as soon as there is the file ``flag``."""

    def wait():
        deadline = time.monotonic() + 120
        while not flag.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


class SaysWhen(pl.Callback):
    """Makes a file after so many steps."""

    def __init__(self, flag, steps):
        self.flag, self.steps = flag, steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.002)
        if trainer.global_step >= self.steps:
            Path(self.flag).touch()


class Hears(pl.Callback):
    """Looks at the module when it is told of an exception."""

    seen: tuple = ()

    def on_exception(self, trainer, pl_module, exception):
        self.seen = (type(exception), trainer.global_step, pl_module.net[0].weight.detach().clone())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "raised", "seen"),
    [(signal.SIGINT, SystemExit, KeyboardInterrupt), (signal.SIGTERM, SIGTERMException, SIGTERMException)],
    ids=["ctrl-c", "sigterm"],
)
def test_an_interrupt_leaves_what_was_trained_in_the_module_before_callbacks_hear_of_it(tmp_path, number, raised, seen):
    module, ears = seeded(Classifier, "momentum"), Hears()
    before = module.net[0].weight.detach().clone()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    thread = interrupt(number, tmp_path / "flag")
    try:
        with pytest.raises(raised):
            fit(
                tmp_path, AsyncSGDStrategy(**QUICK), module, devices=2, epochs=-1, validate=False,
                callbacks=[WaitForAll(2), SaysWhen(str(tmp_path / "flag"), 30), ears],
            )  # fmt: skip
    finally:
        thread.join()
        for n, handler in handlers.items():
            signal.signal(n, handler)
    kind, steps, weight = ears.seen
    assert kind is seen
    assert steps >= 30
    assert not torch.equal(weight, before)
    assert torch.equal(weight, module.net[0].weight)


class TerminatedOnce(pl.Callback):
    """Sends the process of worker 1 a SIGTERM in its third batch, once."""

    def __init__(self, flag):
        self.flag = flag

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.strategy._store.worker == 1 and batch_idx == 2 and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_worker_that_is_told_to_go_is_replaced_and_loses_no_batch(tmp_path):
    strategy = AsyncSGDStrategy(deterministic_replay=True, **QUICK)
    callbacks = [WaitForAll(2), TerminatedOnce(str(tmp_path / "flag"))]
    fit(tmp_path, strategy, seeded(Classifier, "momentum"), devices=2, epochs=3, size=256, callbacks=callbacks)
    assert (tmp_path / "flag").exists()
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(3) for i in range(32))


@pytest.mark.slow
def test_a_coordinator_that_dies_with_the_result_leaves_what_was_trained_in_the_module(tmp_path):
    module = seeded(Classifier, "momentum")
    with pytest.raises(RuntimeError, match="the module holds the trained parameters"):
        fit(tmp_path, AsyncSGDStrategy(**QUICK), module, devices=2, epochs=1, callbacks=[WaitForAll(2), DiesAtTheEnd()])
    changed = set(equal(seeded(Classifier, "momentum"), module))
    assert {"net.0.weight", "net.4.bias", "net.1.running_mean"} <= changed


class Unpicklable:
    """Can be pickled, and not unpickled: as a class that the other process does not have."""

    def __reduce__(self):
        return _raise, ("no such class here",)


def _raise(text):
    raise ImportError(text)


def test_workers_that_can_not_start_show_their_first_error_without_restarts(tmp_path, caplog):
    module = seeded(Classifier)
    module.strange = Unpicklable()
    with pytest.raises(WorkerFailedError, match="ImportError: no such class here"):
        fit(tmp_path, AsyncSGDStrategy(**QUICK), module, devices=2)
    assert "started again" not in caplog.text


def test_nothing_is_left_behind_by_a_result(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def run():
        fit(tmp_path, AsyncSGDStrategy(**QUICK), seeded(Classifier), data=DataLoader(loader().dataset, 8))
        gc.collect()
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    run()  # starts the fork server
    descriptors = run()
    assert run() <= descriptors
    left = [path for path in (tmp_path / "tmp").rglob("*") if not path.name.startswith(("pymp", "listener"))]
    assert left == []
    with contextlib.suppress(FileNotFoundError):
        assert not [name for name in os.listdir("/dev/shm") if "lightning" in name]
