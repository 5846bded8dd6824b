"""A push as the server sees it, and what its log keeps of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lightning_accel.async_sgd.policy.leases import LeaseId

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
