"""What a worker sees of the parameter server, whatever engine carries the bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.async_sgd.policy.buffers import Role
from lightning_accel.async_sgd.policy.leases import Lease, LeaseId
from lightning_accel.async_sgd.settings import Settings

PUSH_STAGES = ("before", "half-way", "before the flag", "after the flag", "after the bell", "acknowledged")
"""The named points of a push at which a worker may be killed; see the ``probe`` of `SharedMemoryStore`."""


@dataclass
class Opening:
    """What the coordinator brings to open a run, on CPU.

    Attributes:
        names: Of the parameters, in order.
        parameters: The module's parameters, each once.
        buffer_names: Of the buffers.
        buffers: The module's buffers.
        optimizers: Real optimizers over exactly these parameter objects, with their state.
        version: Optimizer steps made before (of an earlier run), all optimizers together.
        steps: The same for each optimizer.
        epochs: Unfinished epochs of an earlier run, see `LeaseBook.state`.
        buffer_roles: What becomes of each buffer, see `take_buffers`.
        autocast: Type that the worker's optimizer steps are cast to, as in manual optimization under ``bf16-mixed``;
            None where they are not. Optimizers that multiply matrices (Adafactor, Muon) step differently under it.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    buffer_names: list[str]
    buffers: list[Tensor]
    optimizers: list[Optimizer]
    version: int = 0
    steps: list[int] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    buffer_roles: list[Role] = field(default_factory=list)
    autocast: torch.dtype | None = None


@dataclass
class Snapshot:
    """One consistent cut of a run.

    Attributes:
        version: Optimizer steps applied, all optimizers together.
        steps: The same for each optimizer.
        parameters: In the order of `Opening.parameters`.
        buffers: In the order of `Opening.buffers`.
        optimizer_states: ``state_dict()`` of each optimizer.
        epochs: Unfinished epochs, see `LeaseBook.state`.
    """

    version: int
    steps: list[int]
    parameters: list[Tensor]
    buffers: list[Tensor]
    optimizer_states: list[dict[str, Any]]
    epochs: list[dict[str, Any]]


@dataclass(frozen=True)
class Membership:
    """What a worker learns on joining: its number, its incarnation and the epoch that is under way."""

    worker: int
    incarnation: int
    epoch: int


@dataclass(frozen=True)
class Statistics:
    """How a run goes.

    Attributes:
        version: Optimizer steps applied.
        staleness_mean: Over the last 1,000 pushes, in optimizer steps.
        staleness_p95: 95th percentile of the same.
        updates_per_second: Optimizer steps a second over the last 1,000.
        live_workers: Workers that have joined and neither left nor died.
        dropped: Pushes not applied because of NaN or Inf, or because they were too stale.
        taken_over: Batches that the coordinator took over from workers who held up the end of an epoch.
        refused: Pushes not applied because they were replayed, or their leases revoked.
        restarts: Workers started again.
        apply_milliseconds: Median time of one server step.
        pull_milliseconds: Median time of a worker's pull.
        worker_pushes: Applied pushes of each worker.
        lost_batches: Batches of the last epoch that nobody was left to train on.
        lost_versions: Steps that shards which died took with them, each of its own parameters; on one machine none.
    """

    version: int = 0
    staleness_mean: float = 0.0
    staleness_p95: float = 0.0
    updates_per_second: float = 0.0
    live_workers: int = 0
    dropped: int = 0
    taken_over: int = 0
    refused: int = 0
    restarts: int = 0
    apply_milliseconds: float = 0.0
    pull_milliseconds: float = 0.0
    worker_pushes: tuple[int, ...] = ()
    lost_batches: int = 0
    lost_versions: int = 0


Activity = Literal["load", "step"]
"""What a worker does in the middle of a batch: it loads one, or makes a training step of it."""

MoreUnits = Callable[[int], tuple[Sequence[Any], bool]]
"""Given how many units of an order are known: at least one of those that follow, and whether these are the last."""


