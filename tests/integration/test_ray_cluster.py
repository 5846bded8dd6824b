"""Three nodes, two shards, three workers: a node and a shard go in the middle of a run, and a node comes back."""

import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from async_modules import WaitForAll, fit, seeded
from ray_fits import NotesItsNode

from lightning_accel import AsyncSGDStrategy
from lightning_accel.bench.ray_nodes import simulated_nodes
from lightning_accel.zoo import CNN, Digits

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 6, 8
DEADLINE_SECONDS = 120.0


class Havoc(threading.Thread):
    """Remove the node of a worker that does not coordinate, kill a shard, and add a node, as the run gets on."""

    def __init__(self, cluster, strategy, notes):
        super().__init__(daemon=True)
        self.cluster, self.strategy, self.notes = cluster, strategy, notes
        self.removed = self.added = self.error = None

    def run(self):
        try:
            self._wait(lambda: len(list(self.notes.iterdir())) == 3, "three workers")
            head = self.cluster.head_node.node_id
            places = [note.name.split() for note in self.notes.iterdir()]
            self.removed = next(node for worker, _, node in places if worker != "0" and node != head)
            victim = next(node for node in self.cluster.worker_nodes if node.node_id == self.removed)
            self.cluster.remove_node(victim, allow_graceful=False)
            before = self.strategy.statistics.version
            (self.notes.parent / "go on").touch()
            self._wait(lambda: self.strategy.statistics.version >= before + 5, "others to go on")
            kill_a_shard()
            self.added = self.cluster.add_node(
                num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=160 << 20
            ).node_id
        except BaseException as error:  # for the test to see
            self.error = error

    def _wait(self, condition, what):
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come"
            time.sleep(0.05)  # between two looks, until the deadline


def kill_a_shard():
    """Kill one process that holds a shard, of those that this process has started through Ray."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # of the node that is gone
            if " ".join(process.cmdline()).startswith("ray::Shard"):
                process.kill()
                return
    raise AssertionError("no shard is there")


def test_a_run_survives_the_loss_of_a_node_and_a_shard_and_uses_a_node_that_comes(tmp_path, caplog):
    digits = Digits()
    plain = fit(tmp_path, "auto", seeded(CNN), data=digits, epochs=EPOCHS)
    expected = float(plain.callback_metrics["val/accuracy"])
    notes = tmp_path / "notes"
    notes.mkdir()
    with simulated_nodes(3) as cluster:
        strategy = AsyncSGDStrategy(
            engine="ray",
            address=cluster.address,
            shards=2,
            shard_snapshot_steps=STEPS,
            deterministic_replay=True,
            heartbeat_seconds=300.0,
        )
        havoc = Havoc(cluster, strategy, notes)
        havoc.start()
        with caplog.at_level(logging.WARNING, "lightning_accel"):
            trainer = fit(
                tmp_path,
                strategy,
                seeded(CNN),
                devices=3,
                data=digits,
                epochs=EPOCHS,
                callbacks=[WaitForAll(3), NotesItsNode(notes, tmp_path / "go on", hold_epoch=4)],
            )
        havoc.join(DEADLINE_SECONDS)
        assert havoc.error is None
        assert havoc.removed is not None
    came_back = [note.name.split() for note in notes.iterdir() if note.name.split()[1] != "0"]
    assert havoc.added in {node for _, _, node in came_back}, "the new node is used"
    statistics = strategy.statistics
    assert statistics.restarts >= 1
    losses = caplog.text.count("another takes its place")
    assert losses >= 1
    assert 0 <= statistics.lost_versions <= losses * 2 * STEPS
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    assert set(leases.values()) == {1}
    assert len(leases) == EPOCHS * trainer.num_training_batches
    assert 100 * float(trainer.callback_metrics["val/accuracy"]) >= 100 * expected - 1.0


def test_the_command_of_the_card_trains_on_a_cluster(tmp_path):
    with simulated_nodes(2):
        command = [str(Path(sys.executable).with_name("lightning-accel")), "train", "strategy=async_sgd_ray"]
        command += ["strategy.strategy.address=auto", "trainer.devices=2", "trainer.accelerator=cpu"]
        command += ["trainer.max_epochs=1", "++trainer.limit_train_batches=4", "++trainer.limit_val_batches=1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "2 asynchronous workers push gradients to shards on Ray" in done.stdout + done.stderr
    assert "lost" not in done.stderr
