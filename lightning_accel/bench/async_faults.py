"""Workers of asynchronous SGD that are killed, stopped, slowed down and hang, and the count of what came of it.

The problem is a small regression, so that the server's log can be replayed: torn, lost or twice counted pushes show in
the last bit. Processes are real and die by SIGKILL; a fork server starts them, without the seconds that imports take.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_accel.async_sgd import LogEntry, Settings, SharedMemoryStore, Statistics, Worker, replay
from lightning_accel.async_sgd.shared_memory.peers import Peer
from lightning_accel.async_sgd.shared_memory.spawn import starter
from lightning_accel.async_sgd.shared_memory.supervisor import Ending, Supervisor
from lightning_accel.async_sgd.store import PUSH_STAGES

_BATCH = 4
_SHARED_MEMORY = Path("/dev/shm")
SLOWDOWN = 3.0
HANG_SECONDS = 5.0
HANG = signal.SIGHUP  # what the processes here understand as: wait for ever in your next step

Plan = Callable[[SharedMemoryStore, int, str], None]  # told of each stage of each push


def problem() -> tuple[Tensor, Tensor, nn.Linear, torch.optim.Optimizer]:
    """Return 256 rows, their targets, a model and its optimizer, always the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    model = nn.Linear(4, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return x, x.sum(1, keepdim=True), model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def units(batches: int) -> list[list[int]]:
    """Return the rows of each batch of an epoch."""
    return [[(_BATCH * batch + i) % 256 for i in range(_BATCH)] for batch in range(batches)]


@dataclass(frozen=True)
class Job:
    """What the workers do: ``epochs`` of ``batches``, each ``seconds`` long, or until ``deadline`` (monotonic)."""

    epochs: int
    batches: int
    seconds: float = 0.0
    deadline: float = float("inf")


def work(store: SharedMemoryStore, job: Job, plan: Plan) -> None:
    """Train in a worker process."""
    torch.set_num_threads(1)
    pace = {"seconds": job.seconds}
    signal.signal(signal.SIGUSR1, lambda *_: pace.update(seconds=SLOWDOWN * job.seconds))
    signal.signal(signal.SIGUSR2, lambda *_: pace.update(seconds=job.seconds))
    signal.signal(HANG, lambda *_: pace.update(seconds=1e6))
    x, y, model, optimizer = problem()
    worker = Worker(store, store.settings, dict(model.named_parameters()), {}, [optimizer])
    membership = worker.join(worker.opening)
    worker.attach()
    pushes = 0
    store.probe = lambda stage: plan(store, pushes, stage)
    for epoch in range(membership.epoch, job.epochs):
        while block := store.lease(epoch, lambda: units(job.batches), final=epoch == job.epochs - 1):
            for lease in block:
                if store.stopped or time.monotonic() >= job.deadline:
                    if store.is_coordinator:
                        store.stop()
                    return
                worker.pending.append(lease.id)
                pushes += 1
                store.begin("step")
                rows = torch.tensor(lease.unit)
                optimizer.zero_grad()
                functional.mse_loss(model(x[rows]), y[rows]).backward()
                time.sleep(pace["seconds"])  # stands for a device of the worker's own
                optimizer.step()
                store.rest()
        if store.stopped:
            return


def run(
    workers: int,
    settings: Settings,
    job: Job,
    plan: Plan,
    *,
    on_tick: Callable[[Sequence[Peer], Statistics], None] | None = None,
) -> Ending:
    """Run the job in real processes around a server in this one."""
    # the first optimizer of a process imports the second module, which takes seconds
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "torch._dynamo"])

    def tick(statistics: Statistics) -> None:
        if on_tick is not None:
            on_tick(supervisor.peers, statistics)

    supervisor = Supervisor(workers, settings, starter(work, (job, plan), settings, "forkserver"), on_tick=tick)
    return supervisor.run()


