"""Nobody waits for a worker that hangs, stands still or is slow; every batch is trained once after any restart."""

import ctypes
import itertools
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from async_modules import QUICK, Classifier, Noted, WaitForAll, equal, fit, seeded
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lightning_accel import AsyncSGDStrategy

BATCHES = 16


class Once(pl.Callback):
    """Does something in a batch of an epoch, in the worker of this number, in its first incarnation."""

    def __init__(self, deed, *, worker=1, epoch=1, batch=2):
        self.deed, self.worker, self.epoch, self.batch = deed, worker, epoch, batch

    def is_due(self, trainer, batch_idx):
        store = trainer.strategy._store
        here = (store.worker, store.incarnation, trainer.current_epoch, batch_idx)
        return here == (self.worker, 0, self.epoch, self.batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.is_due(trainer, batch_idx):
            pl_module.deed = self.deed


class Log(Classifier):
    """Writes down what it trains on, once a step is over, and when it validates."""

    deed = None

    def training_step(self, batch, batch_idx):
        deed, self.deed = self.deed, None
        if deed is not None:
            deed()
        time.sleep(0.004)
        strategy = self.trainer.strategy
        leased, _ = strategy._session.worker.pending[-1]  # of which epoch this batch is: not always the loop's own
        self.seen = [self.current_epoch, batch[2].tolist(), strategy._store.worker, time.time(), leased]
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_):
        self.write(self.seen)

    def on_validation_start(self):
        self.write([self.current_epoch, "validation", 0, time.time(), self.current_epoch])

    def write(self, line):
        with open(self.notes + " log", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang():
    time.sleep(10**6)


def hold_the_interpreter():
    ctypes.PyDLL(None).usleep(2_500_000)  # a call into C that does not let go of the lock, and computes nothing


class Run:
    """A fit of two workers over three epochs, and what came of it."""

    def __init__(self, folder, deed, *, worker=1, epoch=1, batch=2, once=Once, **settings):
        notes = str(folder / "notes")
        chosen = {**QUICK, "deterministic_replay": True, **settings}
        self.strategy = AsyncSGDStrategy(**chosen)
        self.module = seeded(Log, "momentum", notes=notes)
        callbacks = [WaitForAll(2), WaitForAll(2, epoch), once(deed, worker=worker, epoch=epoch, batch=batch)]
        options = {"devices": 2, "epochs": 3, "size": 8 * BATCHES, "num_sanity_val_steps": 0}
        self.trainer = fit(folder, self.strategy, self.module, callbacks=callbacks, **options)
        lines = Path(f"{notes} log").read_text(encoding="utf-8").splitlines()
        self.lines = [json.loads(line) for line in lines]

    def check(self):
        """Every batch is counted once an epoch; what was trained on is what was counted; each epoch is validated."""
        assert self.leases() == Counter((epoch, i) for epoch in range(3) for i in range(BATCHES))
        assert [epoch for epoch, what, *_ in self.lines if what == "validation"] == [0, 1, 2]

    def leases(self):
        return Counter(lease for entry in self.strategy.ending.log for lease in entry.leases)

    def check_trained(self, *, late=False):
        """Every sample is trained on once in the batches of each epoch; while that epoch lasts unless ``late``.

        The coordinator waits at the end of an epoch for what others hold, and takes it if they die. Nobody waits for
        what a coordinator holds: if it dies, its batches go to whoever asks next, who may be in the next epoch by then.
        """
        seen = Counter((leased, i) for *_, what, _, _, leased in self.lines if what != "validation" for i in what)
        assert seen == Counter((epoch, i) for epoch in range(3) for i in range(8 * BATCHES))
        assert late or self.late() == set()

    def late(self):
        """Pairs of an epoch and the earlier one of which a batch was trained on in it."""
        trained = [line for line in self.lines if line[1] != "validation"]
        return {(epoch, leased) for epoch, *_, leased in trained if leased != epoch}

    def longest_wait(self):
        """Seconds between the last batch of an epoch and its validation, at most."""
        waits = []
        for epoch, what, _, then, _ in self.lines:
            if what == "validation":
                before = [t for e, w, _, t, _ in self.lines if e == epoch and w != "validation" and t <= then]
                waits.append(then - max(before))
        return max(waits)


@pytest.mark.slow
@pytest.mark.parametrize("validate", ["coordinator", "pause"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_after_a_restart_in_any_epoch_every_batch_is_trained_once(tmp_path, epoch, validate):
    run = Run(tmp_path, kill, epoch=epoch, validate=validate)
    run.check()
    run.check_trained()
    assert run.strategy.statistics.restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2])
def test_after_a_restart_of_the_coordinator_every_batch_is_trained_once(tmp_path, epoch):
    run = Run(tmp_path, kill, worker=0, epoch=epoch)
    assert run.leases() == Counter((epoch, i) for epoch in range(3) for i in range(BATCHES))
    run.check_trained(late=True)


class OnceLeftBehind(Once):
    """Does it when the other worker is in the next epoch, which stays at its first batch until it coordinates."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        store = trainer.strategy._store
        if self.is_due(trainer, batch_idx):
            store.kv("the other is ahead")
        elif store.worker != self.worker and trainer.current_epoch == self.epoch + 1 and batch_idx == 0:
            store.kv("the other is ahead", b"yes")
            while not store.is_coordinator:
                time.sleep(0.01)  # the word of the server is the event that is waited for
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


@pytest.mark.slow
def test_what_a_dead_coordinator_left_is_trained_once_by_one_who_is_in_the_next_epoch(tmp_path):
    run = Run(tmp_path, kill, worker=0, once=OnceLeftBehind)
    assert run.leases() == Counter((epoch, i) for epoch in range(3) for i in range(BATCHES))
    run.check_trained(late=True)
    assert run.late() == {(2, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("worker", [0, 1], ids=["coordinator", "worker"])
def test_a_step_that_hangs_is_noticed_and_its_worker_replaced(tmp_path, worker, caplog):
    run = Run(tmp_path, hang, worker=worker, stall_seconds=1.5, straggler_grace=60.0)
    if worker:
        run.check()
    run.check_trained(late=worker == 0)
    assert "in the middle of a batch; ending it" in caplog.text
    assert run.strategy.statistics.restarts == 1


@pytest.mark.slow
def test_the_end_of_an_epoch_does_not_wait_for_a_step_that_hangs(tmp_path, caplog):
    run = Run(tmp_path, hang, straggler_grace=0.5)
    run.check()
    assert run.strategy.statistics.taken_over >= 1
    assert run.strategy.statistics.restarts == 0, "it would be noticed after half a minute"
    assert run.longest_wait() < 5.0
    assert "takes over batches that others hold for longer than `straggler_grace=0.5` seconds" in caplog.text


@pytest.mark.slow
def test_the_end_of_an_epoch_does_not_wait_for_a_process_that_is_stopped(tmp_path):
    run = Run(tmp_path, stop, straggler_grace=0.5)
    run.check()
    assert run.strategy.statistics.taken_over >= 1
    assert run.longest_wait() < 5.0


@pytest.mark.slow
def test_a_step_that_holds_the_interpreter_is_no_death(tmp_path, caplog):
    run = Run(tmp_path, hold_the_interpreter, heartbeat_seconds=1.0, straggler_grace=60.0)
    run.check()
    run.check_trained()
    assert run.strategy.statistics.restarts == 0
    assert "ending it" not in caplog.text


class Poisoned(Classifier):
    """Computes NaN in all workers but the first."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.trainer.strategy._store.worker == 0 else loss * float("nan")


@pytest.mark.slow
def test_a_worker_whose_gradients_are_all_dropped_is_spoken_of_while_it_runs(tmp_path, caplog):
    strategy = AsyncSGDStrategy(**QUICK)
    module = seeded(Poisoned)
    fit(tmp_path, strategy, module, devices=2, size=256, validate=True, callbacks=[WaitForAll(2)])
    assert "a gradient of worker 1 had NaN or Inf: it was dropped" in caplog.text
    assert f"{strategy.statistics.dropped} gradients had NaN or Inf and were dropped" in caplog.text
    assert all(bool(value.isfinite().all()) for value in module.parameters())


class Order(Sampler):
    """Torch's own base class has no length."""

    def __init__(self, size, *, endless=False):
        self.size, self.endless = size, endless

    def __iter__(self):
        yield from torch.randperm(self.size).tolist()
        while self.endless:
            yield from torch.randperm(self.size).tolist()


class EvenFirst:
    """A batch sampler of one's own, without a length."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        numbers = [*range(0, self.size, 2), *range(1, self.size, 2)]
        for start in range(0, self.size, 8):
            yield numbers[start : start + 8]


class Stream(IterableDataset):
    """The same points, as a stream."""

    def __iter__(self):
        data = Noted()
        return (data[i] for i in range(len(data)))


LOADERS = {
    "finite": lambda: DataLoader(Noted(), 8, sampler=Order(64)),
    "endless": lambda: DataLoader(Noted(), 8, sampler=Order(64, endless=True)),
    "batch sampler": lambda: DataLoader(Noted(), batch_sampler=EvenFirst(64)),
    "batch sampler over an endless one": lambda: DataLoader(
        Noted(), batch_sampler=BatchSampler(Order(64, endless=True), 8, drop_last=False)
    ),
    "no batches": lambda: DataLoader(Noted(), batch_size=None, sampler=EvenFirst(64)),
    "stream": lambda: DataLoader(Stream(), 8),
    "finite, other processes": lambda: DataLoader(Noted(), 8, sampler=Order(64), num_workers=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_one_worker_on_data_without_a_length_is_plain_training(tmp_path, name):
    options = {"epochs": -1, "max_steps": 20} if "endless" in name else {}
    plain, ours = seeded(Classifier, "momentum"), seeded(Classifier, "momentum")
    expected = fit(tmp_path, "auto", plain, data=LOADERS[name](), **options)
    actual = fit(tmp_path, AsyncSGDStrategy(**QUICK), ours, data=LOADERS[name](), **options)
    assert actual.global_step == expected.global_step
    assert actual.current_epoch == expected.current_epoch
    assert equal(plain, ours) == []


@pytest.mark.slow
def test_several_workers_share_out_an_order_without_a_length(tmp_path):
    strategy = AsyncSGDStrategy(deterministic_replay=True, **QUICK)
    data = DataLoader(Noted(size=256), 8, sampler=Order(256))
    module = seeded(Classifier, "momentum")
    trainer = fit(tmp_path, strategy, module, devices=2, data=data, callbacks=[WaitForAll(2)])
    assert trainer.global_step == 64
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(2) for i in range(32))
    assert {entry.worker for entry in strategy.ending.log} == {0, 1}
    assert trainer.callback_metrics["val/count"] == 32


@pytest.mark.slow
def test_several_workers_train_on_an_endless_order_until_the_last_step(tmp_path):
    data = DataLoader(Noted(), 8, sampler=Order(64, endless=True))
    options = {"epochs": -1, "max_steps": 40, "callbacks": [WaitForAll(2)]}
    trainer = fit(tmp_path, AsyncSGDStrategy(**QUICK), seeded(Classifier), devices=2, data=data, **options)
    assert trainer.global_step >= 40
    assert trainer.global_step <= 40 + 2


class Skips(Classifier):
    """Leaves each epoch after its third batch."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


@pytest.mark.slow
@pytest.mark.parametrize("data", ["sized", "finite"])
def test_one_worker_that_leaves_epochs_early_is_plain_training(tmp_path, data):
    loaders = {**LOADERS, "sized": lambda: DataLoader(Noted(), 8, shuffle=True)}
    plain, ours = seeded(Skips, "momentum"), seeded(Skips, "momentum")
    expected = fit(tmp_path, "auto", plain, data=loaders[data](), epochs=3)
    actual = fit(tmp_path, AsyncSGDStrategy(**QUICK), ours, data=loaders[data](), epochs=3)
    assert (actual.global_step, actual.current_epoch) == (expected.global_step, expected.current_epoch) == (9, 3)
    assert equal(plain, ours) == []


@pytest.mark.slow
def test_what_one_of_several_leaves_of_an_epoch_others_train_on(tmp_path):
    strategy = AsyncSGDStrategy(deterministic_replay=True, **QUICK)
    fit(tmp_path, strategy, seeded(SkipsOnce, "momentum"), devices=2, size=128, callbacks=[WaitForAll(2)])
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    skipped = set(itertools.product(range(2), range(16))) - set(leases)
    assert len(skipped) <= 1, "the batch that it had begun"
    assert max(leases.values()) == 1


class SkipsOnce(Classifier):
    """Worker 1 leaves its first epoch at its third batch."""

    def on_train_batch_start(self, batch, batch_idx):
        leaves = self.trainer.strategy._store.worker == 1 and self.current_epoch == 0 and batch_idx == 2
        return -1 if leaves else None


class Scheduled(Classifier):
    """Halves its rate after each epoch, or follows one cycle of steps; dies once in the third batch of an epoch."""

    def __init__(self, schedule, flag, **options):
        super().__init__("momentum", schedule, **options)
        self.flag = flag

    def training_step(self, batch, batch_idx):
        store = getattr(self.trainer.strategy, "_store", None)
        if store is not None and self.current_epoch == 2 and batch_idx == 2 and not Path(self.flag).exists():
            Path(self.flag).touch()
            kill()
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        if self.hparams.schedule == "onecycle":
            return super().configure_optimizers()
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["halved", "onecycle"])
def test_a_lone_worker_that_is_started_again_goes_on_with_the_rate_of_the_run(tmp_path, schedule):
    plain = fit(tmp_path, "auto", seeded(Scheduled, schedule, ""), epochs=4)
    strategy = AsyncSGDStrategy(**QUICK)
    ours = fit(tmp_path, strategy, seeded(Scheduled, schedule, str(tmp_path / "flag")), epochs=4)
    assert strategy.statistics.restarts == 1
    assert ours.global_step == plain.global_step == 32
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in (ours, plain)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)


