"""What the tests of the engine for clusters run in its actors."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_accel.async_sgd import Worker

BATCHES = 20


def batches():
    return [list(range(8 * i, 8 * (i + 1))) for i in range(BATCHES)]


def train(store, epochs, die=None):
    """Train a small model; ``die`` is (worker, stage, push): the process is killed there, the first time."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * BATCHES, 8, generator=generator)
    y = (x.sum(1) > 0).long()
    worker = Worker(store, store.settings, dict(model.named_parameters()), {}, [optimizer])
    if die is not None and store.worker == die[0] and store.incarnation == 0:

        def kill(stage):
            if stage == die[1] and store._sender.sequence >= die[2]:
                os.kill(os.getpid(), signal.SIGKILL)

        store.probe = kill
    worker.join(worker.opening)
    worker.attach()
    for other in range(die is not None and 2):  # nobody trains alone before the other is there
        store.kv(f"there {store.worker}", b"yes")
        store.kv(f"there {other}")
    for epoch in range(epochs):
        while block := store.lease(epoch, batches):
            for lease in block:
                worker.pending.append(lease.id)
                store.begin("step")
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[lease.unit]), y[lease.unit]).backward()
                optimizer.step()
                store.rest()
    worker.flush()
    return store.worker


def fail(store):
    """Raise in the middle of a run."""
    raise ArithmeticError(f"worker {store.worker} divides by zero")


class KillsAShard(pl.Callback):
    """The worker with a number kills the process of a shard, once, when it has trained some batches."""

    def __init__(self, flag, worker=0, batch=12):
        self.flag, self.worker, self.batch = flag, worker, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        import ray

        store = trainer.strategy._store
        if store.worker == self.worker and batch_idx == self.batch and not Path(self.flag).exists():
            Path(self.flag).write_text("killed", encoding="utf-8")
            ray.kill(store._sender._actors[0])
