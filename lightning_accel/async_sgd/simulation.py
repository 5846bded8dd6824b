"""Asynchronous training on a virtual clock, in one process: the server's own arithmetic and real gradients.

Workers take as long for a step as they are told to, so that any number of them and any speeds can be tried on one
core, and the same seed gives the same bits. What it leaves out: the time that pushes and pulls take.
"""

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.async_sgd.policy.server import ParameterServer, Push
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.store import Opening


@dataclass(frozen=True)
class SimulatedRun:
    """What a simulated run came to; the module that was given holds the result.

    Attributes:
        seconds: On the virtual clock, from the first step's beginning to the last push.
        staleness_mean: In optimizer steps.
        worker_pushes: Applied pushes of each worker.
        dropped: Pushes that were not applied.
    """

    seconds: float
    staleness_mean: float
    worker_pushes: tuple[int, ...]
    dropped: int


def simulate(
    module: nn.Module,
    loss_of: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    optimizer: Optimizer,
    *,
    settings: Settings,
    step_seconds: Sequence[float],
    jitter: float = 0.1,
    seed: int = 0,
) -> SimulatedRun:
    """Train ``module`` on ``batches``, each once, with as many workers as there are ``step_seconds``.

    A worker reads what the server publishes, computes one gradient there, pushes it when its step's time is over, and
    takes the next batch. The server is a real `ParameterServer`.

    Args:
        module: To train, on CPU; buffers are the module's own, shared by all workers.
        loss_of: Returns the loss of a batch.
        batches: In the order in which they are handed out.
        optimizer: Over the module's parameters.
        settings: Of the run. ``n_push``, ``n_fetch`` and ``local_steps`` are left at their defaults.
        step_seconds: Of each worker, each > 0.
        jitter: Each step takes ``1 - jitter`` to ``1 + jitter`` of that, in [0, 1).
        seed: Of the jitter.

    Raises:
        ValueError: If a number is out of its range, or the settings ask for what is not simulated.
    """
    if not step_seconds or min(step_seconds) <= 0.0:
        raise ValueError(f"`step_seconds` must be > 0 for one worker at least, got {list(step_seconds)}.")
    if not 0.0 <= jitter < 1.0:
        raise ValueError(f"`jitter` must be in [0, 1), got {jitter}.")
    if settings.local_steps or max(settings.n_push, settings.n_fetch) > 1:
        raise ValueError("a push a step is simulated; leave `local_steps`, `n_push` and `n_fetch` at their defaults.")
    return _Simulation(module, loss_of, optimizer, settings, len(step_seconds)).run(
        batches, step_seconds, jitter=jitter, rng=random.Random(seed)
    )


class _Simulation:
    def __init__(
        self,
        module: nn.Module,
        loss_of: Callable[[nn.Module, Any], Tensor],
        optimizer: Optimizer,
        settings: Settings,
        workers: int,
    ) -> None:
        self._module, self._loss_of = module, loss_of
        self._parameters = list(module.parameters())
        mine = {id(p): nn.Parameter(p.detach().clone()) for p in self._parameters}
        for group in optimizer.param_groups:  # the server's parameters are others than those a worker computes on
            group["params"] = [mine[id(p)] for p in group["params"]]
        names = [name for name, _ in module.named_parameters()]
        self._server = ParameterServer(Opening(names, list(mine.values()), [], [], [optimizer]), settings)
        self._compensates = settings.staleness == "delay_compensation"
        for worker in range(workers):
            self._server.admit(worker, 0)
        self._server.live = workers
        self._sequences = [0] * workers

    def run(
        self, batches: Sequence[Any], step_seconds: Sequence[float], *, jitter: float, rng: random.Random
    ) -> SimulatedRun:
        server, left = self._server, iter(batches)
        events: list[tuple[float, int, Any, int, list[Tensor]]] = []  # end of a step, worker, batch, version, values
        now, staleness, count = 0.0, 0, 0

        def begin(worker: int) -> None:
            batch = next(left, None)
            if batch is None:
                return
            seconds = step_seconds[worker] * rng.uniform(1.0 - jitter, 1.0 + jitter)
            values = [p.detach().clone() for p in server.published()]
            heapq.heappush(events, (now + seconds, worker, batch, server.version, values))

        for worker in range(len(step_seconds)):
            begin(worker)
        while events:
            now, worker, batch, version, values = heapq.heappop(events)
            staleness, count = staleness + server.version - version, count + 1
            self._push(worker, version, values, batch)
            begin(worker)
        self._load(server.parameters)
        found = server.statistics()
        return SimulatedRun(
            seconds=now,
            staleness_mean=staleness / count if count else math.nan,
            worker_pushes=found.worker_pushes,
            dropped=found.dropped,
        )

    @torch.no_grad()
    def _load(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def _push(self, worker: int, version: int, values: list[Tensor], batch: Any) -> None:
        self._load(values)
        loss = self._loss_of(self._module, batch)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        self._sequences[worker] += 1
        self._server.apply(
            Push(
                worker=worker,
                incarnation=0,
                sequence=self._sequences[worker],
                base_version=version,
                optimizer=0,
                gradients=gradients,
                finite=all(bool(g.isfinite().all()) for g in gradients if g is not None),
                base=values if self._compensates else (),
            )
        )