class ParameterStore(Protocol):
    """A worker's side of a run, whatever engine carries the bytes. All that `Worker` and the strategies use of one.

    Calls block until the server has answered, unless said otherwise. Numbers of leases, versions and steps mean the
    same in every engine, see `lightning_accel.async_sgd.policy`.
    """

    # --- who this is, and who else is there: none of these blocks

    @property
    def worker(self) -> int:
        """Number of this worker, from 0."""
        ...

    @property
    def incarnation(self) -> int:
        """How often this worker was started before."""
        ...

    @property
    def settings(self) -> Settings:
        """Of the run."""
        ...

    @property
    def is_coordinator(self) -> bool:
        """Whether this worker is the one that validates, checkpoints and reports. Changes if the other one dies."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether the run is over for everybody."""
        ...

    @property
    def live_workers(self) -> int:
        """Workers taking part."""
        ...

    # --- membership

    def join(self, opening: Callable[[], Opening]) -> Membership:
        """Enter the run; the coordinator of a run not yet open is asked for the ``opening``."""
        ...

    def check(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Compare this worker's tensors with those the run was opened with.

        Raises:
            ValueError: If number, shape or dtype differ.
        """
        ...

    def idle(self, idle: bool) -> None:
        """Say that this worker does something else for a while (validates): nobody waits for its pushes."""
        ...

    def begin(self, activity: Activity) -> None:
        """Say that a load or a step begins, without waiting. One that lasts far too long is taken for hung."""
        ...

    def rest(self) -> None:
        """Say that it has ended, and that what follows may take any time."""
        ...

    def finish(self) -> bool:
        """Say that this worker has ended its training; returns whether it coordinates, which no longer changes."""
        ...

    def stop(self, *, complete: bool = False) -> None:
        """End the run for everybody: from now on only the coordinator's pushes count.

        ``complete`` says that all epochs should be through; if some batches are not, the run goes on with them, and
        this waits for those who train on them, so that what is read next has their steps.
        """
        ...

    def leave(self, *, stop: bool = False) -> None:
        """Go; with ``stop`` the run ends for everybody, once every batch that was begun is done."""
        ...

    # --- parameters and gradients

    def pull(self, parameters: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> tuple[int, list[int]]:
        """Copy the latest parameters and buffers (None: not wanted) in place; returns version and optimizers' steps."""
        ...

    def push(
        self,
        gradients: Sequence[Tensor | None],
        *,
        optimizer: int,
        leases: Sequence[LeaseId] = (),
        groups: list[dict[str, Any]] | None = None,
        buffers: Sequence[Tensor] = (),
        base: Sequence[Tensor] = (),
    ) -> int:
        """Hand over gradients of all parameters (None: not of this optimizer, or no gradient), without waiting.

        Returns the number of the push, for `wait_for`.
        """
        ...

    def wait_for(self, sequence: int) -> bool:
        """Wait until push ``sequence`` has been dealt with; for the last one, returns whether it was not refused."""
        ...

    def wait_for_slack(self) -> None:
        """Wait until this worker is no more than ``max_staleness`` pushes ahead of the slowest."""
        ...

    # --- data

    def lease(
        self,
        epoch: int,
        order: Callable[[], Sequence[Any]],
        *,
        final: bool = False,
        more: MoreUnits | None = None,
    ) -> list[Lease]:
        """Take the next block of the epoch; empty at its end.

        Args:
            epoch: That this worker is in.
            order: Asked for all units of the epoch, if nobody was yet.
            final: Whether this is the last epoch.
            more: Of an order without a length: asked for its units piece by piece, in the place of ``order``.
        """
        ...

    def give_back(self, leases: Sequence[LeaseId]) -> None:
        """Free leases that this worker will not train on, without waiting; others get them."""
        ...

    def commit(self, leases: Sequence[LeaseId]) -> None:
        """Mark leases as done that no push carries, without waiting."""
        ...

    # --- what a run shares beside parameters

    def kv(self, key: str, value: bytes | None = None, *, replace: bool = False, wait: bool = True) -> bytes | None:
        """Write ``key`` once (later writes change nothing, but for ``replace``) and return what it holds.

        Without ``value``: wait until somebody wrote it, or return None at once with ``wait=False``.
        """
        ...

    def snapshot(self) -> Snapshot:
        """Return one consistent cut."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Put parameters, buffers and optimizer states back; pushes based on what was before are refused."""
        ...

    def statistics(self) -> Statistics:
        """Return how the run goes."""
        ...

    def deliver(self, descriptor: int) -> None:
        """Hand an open file (large values of this worker's result) over to the process that called for the run."""
        ...

    # --- an exchange of layers

    @property
    def is_current(self) -> bool:
        """Whether the run still has the parameters that were joined; False once layers were exchanged."""
        ...

    @property
    def parameter_names(self) -> list[str]:
        """Names of the run's parameters, in order."""
        ...

    def hold(self) -> Snapshot:
        """Return a cut that stays the latest until `exchange` or `let_go`: pushes of the others wait."""
        ...

    def let_go(self) -> None:
        """End `hold` without an exchange."""
        ...

    def exchange(self, opening: Opening) -> None:
        """Put other parameters and optimizers in the place of the run's; the others see `is_current` and `rejoin`."""
        ...

    def rejoin(self) -> None:
        """Take part with the parameters that the run has now, under the same number."""
        ...