class NotesEpochs(pl.Callback):
    """Write down which epochs each worker begins; all begin together."""

    def __init__(self, notes):
        self.notes = notes

    def on_train_epoch_start(self, trainer, pl_module):
        store = trainer.strategy._store
        if trainer.current_epoch == 0:
            store.kv(f"begun {store.worker}", b"yes")
            for worker in range(2):
                store.kv(f"begun {worker}")
        with open(self.notes, "a", encoding="utf-8") as file:
            file.write(f"{store.worker} {trainer.current_epoch}\n")


@pytest.mark.parametrize("limits", [{"epochs": -1, "max_steps": 12, "min_steps": 12}, {"epochs": 12, "min_epochs": 12}])
def test_a_worker_for_which_epochs_have_no_batch_stays_beside_the_coordinator_and_ends_with_the_run(
    tmp_path, caplog, limits
):
    notes = tmp_path / "epochs"
    trainer = fit(
        tmp_path,
        "async_sgd",
        seeded(Classifier),
        devices=2,
        size=8,
        callbacks=[NotesEpochs(notes)],
        validate=False,
        **limits,
    )
    assert trainer.global_step == 12, "a batch an epoch, which is the coordinator's"
    begun = [tuple(map(int, line.split())) for line in notes.read_text().splitlines()]
    assert [epoch for worker, epoch in begun if worker == 0] == list(range(12))
    others = [epoch for worker, epoch in begun if worker == 1]
    assert others == list(range(len(others)))
    assert len(others) <= 14, "it does not run ahead"
    assert not [r for r in caplog.messages if "did not stop" in r]
