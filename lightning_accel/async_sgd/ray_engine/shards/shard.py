"""One shard of a run: some of the parameters and the optimizers over them, in a process of its own.

It takes gradients from workers, checks and keeps them, and uses them when the head of the run says so. The head's
commands come one after another, so all shards make the same steps in the same order, and what is read between two
commands is of one version. The arithmetic is `ParameterServer`'s.
"""

import pickle
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.encoding.wire import MalformedMessageError, Registered, decode_push, encode_values
from lightning_accel.async_sgd.policy.optimizer_copy import dumps
from lightning_accel.async_sgd.policy.pushes import ASSIGN, OUTER, OVERWRITE, Push
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.policy.stepping import set_groups
from lightning_accel.async_sgd.ray_engine.messages import from_plain
from lightning_accel.async_sgd.ray_engine.shards.layout import pack_cut
from lightning_accel.async_sgd.ray_engine.whereabouts import Whereabouts
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.store import Opening

_KEPT_PUSHES = 2  # of one worker: who is two ahead waits


@dataclass(frozen=True)
class Step:
    """What the head has decided about a push.

    Attributes:
        worker: Who pushed.
        incarnation: How often it was started before.
        sequence: Number of its push.
        optimizer: Which one steps, or one of the numbers in `policy.server`.
        version: Of the run after this step.
        weight: Factor on the learning rate.
        scale: Factor on the gradients.
        staleness: Mean staleness of the optimizer, by which rule ``look_ahead`` steps and forecasts.
        live: Live workers.
        groups: Hyper-parameters that a schedule has changed, as `to_plain` has them.
        closes: Whether this is no way of a round, or the last one of it; before that nobody reads or saves.
    """

    worker: int
    incarnation: int
    sequence: int
    optimizer: int
    version: int
    weight: float = 1.0
    scale: float = 1.0
    staleness: float = 0.0
    live: int = 1
    groups: Any = None
    closes: bool = True


@dataclass(frozen=True)
class Deposit:
    """What a shard found in a push.

    Attributes:
        square: Sum of the squares of the gradients, in double precision.
        finite: Whether all of it is.
        known: Whether it is for the layers that the shard has; else nothing was kept.
    """

    square: float = 0.0
    finite: bool = True
    known: bool = True


class _Arithmetic(ParameterServer):
    """Makes the steps that somebody else has decided on."""

    def make(self, step: Step, push: Push) -> None:
        """Make one step."""
        self.live = step.live
        if step.optimizer in (ASSIGN, OVERWRITE):
            self._assign(replace(push, optimizer=OVERWRITE))  # whether it counts, the head has decided
            return
        if step.groups is not None:
            set_groups(self.optimizers[step.optimizer], from_plain(step.groups))
        ahead = self._look_ahead if step.optimizer != OUTER else None
        if ahead is None:
            self._step(push, step.weight, step.scale, closes=step.closes)
            return
        ahead.told(step.optimizer, step.staleness)  # which the head alone knows
        with ahead.stepping(step.optimizer):
            self._step(push, step.weight, step.scale)


class Shard:
    """Hold one part of the parameters. Methods are called by the head (in order) and by workers (``deposit``).

    Args:
        settings: Of the run.
        threads: That its steps may use.
        place: Of the process that called for the run; None to stay where this is.
    """

    def __init__(self, settings: Settings, threads: int = 1, place: Whereabouts | None = None) -> None:
        if place is not None:
            place.follow()
        import_module("torch._dynamo")  # as the first step of an optimizer would, which then takes seconds
        self._settings = settings
        self._server: _Arithmetic | None = None
        self._registered: Registered | None = None
        self._generation = -1
        self._kept: dict[tuple[int, int], dict[int, Push]] = {}
        self._published: bytes | None = None  # the last publication, until a step makes another
        torch.set_num_threads(threads)

    def open(self, opening: bytes, generation: int, version: int) -> None:
        """Hold what the head sends: a run's first parameters, other layers, or what was saved of a shard that died."""
        part: Opening = pickle.loads(opening)  # from the head of this run, as the program itself
        self._server = _Arithmetic(part, self._settings)
        self._server.version = version
        self._registered = Registered(
            parameters=[TensorSpec.of(n, p) for n, p in zip(part.names, part.parameters, strict=True)],
            buffers=[],
            groups=[len(optimizer.param_groups) for optimizer in part.optimizers],
            compression=self._settings.compression,
        )
        self._generation = generation
        self._kept = {}
        self._published = None

    # --- from workers

    def deposit(self, generation: int, message: bytes) -> Deposit:
        """Check a push and keep it until the head decides.

        Raises:
            MalformedMessageError: If it is not exactly what this shard's parameters ask for, or was seen before.
        """
        if self._registered is None or generation != self._generation:
            return Deposit(known=False)
        push = decode_push(message, self._registered)
        kept = self._kept.setdefault((push.worker, push.incarnation), {})
        if push.sequence <= max(kept, default=0):
            raise MalformedMessageError(f"push {push.sequence} of worker {push.worker} was sent before.")
        kept[push.sequence] = push
        for old in sorted(kept)[:-_KEPT_PUSHES]:
            del kept[old]
        gradients = [g for g in push.gradients if g is not None and g.numel()]
        if not gradients or not push.finite:
            return Deposit(finite=push.finite)
        wide = [g.float() if g.dtype == torch.float16 else g for g in gradients]  # whose norm may overflow
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(wide)])
        return Deposit(square=float((norms * norms).sum()))

    # --- from the head

    def step(self, step: Step) -> bool:
        """Make the step of a push that was kept; returns whether it was there."""
        kept = self._kept.get((step.worker, step.incarnation), {})
        push = kept.get(step.sequence)
        server = self._opened()
        server.version = step.version
        if push is None:
            return False
        kept[step.sequence] = replace(push, gradients=[], base=[])  # its number stays known, its bytes are free
        server.make(step, push)
        self._published = None
        return True

    def read(self) -> bytes:
        """Return what workers are to compute on, as bytes; see `encode_values`."""
        server = self._opened()
        if self._published is None:
            self._published = encode_values(server.published(), version=server.version, steps=[])
        return self._published

    def cut(self) -> bytes:
        """Return parameters and optimizer states; see `pack_cut`."""
        return pack_cut(self._opened().state())

    def save(self) -> bytes:
        """Return everything, for `open` of a shard that takes this one's place."""
        return dumps(self._opened().state())

    def forget(self, worker: int) -> None:
        """Forget the pushes of a worker that is gone."""
        for key in [key for key in self._kept if key[0] == worker]:
            del self._kept[key]

    def ping(self) -> None:
        """Show that this shard is there."""

    def _opened(self) -> _Arithmetic:
        if self._server is None:
            raise RuntimeError("this shard holds nothing yet; the head opens it first.")
        return self._server
