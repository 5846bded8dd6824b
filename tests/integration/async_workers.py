"""A small regression that workers of asynchronous SGD train on, in processes or in threads, and its check by replay."""

import os
import signal
import socket
import threading

import torch
from torch import nn

from lightning_accel.async_sgd import Settings, SharedMemoryStore, Worker
from lightning_accel.async_sgd.policy.replay import replay
from lightning_accel.async_sgd.shared_memory.supervisor import Supervisor
from lightning_accel.async_sgd.store import PUSH_STAGES

UNITS = torch.arange(48).view(12, 4).tolist()
SETTINGS = {"record_log": True, "lease_batches": 2, "staleness": "none"}


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=generator)
    model = nn.Linear(4, 1)
    with torch.no_grad():  # workers in threads share the global generator
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return x, x.sum(1, keepdim=True), model


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


class Killed(BaseException):
    """A worker in a thread stops here, as a killed process does: nothing of it runs any more."""


def train(store, epochs, *, wait_for=(), die=None):
    """Train, after every worker of ``wait_for`` has said that it is there; ``die`` is told each push and stage."""
    x, y, model = problem()
    optimizer = optimizer_of(model)
    worker = Worker(store, store.settings, dict(model.named_parameters()), {}, [optimizer])
    membership = worker.join(worker.opening)
    worker.attach()
    pushes = 0

    def probe(stage):
        if die is not None:
            die(store, pushes, stage)

    store.probe = probe
    store.kv(f"here {store.worker} {store.incarnation}", b"yes")
    for name in wait_for:
        store.kv(name)
    for epoch in range(membership.epoch, epochs):
        while block := store.lease(epoch, lambda: UNITS, final=epoch == epochs - 1):
            for lease in block:
                worker.pending.append(lease.id)
                rows = torch.tensor(lease.unit)

                def closure(rows=rows):
                    optimizer.zero_grad()
                    loss = nn.functional.mse_loss(model(x[rows]), y[rows])
                    loss.backward()
                    return loss

                pushes += 1
                optimizer.step(closure)
    return store.worker


def check_ending(ending, epochs):
    """Every batch once an epoch, and the parameters are those of whole pushes alone."""
    assert sorted(lease for entry in ending.log for lease in entry.leases) == [
        (epoch, i) for epoch in range(epochs) for i in range(len(UNITS))
    ]
    x, y, model = problem()
    optimizer = optimizer_of(model)

    def gradient_of(entry, at):
        rows = torch.tensor(UNITS[entry.leases[0][1]])
        weight, bias = (p.clone().requires_grad_() for p in at)
        loss = nn.functional.mse_loss(nn.functional.linear(x[rows], weight, bias), y[rows])
        return torch.autograd.grad(loss, [weight, bias])

    parameters = list(model.parameters())
    replay(ending.log, parameters, [optimizer], gradient_of)
    for expected, actual in zip(parameters, ending.snapshot.parameters, strict=True):
        assert torch.equal(expected, actual)


class _Thread:
    """A thread in a process's clothes."""

    pid = None

    def __init__(self, work):
        self.exitcode = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self._work()
        except Killed:
            self.exitcode = -int(signal.SIGKILL)
        else:
            self.exitcode = 0

    def kill(self):
        """A thread can not be killed; those of a test end by themselves."""

    def join(self, timeout=None):
        self._thread.join(timeout)


def run_threads(workers, epochs, *, die, wait_for=(), **settings):
    """Run workers as threads: a "kill" is as sudden as for a process, and costs no start."""

    def function(store):
        train(store, epochs, die=die, wait_for=wait_for if store.worker == 0 and store.incarnation == 0 else ())

    return run_thread_workers(workers, function, **settings)


def run_thread_workers(workers, function, **settings):
    """Run ``function(store)`` in a thread for every worker, and serve them."""
    settings = Settings(**{**SETTINGS, **settings})

    def start(worker, incarnation, sock):
        sock = socket.fromfd(sock.fileno(), sock.family, sock.type)

        def work():
            store = SharedMemoryStore(worker, incarnation, sock, settings, parent=os.getppid())
            try:
                function(store)
                coordinates = store.finish()
                store.report(b"result")
                store.leave(stop=coordinates)
            finally:
                store.close()

        return _Thread(work)

    return Supervisor(workers, settings, start).run()


def train_and_die(store, epochs, stage, victim, wait_for):
    """In a process: the victim's first incarnation kills itself at ``stage`` of its second push."""

    def die(store, pushes, now):
        if store.worker == victim and store.incarnation == 0 and pushes == 2 and now == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    return train(store, epochs, die=die, wait_for=wait_for)


__all__ = [
    "PUSH_STAGES",
    "SETTINGS",
    "Killed",
    "check_ending",
    "run_thread_workers",
    "run_threads",
    "train",
    "train_and_die",
]
