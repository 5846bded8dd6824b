"""What one simulated worker holds: batches, parameters, and gradients that are in no push yet."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.async_sgd.policy.encoding.compression import ErrorFeedback
from lightning_accel.async_sgd.policy.leases import Lease, LeaseId
from lightning_accel.async_sgd.policy.pushes import OUTER, Push
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.simulation.clock import Then
from lightning_accel.async_sgd.simulation.training import Nothing, Training


@dataclass
class SimulatedWorker:
    """One worker: what `Sharing` asks of a member, and what `Worker` keeps.

    Attributes:
        worker: Its number.
        seconds: Of a step.
        settings: Of the run.
        training: Of the run.
        leases: Batches that it has not begun.
        pending: Batches that are in no push yet.
        count: Steps that are in no push yet.
        since_pull: Steps since it has read the parameters.
        unanswered: Pushes that the server has not dealt with.
        blocked: What it goes on with once the server has dealt with one.
    """

    worker: int
    seconds: float
    settings: Settings
    training: Training | Nothing
    epoch: int = 0
    leased_epoch: int = -1
    idle: bool = False
    active: bool = True
    leases: deque[Lease] = field(default_factory=deque)
    pending: list[LeaseId] = field(default_factory=list)
    count: int = 0
    since_pull: int = 0
    unanswered: int = 0
    blocked: Then | None = None
    _version: int = 0
    _values: Sequence[Tensor] = ()  # that it computes on
    _base: Sequence[Tensor] = ()  # as they were read, where it steps on its own
    _sums: Sequence[Tensor | None] = ()
    _sequence: int = 0
    _optimizer: Optimizer | None = None
    _feedback: ErrorFeedback | None = None

    @torch.no_grad()
    def read(self, server: ParameterServer) -> None:
        """Take the parameters in that the server publishes now."""
        self._version, self.since_pull = server.version, 0
        published = [p.detach().clone() for p in server.published()]
        if not self.settings.local_steps:
            self._values = published
            return
        if self._optimizer is None:
            self._values, self._optimizer = self.training.own_copy()
        self._base = published
        for value, read in zip(self._values, published, strict=True):
            value.copy_(read)

    def train(self, batch: object) -> None:
        """Compute a batch's gradient where this worker's parameters are, and step or sum up."""
        gradients = self.training.gradients(self._values, batch)
        self.count += 1
        if self._optimizer is not None:
            for value, gradient in zip(self._values, gradients, strict=True):
                value.grad = gradient
            self._optimizer.step()
        elif self.count == 1:
            self._sums = gradients
        else:
            pairs = zip(self._sums, gradients, strict=True)
            self._sums = [b if a is None else a if b is None else a + b for a, b in pairs]

    @property
    def push_is_due(self) -> bool:
        """Whether it has made all steps between two pushes."""
        return self.count >= (self.settings.local_steps or self.settings.n_push)

    @property
    def waits(self) -> bool:
        """Whether a pull follows the push that is due, and must see it."""
        settings = self.settings
        return bool(settings.local_steps) or (self.since_pull + 1 >= settings.n_fetch and not settings.overlap)

    def take_push(self) -> Push:
        """Return what is to be pushed, and begin anew."""
        gradients, count = self._sums, self.count
        if self.settings.local_steps:
            gradients = [base - p.detach() for base, p in zip(self._base, self._values, strict=True)]
        elif count > 1:
            gradients = [None if g is None else g / count for g in gradients]
        finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
        if finite and self.settings.compression.name != "none":
            self._feedback = feedback = self._feedback or ErrorFeedback(self.settings.compression)
            gradients = [None if g is None else feedback.sent(i, g) for i, g in enumerate(gradients)]
        self._sums, self.count = (), 0
        self._sequence += 1
        leases, self.pending = self.pending, []
        return Push(
            worker=self.worker,
            incarnation=0,
            sequence=self._sequence,
            base_version=self._version,
            optimizer=OUTER if self.settings.local_steps else 0,
            gradients=gradients,
            finite=finite,
            leases=leases,
            base=self._values if self.settings.staleness == "delay_compensation" else (),
        )
