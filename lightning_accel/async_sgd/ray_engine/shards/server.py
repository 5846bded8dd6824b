"""The server of a run whose parameters lie on shards: it decides, they compute.

Leases, sequences, staleness rules and what counts are `ParameterServer`'s own; a step becomes a command to every
shard. Commands go out in one order, so all shards are at one version whenever they have done the same number of them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.async_sgd.optimizer_steps import SentGroups
from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.look_ahead import LookAhead
from lightning_accel.async_sgd.policy.optimizer_copy import copy_optimizers, dumps
from lightning_accel.async_sgd.policy.pushes import ASSIGN, OUTER, Outcome, Push
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.ray_engine.messages import to_plain
from lightning_accel.async_sgd.ray_engine.shards.layout import Layout, can_be_split, places_of_groups, share_out, split
from lightning_accel.async_sgd.ray_engine.shards.shard import Step
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.store import Opening, Snapshot


class Commands(Protocol):
    """Who carries commands to the shards, each to all of them, in order."""

    def open(self, parts: Sequence[bytes], version: int) -> None:
        """Let the shards, one a part, hold these parameters from now on."""
        ...

    def step(self, step: Step) -> None:
        """Let all shards make a step."""
        ...

    def forget(self, worker: int) -> None:
        """Let all shards forget the pushes of a worker that is gone."""
        ...


class _Decisions(LookAhead):
    """Knows staleness and norms, and no tensors: the forecast is made where the parameters are.

    Args:
        optimizers: Without parameters that have values.
        before: Called with the optimizer of each step, before its hyper-parameters are those of this rule.
    """

    def __init__(self, optimizers: Sequence[Optimizer], before: Callable[[int], None]) -> None:
        super().__init__([], [[] for _ in optimizers], optimizers)
        self._before_step = before

    @contextlib.contextmanager
    def stepping(self, optimizer: int) -> Iterator[None]:
        """Give an optimizer the hyper-parameters of this rule within, for the log."""
        self._before_step(optimizer)
        with super().stepping(optimizer):
            yield

    def _begin_step(self, optimizer: int) -> None:
        """Nothing to remember here."""

    def _end_step(self, optimizer: int) -> None:
        self.reach = self._reach(optimizer)

    def settle(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Forecast no more: who changes parameters between steps wants them to be what they were made."""
        self._forecasts = False
        return list(values)


class ShardedServer(ParameterServer):
    """Decide on pushes whose gradients lie on shards.

    A push has the norm of its gradients in the place of them.

    Args:
        opening: Of the run.
        settings: Of the run.
        commands: To the shards.
        shards: How many there are at most; one, if an optimizer might treat parameters together.
    """

    _look_ahead: _Decisions | None

    def __init__(self, opening: Opening, settings: Settings, commands: Commands, *, shards: int) -> None:
        self._commands = commands
        self._most_shards = shards
        self.layout: Layout = []
        self.order: list[list[list[int]]] = []
        super().__init__(opening, settings)

    def _hold_state(self, opening: Opening) -> None:
        self.names = opening.names
        self.buffer_names = opening.buffer_names
        self.buffers = opening.buffers
        self.buffer_roles = opening.buffer_roles
        self.specs = [TensorSpec.of(n, p) for n, p in zip(opening.names, opening.parameters, strict=True)]
        together = 1 if not can_be_split(opening.optimizers) else self._most_shards
        self.layout = share_out(opening.parameters, together)
        self.order = places_of_groups(opening)
        self._commands.open([dumps(part) for part in split(opening, self.layout)], opening.version)
        # of the same shapes and without memory: for hyper-parameters and questions about an optimizer
        self.parameters = [
            nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in opening.parameters
        ]
        for optimizer in opening.optimizers:
            optimizer.state.clear()
        places: dict[int, Tensor] = {id(p): m for p, m in zip(opening.parameters, self.parameters, strict=True)}
        self.optimizers = copy_optimizers(opening.optimizers, places)
        self._known_groups = [SentGroups(optimizer) for optimizer in self.optimizers]
        self._begin_looking_ahead()

    def _begin_looking_ahead(self) -> None:
        self._look_ahead = None
        if self.settings.staleness == "look_ahead" and not self.settings.local_steps:
            self._look_ahead = _Decisions(self.optimizers, self._take_groups)

    def dismiss(self, worker: int) -> int:
        """Take a worker out; returns how many leases it held, which are free again."""
        self._commands.forget(worker)
        return super().dismiss(worker)

    def shard_lost(self) -> None:
        """Go on after a shard went back to an earlier version: what is based on parameters of before is refused."""
        self._begin_looking_ahead()
        self.version += 1
        self._oldest_base = self.version

    def _step(self, push: Push, weight: float, scale: float, *, closes: bool = True) -> None:
        if push.optimizer == OUTER:
            self.steps = [steps + 1 for steps in self.steps]
        else:
            self.steps[push.optimizer] += 1
        if self._look_ahead is None or push.optimizer < 0:
            self._take_groups(push.optimizer)
        groups = self._changed_groups
        self._command(push, weight=weight, scale=scale, version=self.version + 1, groups=groups, closes=closes)

    def _take_groups(self, optimizer: int) -> None:
        """Note which hyper-parameters of an optimizer the shards do not know yet."""
        self._changed_groups = self._known_groups[optimizer].take() if optimizer >= 0 else None

    def _assign(self, push: Push) -> Outcome:
        if push.optimizer == ASSIGN and push.base_version != self.version:
            return "refused"
        if self._look_ahead is not None:
            self._look_ahead.settle([])
        self._command(push, version=self.version)
        return "assigned"

    def _command(
        self,
        push: Push,
        *,
        version: int,
        weight: float = 1.0,
        scale: float = 1.0,
        groups: Any = None,
        closes: bool = True,
    ) -> None:
        ahead = self._look_ahead if push.optimizer >= 0 else None
        self._commands.step(
            Step(
                worker=push.worker,
                incarnation=push.incarnation,
                sequence=push.sequence,
                optimizer=push.optimizer,
                version=version,
                weight=weight,
                scale=scale,
                staleness=0.0 if ahead is None else ahead.mean_staleness(push.optimizer),
                live=max(1, self.live),
                groups=None if groups is None else to_plain(groups),
                closes=closes,
            )
        )

    def published(self) -> list[Tensor]:
        """Return what workers read of the head itself: nothing, parameters come from the shards."""
        return []

    def head_of_cut(self) -> Snapshot:
        """Return what the head has of a cut: all but parameters and optimizer states."""
        return Snapshot(
            version=self.version,
            steps=list(self.steps),
            parameters=[],
            buffers=[b.clone() for b in self.buffers],
            optimizer_states=[],
            epochs=self.leases.state(),
        )

    def state(self) -> Opening:
        """Return what the head has of the run's state: no values of parameters, no optimizer states."""
        return Opening(
            names=self.names,
            parameters=[],
            buffer_names=self.buffer_names,
            buffers=self.buffers,
            buffer_roles=self.buffer_roles,
            optimizers=[],
            version=self.version,
            steps=list(self.steps),
            epochs=self.leases.state(),
        )

    def snapshot(self) -> Snapshot:
        """Return what the head has of a cut, see `head_of_cut`."""
        return self.head_of_cut()

    def take_back(self, snapshot: Snapshot, parts: Sequence[bytes]) -> None:
        """Put the state of an earlier cut back; versions go on counting, and pushes under way will be refused."""
        for buffer, value in zip(self.buffers, snapshot.buffers, strict=True):
            buffer.copy_(value)
        self.shard_lost()
        self._commands.open(parts, self.version)
