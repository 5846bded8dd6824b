"""One run of a parameter server and its workers, event by event; server, leases and rules are the real ones.

A worker leases batches, computes, pushes, waits for the server, and pulls, as `Worker` does; each of these takes as
long as `Costs` says, on cores, links and a server that others use, too.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.async_sgd.policy.leases import Lease
from lightning_accel.async_sgd.policy.pushes import Push
from lightning_accel.async_sgd.policy.rules import has_slack, staleness_of
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.policy.sharing import LeaseRequest, Sharing, Situation
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.simulation.clock import Then
from lightning_accel.async_sgd.simulation.costs import Costs
from lightning_accel.async_sgd.simulation.machines import Machines
from lightning_accel.async_sgd.simulation.training import LossOf, Nothing, Training
from lightning_accel.async_sgd.simulation.workers import SimulatedWorker

_COORDINATOR = 0
_WARM_UP = 0.25  # part of the batches after which throughput is counted
_MOST_ATTEMPTS = 4  # pushes for each that would do, before a run counts as one that does not end (all are too stale)


@dataclass(frozen=True)
class SimulatedRun:
    """What a simulated run came to; the module that was given, if any, holds the result.

    Attributes:
        seconds: On the virtual clock, from the first step's beginning to the last push.
        staleness_mean: In optimizer steps, of all pushes.
        worker_pushes: Applied pushes of each worker.
        dropped: Pushes that were not applied.
        throughput: Batches a second that count, without the first quarter of them; NaN if there are too few.
        server_load: Part of its time that the server was busy.
        link_load: Part of its time that the server's link was busy, the busier direction.
    """

    seconds: float
    staleness_mean: float
    worker_pushes: tuple[int, ...]
    dropped: int
    throughput: float = math.nan
    server_load: float = 0.0
    link_load: float = 0.0


def simulate(
    module: nn.Module,
    loss_of: LossOf,
    batches: Sequence[Any],
    optimizer: Optimizer,
    *,
    settings: Settings,
    step_seconds: Sequence[float],
    jitter: float = 0.1,
    seed: int = 0,
    costs: Costs | None = None,
    observe: Callable[[float, int, Sequence[Tensor]], None] | None = None,
) -> SimulatedRun:
    """Train ``module`` on ``batches``, each once, with as many workers as there are ``step_seconds``.

    Args:
        module: To train, on CPU; buffers are the module's own, shared by all workers.
        loss_of: Returns the loss of a batch.
        batches: In the order in which they are handed out.
        optimizer: Over the module's parameters.
        settings: Of the run. ``validate`` is not simulated; what compression saves is for ``push_bytes`` to say.
        step_seconds: Of each worker, each > 0.
        jitter: Each step takes ``1 - jitter`` to ``1 + jitter`` of that, in [0, 1).
        seed: Of the jitter.
        costs: Of all but the steps, whose seconds are shared between ``compute`` and ``wait`` as they are there; None:
            only steps take time.
        observe: Called after each applied push with the time, the number of batches that count, and the server's
            parameters.

    Raises:
        ValueError: If a number is out of its range.
    """
    training = Training(module, loss_of, batches, optimizer)
    run = Simulation(training, settings, step_seconds, costs, jitter=jitter, seed=seed, observe=observe)
    return run.run()


def simulate_times(
    batches: int,
    *,
    settings: Settings,
    step_seconds: Sequence[float],
    jitter: float = 0.1,
    seed: int = 0,
    costs: Costs | None = None,
) -> SimulatedRun:
    """Return how a run of so many ``batches`` goes, without training anything: see `simulate`."""
    return Simulation(Nothing(batches), settings, step_seconds, costs, jitter=jitter, seed=seed, observe=None).run()


class Simulation:
    """See `simulate`."""

    def __init__(
        self,
        training: Training | Nothing,
        settings: Settings,
        step_seconds: Sequence[float],
        costs: Costs | None,
        *,
        jitter: float,
        seed: int,
        observe: Callable[[float, int, Sequence[Tensor]], None] | None,
    ) -> None:
        if not step_seconds or min(step_seconds) <= 0.0:
            raise ValueError(f"`step_seconds` must be > 0 for one worker at least, got {list(step_seconds)}.")
        if not 0.0 <= jitter < 1.0:
            raise ValueError(f"`jitter` must be in [0, 1), got {jitter}.")
        settings.check_workers(len(step_seconds))
        self._training, self._settings, self._costs = training, settings, costs or Costs(compute=1.0)
        self._jitter, self._random, self._observe = jitter, random.Random(seed), observe
        self._machines = Machines(self._costs)
        self._clock = self._machines.clock
        self._server = ParameterServer(training.opening(), settings)
        self._sharing = Sharing(self._server.leases, settings, len(step_seconds))
        self._workers = [SimulatedWorker(i, seconds, settings, training) for i, seconds in enumerate(step_seconds)]
        self._waiting: dict[int, Then] = {}  # for batches, until the server has some
        self._slack: dict[int, Then] = {}  # for the slowest
        self._ways: dict[int, tuple[Push, Then]] = {}  # of the round that is open, and what each waits for
        self._through: set[int] = set()  # workers that get no more batches
        self._staleness = self._count = self._done = 0
        self._marks: list[tuple[float, int]] = []
        self._ended = 0.0

    def run(self) -> SimulatedRun:
        """Simulate until every batch counts, or far too many pushes did not count."""
        server, total = self._server, len(self._training.batches)
        server.leases.begin(0, range(total))
        for worker in self._workers:
            server.admit(worker.worker, 0)
        server.live = len(self._workers)
        for worker in self._workers:
            worker.read(server)
            self._next(worker)
        most = _MOST_ATTEMPTS * total
        self._clock.run(lambda: self._done >= total or self._count >= most)
        self._training.load(server.parameters)
        found = server.statistics()
        server_load, link_load = self._machines.loads(self._ended)
        return SimulatedRun(
            seconds=self._ended,
            staleness_mean=self._staleness / self._count if self._count else math.nan,
            worker_pushes=found.worker_pushes,
            dropped=found.dropped,
            throughput=self._throughput(),
            server_load=server_load,
            link_load=link_load,
        )

    def _throughput(self) -> float:
        total = len(self._training.batches)
        if self._done < total:  # given up
            return self._done / self._ended if self._ended else 0.0
        last = total - len(self._workers) * self._settings.lease_batches  # from there on some have no more
        window = [mark for mark in self._marks if _WARM_UP * total <= mark[1] <= last]
        if len(window) < 2 or window[-1][0] <= window[0][0]:
            return math.nan
        return (window[-1][1] - window[0][1]) / (window[-1][0] - window[0][0])

    # --- batches

    def _next(self, worker: SimulatedWorker) -> None:
        if worker.leases:
            self._step(worker, worker.leases.popleft())
        else:
            self._machines.call(self._costs.ask, lambda: self._lease(worker))

    def _lease(self, worker: SimulatedWorker) -> None:
        server = self._server
        at = Situation(now=self._clock.now, coordinator=_COORDINATOR, live=server.live, steps=server.version)
        answer = self._sharing.answer(worker, self._workers, LeaseRequest(0, final=True), at)
        if answer is None:
            if worker.worker == _COORDINATOR and worker.worker not in self._waiting:
                # it takes over what others hold when the grace is over, whether or not anything happens till then
                self._clock.after(self._settings.straggler_grace + 1e-9, self._ask_again)
            self._waiting[worker.worker] = lambda: self._lease(worker)
            self._close_round()  # which may have waited for this one
            return
        self._waiting.pop(worker.worker, None)
        if answer.leases:
            worker.leases.extend(answer.leases)
            self._machines.answer(lambda: self._next(worker))
        elif worker.count:  # what it has summed up is pushed at the end
            self._push(worker, lambda: self._end(worker))
        else:
            self._end(worker)

    def _end(self, worker: SimulatedWorker) -> None:
        self._through.add(worker.worker)
        self._close_round()

    def _ask_again(self) -> None:
        for then in list(self._waiting.values()):
            then()

    # --- a step

    def _step(self, worker: SimulatedWorker, lease: Lease) -> None:
        worker.pending.append(lease.id)
        seconds = worker.seconds * self._random.uniform(1.0 - self._jitter, 1.0 + self._jitter)
        compute = seconds * self._costs.compute / self._costs.step
        batch = self._training.batches[lease.unit]

        def stepped() -> None:
            worker.train(batch)
            if self._settings.local_steps:
                self._machines.cores.run(self._costs.update, go_on)
            else:
                go_on()

        def go_on() -> None:
            if worker.push_is_due:
                self._push(worker, lambda: self._pushed(worker))
            else:
                self._pushed(worker)

        self._machines.cores.run(compute, lambda: self._clock.after(seconds - compute, stepped))

    # --- pushes and pulls

    def _push(self, worker: SimulatedWorker, then: Then) -> None:
        """Push what was summed up; ``then`` is called when the worker goes on."""
        if self._must_wait(worker, lambda: self._push(worker, then)):
            return
        push, waits = worker.take_push(), worker.waits
        worker.unanswered += 1

        def send() -> None:
            self._machines.send(lambda: self._machines.call(self._costs.apply / self._costs.shards, apply))
            if not waits:
                then()

        def apply() -> None:
            def answer() -> None:
                self._machines.answer(lambda: self._answer(worker, then if waits else None))

            if self._server.rounds is None:
                self._apply(push)
                answer()
            else:
                self._ways[worker.worker] = push, answer
                self._close_round()

        self._machines.cores.run(self._costs.push, send)

    def _must_wait(self, worker: SimulatedWorker, again: Then) -> bool:
        """Whether a push has to wait; if so, ``again`` is called when that may be over."""
        most = self._settings.max_staleness
        # no more than two pushes are under way; to be compared with the others, none (the server's count is its own)
        if worker.unanswered >= (2 if most is None else 1):
            worker.blocked = again
            return True
        clocks = self._server.clocks
        others: Iterable[int] = clocks.values()
        if self._waiting and most is not None:
            others = [clock for number, clock in clocks.items() if number not in self._waiting]
        if not has_slack(clocks[worker.worker], others, max_staleness=most):
            self._slack[worker.worker] = again
            return True
        self._slack.pop(worker.worker, None)
        return False

    def _close_round(self) -> None:
        """Apply the ways that are there if their round is due, else come back when it is."""
        rounds = self._server.rounds
        left = len(self._workers) - len(self._waiting) - len(self._through)
        if rounds is None or len(self._ways) < max(1, min(self._settings.min_workers, left)):
            return
        able = [w.worker for w in self._workers if w.worker not in self._waiting and w.worker not in self._through]
        if not rounds.is_due(self._ways, able, self._clock.now):
            seconds = rounds.closes_in(self._clock.now)
            if seconds is not None and math.isfinite(seconds):
                self._clock.after(seconds + 1e-9, self._close_round)
            return
        ways, self._ways = [way for _, way in sorted(self._ways.items())], {}
        self._staleness += sum(rounds.staleness_of(push.base_version) for push, _ in ways)
        self._count += len(ways)
        self._server.apply_round([push for push, _ in ways], coordinator=_COORDINATOR)
        self._look()
        for _, answer in ways:
            answer()

    def _apply(self, push: Push) -> None:
        server = self._server
        self._staleness += staleness_of(server.version, push.base_version)
        self._count += 1
        server.apply(push, from_coordinator=push.worker == _COORDINATOR)
        self._look()

    def _look(self) -> None:
        """Take note of what was applied, and let those go on who have waited for it."""
        server = self._server
        self._done = server.leases.committed(0)
        self._ended = self._clock.now
        self._marks.append((self._ended, self._done))
        if self._observe is not None:
            self._observe(self._ended, self._done, server.parameters)
        for again in list(self._slack.values()):
            again()
        self._ask_again()

    def _answer(self, worker: SimulatedWorker, then: Then | None) -> None:
        worker.unanswered -= 1
        blocked, worker.blocked = worker.blocked, None
        for go_on in (blocked, then):
            if go_on is not None:
                go_on()

    def _pushed(self, worker: SimulatedWorker) -> None:
        worker.since_pull += 1
        pushed_all = worker.count == 0
        due = pushed_all if self._settings.local_steps else worker.since_pull >= self._settings.n_fetch
        if due:
            self._machines.fetch(lambda: worker.read(self._server), lambda: self._next(worker))
        else:
            self._next(worker)