@dataclass
class Damage:
    """What faults did.

    Attributes:
        faults: How many there were, by kind.
        torn: Runs whose parameters are not those of whole pushes alone.
        lost: Batches of finished epochs in no push.
        twice: Batches in two pushes.
        hangs: Times without a step for more than 5 seconds.
        left: Processes and entries of shared memory that outlived their run.
        longest: Longest time without a step, in seconds.
    """

    faults: Counter[str] = field(default_factory=Counter)
    torn: int = 0
    lost: int = 0
    twice: int = 0
    hangs: int = 0
    left: int = 0
    longest: float = 0.0

    @property
    def deaths(self) -> int:
        """Workers that died and were started again."""
        return self.faults["kill"]

    @property
    def harm(self) -> int:
        """Everything that must not be."""
        return self.torn + self.lost + self.twice + self.hangs + self.left

    def judge(self, ending: Ending, job: Job) -> None:
        """Count batches, and replay the log."""
        seen = Counter(lease for entry in ending.log for lease in entry.leases)
        self.twice += sum(count - 1 for count in seen.values())
        unfinished = {state["epoch"] for state in ending.snapshot.epochs} if ending.snapshot is not None else set()
        begun = max((epoch for epoch, _ in seen), default=-1) + 1 if job.deadline < float("inf") else job.epochs
        finished = [e for e in range(begun) if job.deadline == float("inf") or e not in unfinished]
        self.lost += sum((epoch, batch) not in seen for epoch in finished for batch in range(job.batches))
        x, y, model, optimizer = problem()
        orders = units(job.batches)

        def gradient_of(entry: LogEntry, at: Sequence[Tensor]) -> Sequence[Tensor]:
            rows = torch.tensor(orders[entry.leases[0][1]])
            weight, bias = (p.clone().requires_grad_() for p in at)
            loss = functional.mse_loss(functional.linear(x[rows], weight, bias), y[rows])
            return torch.autograd.grad(loss, [weight, bias])

        parameters = list(model.parameters())
        replay(ending.log, parameters, [optimizer], gradient_of)
        assert ending.snapshot is not None
        same = [torch.equal(a, b) for a, b in zip(parameters, ending.snapshot.parameters, strict=True)]
        self.torn += not all(same)


class Watch:
    """Notice standstills and remember every process that was seen."""

    def __init__(self, damage: Damage) -> None:
        self.pids: set[int] = set()
        self._damage = damage
        self._version = -1
        self._moved = time.monotonic()

    def look(self, peers: Sequence[Peer], statistics: Statistics) -> None:
        """Call often."""
        self.pids |= {peer.process.pid for peer in peers if peer.process.pid is not None}
        now = time.monotonic()
        if statistics.version == self._version:
            return
        if self._version >= 0:  # before, the run had not begun
            self._damage.longest = max(self._damage.longest, now - self._moved)
            self._damage.hangs += now - self._moved > HANG_SECONDS
        self._version, self._moved = statistics.version, now


@dataclass(frozen=True)
class SelfDestruction:
    """Let each of the first incarnations of each worker kill itself at a stage of a push that a seed chooses."""

    seed: int
    deaths: tuple[int, ...]  # of each worker

    def __call__(self, store: SharedMemoryStore, pushes: int, stage: str) -> None:
        """Die, if it is time to."""
        if store.incarnation >= self.deaths[store.worker]:
            return
        number = sum(self.deaths[: store.worker]) + store.incarnation + self.seed
        last = random.Random(f"{self.seed} {store.worker} {store.incarnation}").randint(1, 5)
        if pushes >= last and stage == PUSH_STAGES[number % len(PUSH_STAGES)]:
            os.kill(os.getpid(), signal.SIGKILL)


def unharmed(store: SharedMemoryStore, pushes: int, stage: str) -> None:
    """Do nothing at any stage."""


