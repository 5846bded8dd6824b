"""The state that workers share and the one place that changes it; knows nothing of processes or memory."""

import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.buffers import take_buffers
from lightning_accel.async_sgd.policy.flat_optimizer import Arena, FlatOptimizer
from lightning_accel.async_sgd.policy.leases import LeaseBook, LeaseId
from lightning_accel.async_sgd.policy.look_ahead import LookAhead
from lightning_accel.async_sgd.policy.outer_step import OuterStep
from lightning_accel.async_sgd.policy.rules import compensate_delay, learning_rate_weight, staleness_of
from lightning_accel.async_sgd.policy.stepping import get_groups, set_groups
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.store import Opening, Snapshot, Statistics

OUTER = -1  # "optimizer" of a push that carries a way gone instead of a gradient
NO_UPDATE = -2  # push that only commits leases
ASSIGN = -3  # push of parameter values: counts only if nobody has stepped since they were read
OVERWRITE = -4  # push of parameter values: counts in any case

Outcome = Literal["applied", "dropped", "refused", "committed", "assigned"]


@dataclass
class Push:
    """One push as the server sees it; ``gradients`` has an entry (or None) for every parameter."""

    worker: int
    incarnation: int
    sequence: int
    base_version: int
    optimizer: int
    gradients: Sequence[Tensor | None]
    finite: bool = True
    leases: list[LeaseId] = field(default_factory=list)
    groups: list[dict[str, Any]] | None = None
    buffers: Sequence[Tensor] = ()
    base: Sequence[Tensor] = ()
    flat: Tensor | None = None  # the memory of `gradients`, where it is laid out as an `Arena`
    pull_seconds: float | None = None


@dataclass(frozen=True)
class LogEntry:
    """One applied push: enough to make the same step again, see `replay`.

    Attributes:
        worker: Who pushed.
        incarnation: How often it had been started before.
        sequence: Number of its push, from 1, per incarnation.
        base_version: Version of the parameters that the gradient belongs to.
        version: Version that the push made.
        optimizer: Which optimizer stepped.
        weight: Factor on its learning rate.
        scale: Factor on its gradients.
        reach: How far what was published after it looks ahead, see `LookAhead`.
        leases: Batches in the gradient, as (epoch, position).
        groups: Hyper-parameters of the optimizer in this step.
    """

    worker: int
    incarnation: int
    sequence: int
    base_version: int
    version: int
    optimizer: int
    weight: float
    leases: list[LeaseId]
    groups: list[dict[str, Any]]
    scale: float = 1.0
    reach: float = 0.0


