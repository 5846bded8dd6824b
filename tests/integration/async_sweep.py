"""Faults in whole fits: ``python tests/integration/async_sweep.py 1000 [SEED]`` lets so many workers die, and judges.

Workers of real Trainers are killed, stopped for ever, or hang until they are ended, at every stage of a fit from the
first hook to the last and in every epoch, coordinators among them; the dead are started again. Between these deaths,
and beyond their number, workers are stopped for a while or hold the interpreter. After each fit every batch must have
been counted once, the parameters must be, bit for bit, those that a replay of the server's log gives (so a batch that
was trained on in the place of another shows), and no process, shared memory or file may be left. A coordinator that
dies when training is over takes its last hooks with it: such a fit must say so, and leave what was trained in the
module. It prints a line a fit and the sum; the exit code is 1 if anything was harmed.
"""

import ctypes
import itertools
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from multiprocessing.util import get_temp_dir
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_accel import AsyncSGDStrategy
from lightning_accel.async_sgd import replay
from lightning_accel.async_sgd.store import PUSH_STAGES
from lightning_accel.bench.async_faults import is_alive, shared_memory

EPOCHS, BATCHES, BATCH = 4, 24, 8
HANG_SECONDS = 5.0
FAULTS = 6  # of each worker, at most
IN_A_BATCH = ("load", "step")
CALLS = ("lease", "pull", "snapshot", "kv", "statistics")  # of the store: before and after the answer
ONCE_AN_EPOCH = ("epoch start", "epoch end", "validation", "checkpoint", "before snapshot", "after snapshot")
AT_THE_END = ("before finish", "after finish", "train end", "before deliver", "after deliver", "teardown")
STAGES = (
    *("start-up", *IN_A_BATCH, *PUSH_STAGES, "batch start", "batch end", *ONCE_AN_EPOCH, *AT_THE_END),
    *(f"{when} {call}" for call in CALLS for when in ("before", "after") if call != "snapshot"),
)
KINDS = (*["kill"] * 6, "stop", "pause", "hang", "hold the interpreter")
DEADLY = {"kill", "stop", "hang"}


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
        self.stage, self.kind, self.left, self.trainer = "never", "none", 0, None

    def setup(self, trainer, pl_module, stage):
        store = trainer.strategy._store
        if store is None or self.stage != "never":
            return
        note(self.folder, "pids", str(os.getpid()))
        random_of_process = random.Random(f"{self.seed} {store.worker} {store.incarnation}")
        if store.incarnation >= FAULTS:
            self.stage = "none"
            return
        self.trainer = trainer
        self.kind = random_of_process.choice(KINDS)
        self.stage = random_of_process.choice(IN_A_BATCH if self.kind in {"hang", "hold the interpreter"} else STAGES)
        self.left = random_of_process.randint(1, 2 if self.stage in ONCE_AN_EPOCH else 8)
        self.first_epoch = random_of_process.choice((0, 0, 1, 2, 3)) if store.incarnation == 0 else 0
        if self.stage == "start-up" or self.stage in AT_THE_END:
            self.left = 1
        store.probe = self.pass_by
        for call in (*CALLS, "finish", "deliver"):
            setattr(store, call, self.watched(call, getattr(store, call)))
        pl_module.faults = trainer.fit_loop._data_source.instance.dataset.faults = self
        self.pass_by("start-up")

    def pass_by(self, stage):
        """Take note of a stage; let the fault happen when it is time."""
        if stage != self.stage or (self.trainer.current_epoch < self.first_epoch and stage != "start-up"):
            return
        self.left -= 1
        if self.left == 0:
            fault = (self.kind, self.stage, self.trainer.current_epoch, time.monotonic())
            note(self.folder, "faults", " | ".join(map(str, fault)))
            befall(self.kind)

    def watched(self, name, call):
        """Return a call of the store, of which both ends are stages."""

        def watched(*args, **kwargs):
            self.pass_by(f"before {name}")
            found = call(*args, **kwargs)
            self.pass_by(f"after {name}")
            return found

        return watched

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

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.pass_by("checkpoint")

    def on_train_end(self, trainer, pl_module):
        self.pass_by("train end")

    def teardown(self, trainer, pl_module, stage):
        self.pass_by("teardown")


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
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=EPOCHS, num_sanity_val_steps=0,
        default_root_dir=folder, callbacks=[Faults(folder, seed), ModelCheckpoint(folder)], **quiet,
    )  # fmt: skip
    harm = Counter()
    try:
        trainer.fit(module, DataLoader(data, BATCH), DataLoader(Points(32), 32))
    except RuntimeError as error:
        ended = strategy.ending if strategy.rescue is None else strategy.rescue.remains
        harm["fails"] = not re.search("^(the coordinator died when training was over|every worker died)", str(error))
        log, held = ended.log, [p.detach().clone() for p in ended.state.parameters]
    else:
        log, held = strategy.ending.log, strategy.ending.snapshot.parameters
        harm["not validated"] = "val" not in trainer.callback_metrics
    leases = Counter(lease for entry in log for lease in entry.leases)
    harm["lost"] = sum((epoch, i) not in leases for epoch in range(EPOCHS) for i in range(BATCHES))
    harm["twice"] = sum(count - 1 for count in leases.values())
    again = [p.clone().requires_grad_() for p in before]

    def gradient_of(entry, at):
        first = BATCH * entry.leases[0][1]
        x, y = data.x[first : first + BATCH], data.y[first : first + BATCH]
        weight, bias = (p.clone().requires_grad_() for p in at)
        return torch.autograd.grad(nn.functional.mse_loss(nn.functional.linear(x, weight, bias), y), [weight, bias])

    replay(log, again, [torch.optim.SGD(again, 0.02, momentum=0.9)], gradient_of)
    harm["torn"] = not same(again, held)
    harm["another result"] = not same(held, module.parameters())
    pids = {int(line) for line in Path(folder, "pids").read_text(encoding="utf-8").split()}
    harm["left"] = sum(is_alive(pid) for pid in pids)
    faults = Path(folder, "faults")
    lines = faults.read_text(encoding="utf-8").splitlines() if faults.exists() else []
    befell = [tuple(line.split(" | ")) for line in lines]
    # A worker that has come as far as its next fault was not standing still: two hangs in a row are two standstills.
    times = Path(folder, "steps").read_text(encoding="utf-8").split() + [moment for *_, moment in befell]
    longest = max(b - a for a, b in itertools.pairwise(sorted(map(float, times))))
    harm["hangs"] = int(longest > HANG_SECONDS)
    return +harm, [fault[:3] for fault in befell], longest


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def sweep(deaths, seed=0, *, tell=print):
    """Fit until so many workers have died; returns the harm that was done, and the faults by kind and by stage."""
    harm, kinds, stages, epochs, longest, dead = Counter(), Counter(), Counter(), Counter(), 0.0, 0
    before = shared_memory()
    get_temp_dir()  # of the fork server, which stays until this process ends
    with tempfile.TemporaryDirectory() as room, mock.patch.dict(os.environ, TMPDIR=room):
        tempfile.tempdir = None  # from here on all our processes' files that have no other place are made in `room`
        while dead < deaths:
            with tempfile.TemporaryDirectory() as folder:
                done, befell, standstill = run(folder, seed)
            harm += done
            longest = max(longest, standstill)
            for kind, stage, epoch in befell:
                kinds[kind] += 1
                stages[stage] += 1
                epochs[epoch] += 1
                dead += kind in DEADLY
            tell(f"seed {seed}: {len(befell)} faults, longest standstill {standstill:.1f} s, harm {dict(done)}")
            seed += 1
        harm["left"] += len(os.listdir(room)) + len(shared_memory() - before)
    tempfile.tempdir = None
    tell(f"{dead} deaths among {kinds.total()} faults {dict(kinds)}\nat {dict(stages)}\nin epochs {dict(epochs)}")
    tell(f"longest standstill {longest:.1f} s, harm {dict(+harm)}")
    return +harm, kinds, stages


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    found, *_ = sweep(int(sys.argv[1]), *map(int, sys.argv[2:]))
    sys.exit(1 if found else 0)
