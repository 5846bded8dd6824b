"""The state that workers share and the one place that changes it; knows nothing of processes or memory."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.optimizer_side import OptimizerSide, on_host
from lightning_accel.async_sgd.policy.buffers import take_buffers
from lightning_accel.async_sgd.policy.counts import Counts
from lightning_accel.async_sgd.policy.flat_optimizer import Arena, FlatOptimizer
from lightning_accel.async_sgd.policy.leases import LeaseBook
from lightning_accel.async_sgd.policy.look_ahead import LookAhead
from lightning_accel.async_sgd.policy.outer.outer_step import OuterStep
from lightning_accel.async_sgd.policy.outer.rounds import Rounds, shares_of
from lightning_accel.async_sgd.policy.pushes import ASSIGN, NO_UPDATE, OUTER, OVERWRITE, LogEntry, Outcome, Push
from lightning_accel.async_sgd.policy.rules import compensate_delay, learning_rate_weight, staleness_of
from lightning_accel.async_sgd.policy.stepping import get_groups, set_groups
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.store import Opening, Snapshot, Statistics


class ParameterServer:
    """Parameters, buffers, optimizers, leases and counters of one run.

    Every change is one call made by one thread, so there is nothing to lock and nothing to tear.
    """

    def __init__(self, opening: Opening, settings: Settings) -> None:
        self.settings = settings
        self._side = OptimizerSide(torch.device("cpu"), [], [])
        self._hold_state(opening)
        self.version = opening.version
        self._autocast = opening.autocast
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
        self._counts = Counts()
        self.rounds = Rounds(settings) if settings.min_workers else None

    def _hold_state(self, opening: Opening) -> None:
        self.names = opening.names
        self.parameters = opening.parameters
        self.buffer_names = opening.buffer_names
        self.buffers = opening.buffers
        self.buffer_roles = opening.buffer_roles
        self.optimizers = opening.optimizers
        self._side.close()
        self._side = OptimizerSide(torch.device(self.settings.optimizer_device), self.parameters, self.optimizers)
        arena = Arena(self.parameters)
        self._side.know_spans(arena.spans)
        self._flat = [FlatOptimizer(optimizer, self.parameters, arena) for optimizer in self.optimizers]
        self._begin_looking_ahead()
        settings = self.settings
        self._outer = OuterStep(settings.outer, momentum=settings.outer_momentum, rate=settings.outer_rate)

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
        """Return parameters, buffers and optimizers themselves, no copies, on the host: no push can follow."""
        for flat in self._flat:
            flat.scatter()
        self._side.leave()
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
            autocast=self._autocast,
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
        outcome = self._apply(self._side.received(push), from_coordinator)
        self._counts.outcomes[outcome] += 1
        return outcome

    def apply_round(self, pushes: Sequence[Push], *, coordinator: int) -> list[Outcome]:
        """Apply the ways of one round as one outer step; returns what became of each.

        Each is refused or dropped as by `apply`. Staleness counts rounds here: 0 for who has read what the last one led
        to. The version rises by one for each way, as without rounds.

        Args:
            pushes: Of local steps, one a worker, in the order of the workers.
            coordinator: Number of the worker whose buffers count.
        """
        assert self.rounds is not None, "a run without `min_workers` has no rounds"
        began = time.perf_counter()
        outcomes: list[Outcome] = []
        counting: list[tuple[Push, int, float]] = []
        for push in map(self._side.received, pushes):
            decided, staleness, weight = self._decide(push, push.worker == coordinator)
            outcomes.append(decided or "applied")
            if decided is None:
                counting.append((push, staleness, weight))
        sizes = [self.leases.samples(push.leases) for push, _, _ in counting]
        shares = shares_of(sizes, [weight for _, _, weight in counting])
        for i, ((push, staleness, _), share) in enumerate(zip(counting, shares, strict=True)):
            self._step(push, share, 1.0, closes=i + 1 == len(counting))
            self._take_note(push, staleness, weight=share)
        if counting:
            self._counts.took(began)
        self.rounds.closed(self.version)
        self._counts.outcomes.update(outcomes)
        return outcomes

    def refuse(self, push: Push) -> Outcome:
        """Count a push that came after the end, or for layers that are no more; its leases are free again."""
        self._sequences[push.worker] = push.sequence
        self.leases.give_back(push.worker, push.leases)
        self._counts.outcomes["refused"] += 1
        return "refused"

    def _apply(self, push: Push, from_coordinator: bool) -> Outcome:
        outcome, staleness, weight = self._decide(push, from_coordinator)
        if outcome is not None:
            return outcome
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
        self._counts.took(began)
        self._take_note(push, staleness, weight=weight, scale=scale, reach=reach, groups=groups)
        return "applied"

    def _decide(self, push: Push, from_coordinator: bool) -> tuple[Outcome | None, int, float]:
        """Return what becomes of a push, None if it makes a step; then its staleness and its weight."""
        if self.incarnations.get(push.worker) != push.incarnation:
            return "refused", 0, 0.0
        if push.sequence != self._sequences[push.worker] + 1:
            return "refused", 0, 0.0
        self._sequences[push.worker] = push.sequence
        if not self.leases.holds(push.worker, push.leases) or push.base_version < self._oldest_base:
            self.leases.give_back(push.worker, push.leases)
            return "refused", 0, 0.0
        self._counts.pulled(push.pull_seconds)
        self._take_buffers(push.buffers, from_coordinator)
        if push.groups is not None and from_coordinator and push.optimizer >= 0:
            set_groups(self.optimizers[push.optimizer], push.groups)
        if push.optimizer == NO_UPDATE or not push.finite:
            self.leases.commit(push.worker, push.leases)
            return ("committed" if push.finite else "dropped"), 0, 0.0
        if push.optimizer in (ASSIGN, OVERWRITE):
            return self._assign(push), 0, 0.0
        staleness = staleness_of(self.version, push.base_version)
        if self.rounds is not None and push.optimizer == OUTER:
            staleness = self.rounds.staleness_of(push.base_version)
        rule, beyond = self.settings.staleness, self.settings.drop_beyond
        weight = learning_rate_weight(staleness, rule=rule, threshold=beyond)
        if weight is None:
            self.leases.give_back(push.worker, push.leases)
            return "dropped", 0, 0.0
        return None, staleness, weight

    def _take_note(
        self,
        push: Push,
        staleness: int,
        *,
        weight: float,
        scale: float = 1.0,
        reach: float = 0.0,
        groups: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Count a push that was applied, and log it."""
        self.version += 1
        self.leases.commit(push.worker, push.leases)
        self.clocks[push.worker] += 1
        self._counts.applied(push.worker, staleness)
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
                    groups=list(groups),
                    scale=scale,
                    reach=reach,
                )
            )

    def _logged_groups(self, optimizer: int) -> list[dict[str, Any]]:
        return get_groups(self.optimizers[optimizer]) if self.settings.record_log and optimizer != OUTER else []

    def _step(self, push: Push, weight: float, scale: float, *, closes: bool = True) -> None:
        """Make a step; ``closes`` says whether the way is the last of its round."""
        gradients = push.gradients
        if push.optimizer == OUTER:
            self.steps = [steps + 1 for steps in self.steps]
            if self.rounds is None:
                self._outer.apply(self.parameters, gradients, workers=max(1, self.live), weight=weight)
                return
            self._outer.gather(self.parameters, gradients, share=weight)
            if closes:
                self._outer.close(self.parameters)
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
        with contextlib.nullcontext() if self._autocast is None else torch.autocast("cpu", self._autocast):
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
        """Return what workers read, on the host: the parameters, or a forecast of them with rule ``look_ahead``."""
        return self._side.published(self.parameters if self._look_ahead is None else self._look_ahead.published())

    def snapshot(self) -> Snapshot:
        """Return a copy of everything, one consistent cut."""
        return Snapshot(
            version=self.version,
            steps=list(self.steps),
            parameters=[on_host(p.detach()) for p in self.parameters],
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
        return self._counts.statistics(
            version=self.version, live_workers=self.live, restarts=self.restarts, taken_over=self.taken_over
        )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return on_host(value)
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value