class ParameterServer:
    """Parameters, buffers, optimizers, leases and counters of one run.

    Every change is one call made by one thread, so there is nothing to lock and nothing to tear.
    """

    def __init__(self, opening: Opening, settings: Settings) -> None:
        self.settings = settings
        self._hold_state(opening)
        self.version = opening.version
        self.steps = list(opening.steps) or [0] * len(opening.optimizers)
        self.leases = LeaseBook(block=settings.lease_batches)
        for epoch in opening.epochs:
            self.leases.begin(epoch["epoch"], epoch["units"], done=epoch["done"])
        self.log: list[LogEntry] = []
        self.incarnations: dict[int, int] = {}
        self.clocks: dict[int, int] = {}
        self.live = 0
        self.restarts = 0
        self.taken_over = 0
        self._oldest_base = 0  # pushes based on less are refused: the version was rolled back
        self._sequences: dict[int, int] = {}
        self._pushes: Counter[int] = Counter()
        self._outcomes: Counter[Outcome] = Counter()
        self._staleness: deque[int] = deque(maxlen=1000)
        self._times: deque[float] = deque(maxlen=1000)
        self._apply_seconds: deque[float] = deque(maxlen=100)
        self._pull_seconds: deque[float] = deque(maxlen=100)

    def _hold_state(self, opening: Opening) -> None:
        self.names = opening.names
        self.parameters = opening.parameters
        self.buffer_names = opening.buffer_names
        self.buffers = opening.buffers
        self.buffer_roles = opening.buffer_roles
        self.optimizers = opening.optimizers
        arena = Arena(self.parameters)
        self._flat = [FlatOptimizer(optimizer, self.parameters, arena) for optimizer in self.optimizers]
        self._begin_looking_ahead()
        nesterov = self.settings.outer == "delayed_nesterov"
        self._outer = OuterStep(self.settings.outer_momentum if nesterov else None)

    def _begin_looking_ahead(self) -> None:
        self._look_ahead: LookAhead | None = None
        if self.settings.staleness == "look_ahead" and not self.settings.local_steps:
            self._look_ahead = LookAhead(self.parameters, [flat.pieces for flat in self._flat], self.optimizers)

    def exchange(self, opening: Opening) -> None:
        """Go on with other parameters: layers of the model were replaced. Versions, steps and leases go on.

        Pushes of the layers that are no more must be given to `refuse`.
        """
        self._hold_state(opening)

    def state(self) -> Opening:
        """Return parameters, buffers and optimizers themselves, no copies."""
        for flat in self._flat:
            flat.scatter()
        return Opening(
            names=self.names,
            parameters=self.parameters,
            buffer_names=self.buffer_names,
            buffers=self.buffers,
            buffer_roles=self.buffer_roles,
            optimizers=self.optimizers,
            version=self.version,
            steps=list(self.steps),
            epochs=self.leases.state(),
        )

    def admit(self, worker: int, incarnation: int) -> None:
        """Let a worker in, at the clock of the slowest, so that a late-comer holds nobody up."""
        self.incarnations[worker] = incarnation
        self._sequences[worker] = 0
        self.clocks[worker] = min(self.clocks.values(), default=0)

    def dismiss(self, worker: int) -> int:
        """Take a worker out; returns how many leases it held, which are free again."""
        self.clocks.pop(worker, None)
        self.incarnations.pop(worker, None)
        return self.leases.revoke(worker)

    def apply(self, push: Push, *, from_coordinator: bool = True) -> Outcome:
        """Apply one push as a whole, or not at all.

        Refused: replayed or out of order, of an earlier incarnation, or with a lease that is somebody else's by now.
        Dropped: not finite (its batches count as seen), or too stale (its batches are given out again).
        """
        outcome = self._apply(push, from_coordinator)
        self._outcomes[outcome] += 1
        return outcome

    def refuse(self, push: Push) -> Outcome:
        """Count a push that came after the end, or for layers that are no more; its leases are free again."""
        self._sequences[push.worker] = push.sequence
        self.leases.give_back(push.worker, push.leases)
        self._outcomes["refused"] += 1
        return "refused"

    def _apply(self, push: Push, from_coordinator: bool) -> Outcome:
        if self.incarnations.get(push.worker) != push.incarnation:
            return "refused"
        if push.sequence != self._sequences[push.worker] + 1:
            return "refused"
        self._sequences[push.worker] = push.sequence
        if not self.leases.holds(push.worker, push.leases) or push.base_version < self._oldest_base:
            self.leases.give_back(push.worker, push.leases)
            return "refused"
        if push.pull_seconds is not None:
            self._pull_seconds.append(push.pull_seconds)
        self._take_buffers(push.buffers, from_coordinator)
        if push.groups is not None and from_coordinator and push.optimizer >= 0:
            set_groups(self.optimizers[push.optimizer], push.groups)
        if push.optimizer == NO_UPDATE or not push.finite:
            self.leases.commit(push.worker, push.leases)
            return "committed" if push.finite else "dropped"
        if push.optimizer in (ASSIGN, OVERWRITE):
            return self._assign(push)
        staleness = staleness_of(self.version, push.base_version)
        rule, beyond = self.settings.staleness, self.settings.drop_beyond
        weight = learning_rate_weight(staleness, rule=rule, threshold=beyond)
        if weight is None:
            self.leases.give_back(push.worker, push.leases)
            return "dropped"
        scale, reach = 1.0, 0.0
        began = time.perf_counter()
        if self._look_ahead is not None and push.optimizer >= 0:
            weight, scale = self._look_ahead.observe(push.optimizer, staleness, push.gradients)
            with self._look_ahead.stepping(push.optimizer):
                self._step(push, weight, scale)
                groups = self._logged_groups(push.optimizer)
            reach = self._look_ahead.reach
        else:
            self._step(push, weight, scale)
            groups = self._logged_groups(push.optimizer)
        self._apply_seconds.append(time.perf_counter() - began)
        self.version += 1
        self.leases.commit(push.worker, push.leases)
        self.clocks[push.worker] += 1
        self._pushes[push.worker] += 1
        self._staleness.append(staleness)
        self._times.append(time.monotonic())
        if self.settings.record_log:
            self.log.append(
                LogEntry(
                    worker=push.worker,
                    incarnation=push.incarnation,
                    sequence=push.sequence,
                    base_version=push.base_version,
                    version=self.version,
                    optimizer=push.optimizer,
                    weight=weight,
                    leases=list(push.leases),
                    groups=groups,
                    scale=scale,
                    reach=reach,
                )
            )
        return "applied"

    def _logged_groups(self, optimizer: int) -> list[dict[str, Any]]:
        return get_groups(self.optimizers[optimizer]) if self.settings.record_log and optimizer != OUTER else []

    def _step(self, push: Push, weight: float, scale: float) -> None:
        gradients = push.gradients
        if push.optimizer == OUTER:
            self._outer.apply(self.parameters, gradients, workers=max(1, self.live), weight=weight)
            for i in range(len(self.steps)):
                self.steps[i] += 1
            return
        memory = push.flat
        if self.settings.staleness == "delay_compensation" and push.base:
            memory = None
            strength = self.settings.compensation
            triples = zip(gradients, self.parameters, push.base, strict=True)
            gradients = [
                None if g is None else compensate_delay(g, p.detach(), b, strength=strength) for g, p, b in triples
            ]
        if scale != 1.0:
            memory = None
            gradients = [None if g is None else g * scale for g in gradients]
        self._flat[push.optimizer].step(gradients, weight=weight, flat=memory)
        self.steps[push.optimizer] += 1

    @torch.no_grad()
    def _assign(self, push: Push) -> Outcome:
        if push.optimizer == ASSIGN and push.base_version != self.version:
            return "refused"
        values = push.gradients if self._look_ahead is None else self._look_ahead.settle(push.gradients)
        for parameter, value in zip(self.parameters, values, strict=True):
            if value is not None:
                parameter.copy_(value)
        return "assigned"

    def _take_buffers(self, buffers: Sequence[Tensor], from_coordinator: bool) -> None:
        if buffers:
            take_buffers(
                self.buffers,
                buffers,
                self.buffer_roles,
                workers=max(1, self.live),
                from_coordinator=from_coordinator,
                averages=self.settings.buffers == "mean",
            )

    def published(self) -> list[Tensor]:
        """Return what workers read: the parameters, or a forecast of them with rule ``look_ahead``."""
        return [*self.parameters] if self._look_ahead is None else self._look_ahead.published()

    def snapshot(self) -> Snapshot:
        """Return a copy of everything, one consistent cut."""
        return Snapshot(
            version=self.version,
            steps=list(self.steps),
            parameters=[p.detach().clone() for p in self.parameters],
            buffers=[b.clone() for b in self.buffers],
            optimizer_states=[_copied(optimizer.state_dict()) for optimizer in self.optimizers],
            epochs=self.leases.state(),
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Put parameters, buffers and optimizer states back; versions go on counting.

        Pushes that are under way belong to parameters that are no more, and will be refused.
        """
        for parameter, value in zip(self.parameters, snapshot.parameters, strict=True):
            parameter.copy_(value)
        for buffer, value in zip(self.buffers, snapshot.buffers, strict=True):
            buffer.copy_(value)
        for flat, state in zip(self._flat, snapshot.optimizer_states, strict=True):
            flat.optimizer.load_state_dict(_copied(state))  # which keeps the tensors that it is given
            flat.forget()
        self._begin_looking_ahead()  # the last steps led to other parameters
        self.version += 1
        self._oldest_base = self.version

    def statistics(self) -> Statistics:
        """Return how the run goes."""
        span = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
        ordered = sorted(self._staleness)
        return Statistics(
            version=self.version,
            staleness_mean=statistics.fmean(ordered) if ordered else 0.0,
            staleness_p95=float(ordered[int(0.95 * (len(ordered) - 1))]) if ordered else 0.0,
            updates_per_second=(len(self._times) - 1) / span if span > 0 else 0.0,
            live_workers=self.live,
            dropped=self._outcomes["dropped"],
            taken_over=self.taken_over,
            refused=self._outcomes["refused"],
            restarts=self.restarts,
            apply_milliseconds=1e3 * statistics.median(self._apply_seconds or [0.0]),
            pull_milliseconds=1e3 * statistics.median(self._pull_seconds or [0.0]),
            worker_pushes=tuple(self._pushes[w] for w in range(max(self._pushes, default=-1) + 1)),
        )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value
