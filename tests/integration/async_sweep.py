"""Faults in whole fits: ``python tests/integration/async_sweep.py 1000 [SEED]`` lets so many happen, and judges.

Workers of real Trainers are killed, stopped for ever or for a while, hang, or hold the interpreter, at every stage of a
fit and in every epoch, coordinators among them; the dead are started again. After each fit every batch must have been
counted once, the parameters must be, bit for bit, those that a replay of the server's log gives (so a batch that was
trained on in the place of another shows), and no process or shared memory may be left. It prints a line a fit and the
sum; the exit code is 1 if anything was harmed.
"""

import ctypes
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import replay
from lightning_accel.async_sgd.store import PUSH_STAGES
from lightning_accel.bench.async_faults import is_alive, shared_memory

EPOCHS, BATCHES, BATCH = 4, 24, 8
HANG_SECONDS = 5.0
DEATHS = 4  # of each worker, at most
IN_A_BATCH = ("load", "step")
STAGES = ("start-up", *IN_A_BATCH, *PUSH_STAGES, "batch start", "batch end", "epoch start", "epoch end", "validation")
KINDS = ("kill", "kill", "kill", "stop", "pause", "hang", "hold the interpreter")


class Points(Dataset):
    """Points on a plane, with noise."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(size, 1, generator=generator)
        self.faults = None

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.faults is not None and index % BATCH == 0:
            self.faults.pass_by("load")
        return self.x[index], self.y[index]


class Regression(pl.LightningModule):
    """The smallest model that a wrong batch shows in."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.net, self.faults = folder, nn.Linear(4, 1), None

    def training_step(self, batch, batch_idx):
        time.sleep(0.004)  # stands for a device of the worker's own
        if self.faults is not None:
            self.faults.pass_by("step")
        note(self.folder, "steps", f"{time.monotonic()}")
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def note(folder, name, line):
    """Add a line to a file, in one piece."""
    descriptor = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


class Faults(pl.Callback):
    """Let one fault befall each of the first incarnations of each worker, at a stage that a seed chooses."""

    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        self.stage, self.kind, self.left = "never", "none", 0

    def setup(self, trainer, pl_module, stage):
        store = trainer.strategy._store
        if store is None or self.stage != "never":
            return
        note(self.folder, "pids", str(os.getpid()))
        random_of_process = random.Random(f"{self.seed} {store.worker} {store.incarnation}")
        if store.incarnation >= DEATHS:
            self.stage = "none"
            return
        self.kind = random_of_process.choice(KINDS)
        self.stage = random_of_process.choice(IN_A_BATCH if self.kind in {"hang", "hold the interpreter"} else STAGES)
        once_an_epoch = self.stage in {"epoch start", "epoch end", "validation"}
        self.left = random_of_process.randint(1, 2 if once_an_epoch else 12)
        if self.stage == "start-up":
            self.left = 1
        self.where = store
        store.probe = self.pass_by
        pl_module.faults = trainer.fit_loop._data_source.instance.dataset.faults = self
        self.pass_by("start-up")

    def pass_by(self, stage):
        """Take note of a stage; let the fault happen when it is time."""
        if stage != self.stage:
            return
        self.left -= 1
        if self.left == 0:
            note(self.folder, "faults", f"{self.kind} | {self.stage}")
            befall(self.kind)

    def on_train_epoch_start(self, trainer, pl_module):
        self.pass_by("epoch start")

    def on_train_epoch_end(self, trainer, pl_module):
        self.pass_by("epoch end")

    def on_validation_epoch_end(self, trainer, pl_module):
        self.pass_by("validation")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.pass_by("batch start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pass_by("batch end")


def befall(kind):
    """Do it to this process."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "pause":
        seconds = random.choice((0.05, 0.5, 0.8))
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], stderr=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(10**6)
    else:
        ctypes.PyDLL(None).usleep(1_500_000)  # does not let go of the interpreter, so that the heart is silent


def run(folder, seed):
    """Fit once under faults; returns what was harmed, the faults, and the longest standstill in seconds."""
    torch.manual_seed(seed)
    module, data = Regression(folder), Points(BATCHES * BATCH)
    before = [p.detach().clone() for p in module.parameters()]
    strategy = AsyncSGDStrategy(
        staleness="none",
        deterministic_replay=True,
        start_method="forkserver",
        max_restarts=100,
        heartbeat_seconds=1.0,
        straggler_grace=0.5,
        stall_seconds=2.5,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=EPOCHS, num_sanity_val_steps=0,
        default_root_dir=folder, callbacks=[Faults(folder, seed)], **quiet,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, BATCH), DataLoader(Points(32), 32))
    harm = Counter()
    leases = Counter(lease for entry in strategy.ending.log for lease in entry.leases)
    harm["lost"] = sum((epoch, i) not in leases for epoch in range(EPOCHS) for i in range(BATCHES))
    harm["twice"] = sum(count - 1 for count in leases.values())
    harm["not validated"] = "val" not in trainer.callback_metrics
    again = [p.clone().requires_grad_() for p in before]

    def gradient_of(entry, at):
        first = BATCH * entry.leases[0][1]
        x, y = data.x[first : first + BATCH], data.y[first : first + BATCH]
        weight, bias = (p.clone().requires_grad_() for p in at)
        return torch.autograd.grad(nn.functional.mse_loss(nn.functional.linear(x, weight, bias), y), [weight, bias])

    replay(strategy.ending.log, again, [torch.optim.SGD(again, 0.02, momentum=0.9)], gradient_of)
    harm["torn"] = not same(again, strategy.ending.snapshot.parameters)
    harm["another result"] = not same(strategy.ending.snapshot.parameters, module.parameters())
    pids = {int(line) for line in Path(folder, "pids").read_text(encoding="utf-8").split()}
    harm["left"] = sum(is_alive(pid) for pid in pids)
    times = sorted(float(line) for line in Path(folder, "steps").read_text(encoding="utf-8").split())
    longest = max(b - a for a, b in itertools.pairwise(times))
    harm["hangs"] = int(longest > HANG_SECONDS)
    faults = Path(folder, "faults")
    return +harm, faults.read_text(encoding="utf-8").splitlines() if faults.exists() else [], longest


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def sweep(faults, seed=0, *, tell=print):
    """Fit until so many faults have come; returns the harm that they did, and the faults, by kind and by stage."""
    harm, kinds, stages, longest = Counter(), Counter(), Counter(), 0.0
    before = shared_memory()
    while kinds.total() < faults:
        with tempfile.TemporaryDirectory() as folder:
            done, befell, standstill = run(folder, seed)
        harm += done
        longest = max(longest, standstill)
        for line in befell:
            kind, stage = line.split(" | ")
            kinds[kind] += 1
            stages[stage] += 1
        tell(f"seed {seed}: {len(befell)} faults, longest standstill {standstill:.1f} s, harm {dict(done)}")
        seed += 1
    harm["left"] += len(shared_memory() - before)
    tell(f"{kinds.total()} faults {dict(kinds)} at {dict(stages)}: longest {longest:.1f} s, harm {dict(+harm)}")
    return +harm, kinds, stages


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    found, *_ = sweep(int(sys.argv[1]), *map(int, sys.argv[2:]))
    sys.exit(1 if found else 0)
