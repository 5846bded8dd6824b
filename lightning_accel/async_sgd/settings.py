"""Every knob of an asynchronous run, checked in one place."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from lightning_accel.arguments import check_choice, check_integer, check_number, check_switch
from lightning_accel.async_sgd.policy.encoding.compression import Compression
from lightning_accel.async_sgd.policy.rules import STALENESS_RULES, StalenessRule

Buffers = Literal["mean", "coordinator", "recompute"]
Outer = Literal["mean", "delayed_nesterov", "nesterov"]
Validate = Literal["coordinator", "pause"]


@dataclass(frozen=True)
class Settings:
    """Settings of one run, the same for server and workers.

    Args:
        n_push: Optimizer steps of a worker between two pushes; the mean of their gradients is pushed, >= 1.
        n_fetch: Optimizer steps of a worker between two pulls, >= 1.
        local_steps: Steps that a worker takes on its own copy, with its own optimizer, before it pushes the way it
            has gone; 0 for pushing gradients. Excludes ``n_push`` and ``n_fetch`` above 1.
        outer: What the server does with such ways: ``mean`` adds each with weight 1 / live workers;
            ``delayed_nesterov`` adds momentum once in as many pushes as there are live workers; ``nesterov`` makes a
            step with Nesterov momentum of each round, and needs ``min_workers``. See `OuterStep`.
        outer_momentum: Of the two with momentum, in [0, 1).
        outer_rate: Factor on every outer step, > 0. Below 1 with momentum, which adds up to 1 / (1 - momentum).
        min_workers: Of ``local_steps``: how many workers have to push before their ways count, all together as one
            outer step, each by its part of the samples; those who have pushed wait for that. 0: no rounds, each way
            counts when it comes. Of workers that are gone or have no more batches, nobody waits for any.
        round_grace: Seconds that a round with so many workers waits for the others, >= 0; who comes later is in the
            next one. Infinite: until all are there.
        overlap: Whether a worker goes on with its next batch while its push is applied, so that it never waits for
            the server; its gradients are then up to one step of its own older.
        staleness: Rule for gradients of older parameters. ``look_ahead``: workers compute on a forecast of the
            parameters, see `LookAhead`; the others, see `learning_rate_weight`.
        drop_beyond: Largest staleness that rule ``drop`` applies, in optimizer steps, >= 0.
        compensation: Strength of ``delay_compensation``, >= 0.
        max_staleness: Pushes that the fastest worker may be ahead of the slowest; None for no bound.
        warm_start_steps: Server steps that the coordinator makes alone at the start, >= 0.
        cooldown_steps: Batches at the end of the last epoch that only the coordinator is given, >= 0: once the others
            have pushed what they still held when it began them, its gradients have no staleness. A run that ends by
            ``max_steps``, by time or early has no such end.
        lease_batches: Most batches a worker takes at once, >= 1.
        buffers: ``mean``: float buffers (batch norm) move by 1 / live workers towards each pusher's, and all pull
            them; ``coordinator``: the coordinator's count, the others keep their own; ``recompute``: the same, and
            before validation and at the end the statistics of batch norm are computed anew for the parameters of that
            moment, from the last batches that the coordinator trained on.
        validate: ``coordinator``: the others train on while the coordinator validates; ``pause``: they wait.
        compression: Of pushes, with error feedback.
        max_restarts: How often a worker that died is started again, each, >= 0.
        heartbeat_seconds: Silence after which a worker whose process is stopped is ended and its leases go to others,
            > 0. One that is silent because a call into C holds the interpreter is not stopped, see ``stall_seconds``.
        straggler_grace: Seconds that the end of an epoch waits for batches which other workers still hold, >= 0; then
            the coordinator takes them over one by one, and what their holders push for them is refused. The same after
            the end of training, for workers that still train.
        stall_seconds: Time without progress after which a worker in the middle of a batch (loading one, or in its
            step) is ended and replaced, > 0. None: twenty times its longest step or load so far, at least 30 s for a
            step and 300 s for a load, ten times that while its process computes, and no limit before its first one.
        record_log: Whether the server keeps the log that `replay` needs.
        optimizer_device: Where the server's optimizers step and keep parameters and states: ``cpu``, or a CUDA device
            (``cuda:0``), for optimizers of `torch.optim`.

    Raises:
        TypeError: If a value is of another kind, such as text for a number.
        ValueError: If a value is out of its range or two exclude each other.

    Example:
        >>> from lightning_accel.async_sgd import Settings
        >>> Settings(n_push=4).staleness
        'look_ahead'
    """

    n_push: int = 1
    n_fetch: int = 1
    local_steps: int = 0
    outer: Outer = "mean"
    outer_momentum: float = 0.9
    outer_rate: float = 1.0
    min_workers: int = 0
    round_grace: float = 1.0
    overlap: bool = False
    staleness: StalenessRule = "look_ahead"
    drop_beyond: int = 16
    compensation: float = 0.04
    max_staleness: int | None = None
    warm_start_steps: int = 0
    cooldown_steps: int = 0
    lease_batches: int = 4
    buffers: Buffers = "mean"
    validate: Validate = "coordinator"
    compression: Compression = field(default_factory=Compression)
    max_restarts: int = 3
    heartbeat_seconds: float = 30.0
    straggler_grace: float = 5.0
    stall_seconds: float | None = None
    record_log: bool = False
    optimizer_device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            check_integer(name, getattr(self, name), at_least=least)
        check_integer("max_staleness", self.max_staleness, at_least=0, optional=True)
        check_number("compensation", self.compensation, at_least=0.0)
        check_number("heartbeat_seconds", self.heartbeat_seconds, above=0.0, infinite=True)
        check_number("straggler_grace", self.straggler_grace, at_least=0.0, infinite=True)
        check_number("stall_seconds", self.stall_seconds, above=0.0, optional=True, infinite=True)
        check_number("outer_momentum", self.outer_momentum, at_least=0.0, below=1.0)
        check_number("outer_rate", self.outer_rate, above=0.0)
        check_number("round_grace", self.round_grace, at_least=0.0, infinite=True)
        for name in ("overlap", "record_log"):
            check_switch(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_device("optimizer_device", self.optimizer_device)
        if self.local_steps and max(self.n_push, self.n_fetch) > 1:
            raise ValueError("`local_steps` already says when to push and pull; leave `n_push` and `n_fetch` at 1.")
        if self.local_steps and self.overlap:
            raise ValueError("with `local_steps` a push is waited for; leave `overlap` off, or push gradients.")
        if self.local_steps and self.staleness == "delay_compensation":
            raise ValueError("`delay_compensation` needs gradients; choose another `staleness` with `local_steps`.")
        self._check_rounds()

    def check_workers(self, workers: int) -> None:
        """Refuse what so many workers cannot do.

        Raises:
            ValueError: If rounds wait for more workers than there are.
        """
        if self.min_workers > workers:
            raise ValueError(f"`min_workers` must be <= the number of workers {workers}, got {self.min_workers}.")

    def _check_rounds(self) -> None:
        if not self.min_workers:
            if self.outer == "nesterov":
                raise ValueError("`outer='nesterov'` steps once a round; say with `min_workers` when one closes.")
            return
        if not self.local_steps:
            raise ValueError("rounds are of local steps; set `local_steps` with `min_workers`, or leave it at 0.")
        if self.outer == "delayed_nesterov":
            raise ValueError("`delayed_nesterov` is for ways that come one by one; use `outer='nesterov'` with rounds.")
        if self.max_staleness is not None:
            raise ValueError("rounds keep workers together already; leave `max_staleness` out with `min_workers`.")


def check_device(name: str, value: object) -> None:
    """Check that ``value`` names the host or a CUDA device.

    Raises:
        TypeError: If it is no text.
        ValueError: If it names another kind of device, or none.
    """
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a text such as 'cpu' or 'cuda:0', got {value!r}.")
    try:
        kind = torch.device(value).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"`{name}` must be 'cpu' or a CUDA device such as 'cuda:0', got {value!r}.")


_LEAST: dict[str, int] = {
    "n_push": 1,
    "n_fetch": 1,
    "local_steps": 0,
    "min_workers": 0,
    "drop_beyond": 0,
    "warm_start_steps": 0,
    "cooldown_steps": 0,
    "lease_batches": 1,
    "max_restarts": 0,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "staleness": STALENESS_RULES,
    "outer": get_args(Outer),
    "buffers": get_args(Buffers),
    "validate": get_args(Validate),
}