def kill_sweep(kills: int, *, seed: int = 0) -> Damage:
    """Let ``kills`` processes die: workers and coordinators at every stage of a push and at any moment, and parents.

    One in 25 is a parent. Of the others half choose a stage of a push, in whatever epoch they are, and half are hit
    from outside: killed, stopped for ever, or made to hang in a step; the last two are ended by the supervisor. Between
    them workers are stopped for a while, shorter and longer than the end of an epoch waits for them.
    """
    damage = Damage()
    before = shared_memory()
    parents = kills // 25
    left = kills - parents
    while left > 0:
        deaths = min(12, left)
        inside = -(-deaths // 2)
        _kill_workers(damage, inside, deaths - inside, seed)
        left = kills - parents - damage.deaths
        seed += inside
    for number in range(parents):
        _kill_parent(damage, seed + number)
    damage.left += len(shared_memory() - before)
    return damage


def _kill_workers(damage: Damage, inside: int, outside: int, seed: int) -> None:
    generator = random.Random(seed)
    watch = Watch(damage)
    job = Job(epochs=6, batches=50, seconds=0.004)
    settings = Settings(
        record_log=True,
        staleness="none",
        max_restarts=100,
        heartbeat_seconds=1.5,
        straggler_grace=0.5,
        stall_seconds=1.5,
    )
    plan = SelfDestruction(seed, (inside // 2, inside - inside // 2))
    shots = outside
    next_shot = time.monotonic() + generator.uniform(0.1, 0.3)
    stopped: list[tuple[float, Peer]] = []

    def tick(peers: Sequence[Peer], statistics: Statistics) -> None:
        nonlocal shots, next_shot
        now = time.monotonic()
        watch.look(peers, statistics)
        for until, peer in [entry for entry in stopped if entry[0] <= now]:
            send(peer, signal.SIGCONT)
            stopped.remove((until, peer))
        held = [peer for _, peer in stopped]
        joined = [p for p in peers if p.state == "joined" and p.process.exitcode is None and p not in held]
        if not shots or not joined or now < next_shot:
            return
        victim = generator.choice(joined)
        kind = generator.choice(("kill", "kill", "kill", "stop for ever", "hang", "stop"))
        number = {"kill": signal.SIGKILL, "hang": HANG}.get(kind, signal.SIGSTOP)
        if send(victim, number):
            shots -= kind != "stop"
            if kind == "stop":
                damage.faults[kind] += 1
                stopped.append((now + generator.choice((0.05, 0.2, 1.0)), victim))
        next_shot = now + generator.uniform(0.0, 0.2)

    ending = run(2, settings, job, plan, on_tick=tick)
    damage.faults["kill"] += ending.statistics.restarts
    damage.faults["batch taken over"] += ending.statistics.taken_over
    damage.judge(ending, job)
    damage.left += sum(is_alive(pid) for pid in watch.pids)


def send(peer: Peer, number: signal.Signals) -> bool:
    """Send a signal; returns False if the process has ended meanwhile."""
    assert peer.process.pid is not None
    try:
        os.kill(peer.process.pid, number)
    except ProcessLookupError:
        return False
    return True


_PARENT = """
import sys
from lightning_accel.async_sgd import Settings
from lightning_accel.bench.async_faults import Job, unharmed, run
told = set()
def tell(peers, statistics):
    for peer in peers:
        if statistics.version > 20 and peer.state == "joined" and peer.worker not in told:
            told.add(peer.worker)
            print(peer.process.pid, flush=True)
if __name__ == "__main__":
    run(2, Settings(), Job(epochs=10**6, batches=60), unharmed, on_tick=tell)
"""


def _kill_parent(damage: Damage, seed: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    time.sleep(random.Random(seed).uniform(0.0, 0.05))
    parent.kill()
    parent.wait()
    damage.faults["kill of the parent"] += 1
    began = time.monotonic()
    while any(is_alive(pid) for pid in pids) and time.monotonic() - began < HANG_SECONDS:
        time.sleep(0.02)
    damage.left += sum(is_alive(pid) for pid in pids)
    parent.stdout.close()


def is_alive(pid: int) -> bool:
    """Whether a process runs, or is a zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def shared_memory() -> set[str]:
    """Return what processes that are no more have left in the system's folder of shared memory, and what is ours.

    Torch names its entries after the process; other programs of this machine come and go with theirs.
    """
    names = os.listdir(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else []
    of_torch = {name: name.split("_")[1] for name in names if name.startswith("torch_")}
    orphans = {name for name, pid in of_torch.items() if pid.isdecimal() and not is_alive(int(pid))}
    return orphans | {name for name in names if name.startswith("lightning")}
