"""Asynchronous SGD on a cluster of three nodes: one is removed, a shard is killed, a node joins again and is used."""

import _thread
import contextlib
import logging
import threading
import time
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import psutil
import pytest
import ray_fits
import torch
from async_modules import WaitForAll

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd.ray_engine.cluster import connected
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.bench.ray_nodes import simulated_nodes
from lightning_accel.zoo import CNN, Digits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EPOCHS = 12
HALTS_IN_EPOCH = 4  # there everybody waits for the node that joins again
SNAPSHOT_STEPS = 5
SHARDS = 2


class WaitsForWhoComesBack(pl.Callback):
    """Notes on which node each worker is, and holds those of the first start until another was started again.

    Args:
        folder: Where the notes are; a file's name is worker and incarnation, its text the node.
        epoch: In which they are held.
    """

    def __init__(self, folder, epoch):
        self.folder, self.epoch = folder, epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        import ray

        store = trainer.strategy._store
        note = Path(self.folder) / f"worker {store.worker} {store.incarnation}"
        if not note.exists():
            note.write_text(ray.get_runtime_context().get_node_id(), encoding="utf-8")
        if store.incarnation > 0:
            store.kv("came back", b"yes")
        elif trainer.current_epoch >= self.epoch:
            store.kv("came back")


class Accident(threading.Thread):
    """Removes the node of one worker, and adds another when the run has noticed.

    Args:
        cluster: Of Ray.
        notes: Folder of `WaitsForWhoComesBack`.
        here: Node of the caller, which stays.
        said: Returns what the run has logged.

    Attributes:
        victim: Number of the worker whose node is removed; never worker 0, which coordinates and kills a shard.
        joined: The node that is added.
        problem: What went wrong; the caller is interrupted then.
    """

    def __init__(self, cluster, notes, here, said):
        super().__init__(daemon=True)
        self.cluster, self.notes, self.here, self.said = cluster, notes, here, said
        self.victim = self.joined = self.problem = None

    def run(self):
        try:
            self._happen()
        except BaseException as problem:
            self.problem = problem
            _thread.interrupt_main()

    def _happen(self):
        places = [self.notes / f"worker {worker} 0" for worker in range(3)]
        self._wait("three workers", lambda: all(place.exists() and place.read_text() for place in places))
        of_worker = {worker: place.read_text(encoding="utf-8") for worker, place in enumerate(places)}
        assert len(set(of_worker.values())) == 3, f"one worker a node: {of_worker}"
        self.victim = next(w for w in (1, 2) if of_worker[w] != self.here)
        node = next(n for n in self.cluster.worker_nodes if n._node_id == of_worker[self.victim])
        self._wait("the killed shard", lambda: "is gone; another takes its place" in self.said())
        self.cluster.remove_node(node, allow_graceful=False)
        self._wait("the dead worker", lambda: f"worker {self.victim} ended with code" in self.said())
        self.cluster._shutdown_at_exit = False  # what ends it at exit is for the main thread to install
        added = self.cluster.add_node(num_cpus=1, **ray_node())
        self.joined = added._node_id

    @staticmethod
    def _wait(what, is_there, seconds=90.0):
        deadline = time.monotonic() + seconds
        while not is_there():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not show within {seconds:.0f} s")
            time.sleep(0.1)


def ray_node():
    return {"node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 100 << 20}


@contextlib.contextmanager
def three_nodes():
    """Yield a cluster and Ray; nothing that they have started is left after."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with simulated_nodes(3, store=100 << 20) as cluster, connected(RayOptions(address=cluster.address), cores=3) as ray:
        yield cluster, ray
    deadline = time.monotonic() + 60
    while left := [p for p in psutil.Process().children(recursive=True) if p.pid not in before and not is_zombie(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def is_zombie(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def fitted(folder, strategy, callbacks=(), devices=1):
    """Return the accuracy on all held-out digits, and the number of batches an epoch."""
    torch.manual_seed(0)
    module = CNN(lr=2e-3, schedule="cosine")
    data = Digits(batch_size=32)
    torch.manual_seed(1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=EPOCHS,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    data.prepare_data()
    data.setup("fit")  # which workers have done for themselves
    batches = [batch for loader in (data.val_dataloader(), data.test_dataloader()) for batch in loader]
    with torch.no_grad():
        right = sum(int((module.eval()(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches), len(data.train_dataloader())


def test_a_node_and_a_shard_are_lost_in_mid_run_and_a_node_that_joins_again_is_used(tmp_path, caplog):
    plain, batches = fitted(tmp_path / "plain", "auto")
    strategy = AsyncSGDStrategy(
        engine="ray",
        shards=SHARDS,
        shard_snapshot_steps=SNAPSHOT_STEPS,
        heartbeat_seconds=300.0,  # a busy machine is no death
        deterministic_replay=True,
    )
    notes = tmp_path / "notes"
    notes.mkdir()
    callbacks = [
        WaitForAll(3),
        ray_fits.KillsAShard(str(tmp_path / "flag"), batch=6),
        WaitsForWhoComesBack(str(notes), HALTS_IN_EPOCH),
    ]
    with caplog.at_level(logging.INFO, "lightning_accel"), three_nodes() as (cluster, ray):
        accident = Accident(cluster, notes, ray.get_runtime_context().get_node_id(), lambda: caplog.text)
        accident.start()
        try:
            accuracy, _ = fitted(tmp_path, strategy, callbacks, devices=3)
        except (KeyboardInterrupt, SystemExit):  # what Lightning makes of the first
            raise (accident.problem or KeyboardInterrupt()) from None
        accident.join(60)
        assert accident.problem is None
        assert not accident.is_alive()

    log = strategy.ending.log
    leases = Counter(lease for entry in log for lease in entry.leases)
    assert leases == Counter((epoch, i) for epoch in range(EPOCHS) for i in range(batches)), "each batch once"
    assert {entry.worker for entry in log if entry.incarnation == 0} == {0, 1, 2}
    assert strategy.statistics.restarts == 1

    again = notes / f"worker {accident.victim} 1"
    assert again.read_text(encoding="utf-8") == accident.joined, "started again on the node that joined"
    assert any((entry.worker, entry.incarnation) == (accident.victim, 1) for entry in log)

    dead_shards = caplog.text.count("is gone; another takes its place")  # the node may have had one, too
    assert 1 <= dead_shards <= 1 + SHARDS
    assert strategy.statistics.lost_versions <= dead_shards * 2 * SNAPSHOT_STEPS
    assert accuracy >= plain - 0.01, (accuracy, plain)
    print(f"plain {plain:.4f}, here {accuracy:.4f}, lost {strategy.statistics.lost_versions} of {dead_shards} shards")
