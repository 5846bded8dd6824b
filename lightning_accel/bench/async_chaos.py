"""Workers of asynchronous SGD under random faults for as long as one likes, and what they get done meanwhile."""

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_accel.async_sgd import Settings, Statistics
from lightning_accel.async_sgd.shared_memory.peers import Peer
from lightning_accel.bench.async_faults import (
    SLOWDOWN,
    Damage,
    Job,
    Watch,
    is_alive,
    run,
    send,
    shared_memory,
    unharmed,
)


@dataclass
class Chaos:
    """What a run under faults came to.

    Attributes:
        damage: See there.
        steps: Steps in each stretch of the run.
        worker_seconds: Time of workers in each stretch; one that is dead or stopped has none, a slow one a third.
    """

    damage: Damage
    steps: list[int]
    worker_seconds: list[float]


def chaos(seconds: float, *, every: float, workers: int = 4, stretch: float = 5.0, seed: int = 0) -> Chaos:
    """Train for ``seconds`` while each ``every`` seconds a random worker is killed, stopped for a while or slowed down.

    A batch takes 20 ms that are waited for, as for a device of the worker's own: throughput then follows the number
    of workers at work, not the cores of this machine. ``every=inf`` is the run without faults.
    """
    damage = Damage()
    before = shared_memory()
    generator = random.Random(seed)
    watch = Watch(damage)
    begins = time.monotonic() + 1.0
    job = Job(epochs=10**6, batches=2000, seconds=0.02, deadline=begins + seconds + 2.0)
    settings = Settings(record_log=True, staleness="none", max_restarts=10**6, heartbeat_seconds=60.0)
    found = Chaos(damage, [], [])
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "slow-down": signal.SIGUSR1}
    afflicted: dict[int, tuple[str, float, int | None]] = {}  # worker: what, until when, process
    clock = {"last": 0.0, "fault": 0.0, "stretch": 0.0}
    version = 0

    def relieve(peers: Sequence[Peer], now: float, *, all_of_them: bool = False) -> None:
        for worker, (kind, until, pid) in list(afflicted.items()):
            if now < until and not all_of_them:
                continue
            del afflicted[worker]
            for peer in peers:
                if peer.process.pid == pid:
                    send(peer, signal.SIGCONT if kind == "stop" else signal.SIGUSR2)

    def strike(peers: Sequence[Peer], now: float) -> None:
        healthy = [p for p in peers if p.state == "joined" and p.worker not in afflicted and p.process.exitcode is None]
        if len(healthy) < 2:
            return
        victim, kind = generator.choice(healthy), generator.choice(("kill", "stop", "slow-down"))
        if not send(victim, signals[kind]):
            return
        damage.faults[kind] += 1
        if kind != "kill":
            afflicted[victim.worker] = (kind, now + generator.uniform(0.5, 2.0), victim.process.pid)

    def tick(peers: Sequence[Peer], statistics: Statistics) -> None:
        nonlocal version
        watch.look(peers, statistics)
        now = time.monotonic()
        if not clock["last"]:
            if statistics.live_workers == workers:
                clock.update(last=now, fault=now, stretch=now)
                version = statistics.version
                found.worker_seconds.append(0.0)
            return
        if now >= job.deadline - 0.5:  # let go of everybody before the end
            relieve(peers, now, all_of_them=True)
            return
        share = {"stop": 0.0, "slow-down": 1.0 / SLOWDOWN}
        at_work = sum(
            share[afflicted[p.worker][0]] if p.worker in afflicted else 1.0
            for p in peers
            if p.state == "joined" and p.process.exitcode is None
        )
        found.worker_seconds[-1] += at_work * (now - clock["last"])
        clock["last"] = now
        if now - clock["stretch"] >= stretch:
            found.steps.append(statistics.version - version)
            version = statistics.version
            found.worker_seconds.append(0.0)
            clock["stretch"] = now
        relieve(peers, now)
        if now - clock["fault"] >= every:
            clock["fault"] = now
            strike(peers, now)

    ending = run(workers, settings, job, unharmed, on_tick=tick)
    del found.worker_seconds[len(found.steps) :]  # the last stretch is not whole
    damage.judge(ending, job)
    damage.left += sum(is_alive(pid) for pid in watch.pids) + len(shared_memory() - before)
    return found
