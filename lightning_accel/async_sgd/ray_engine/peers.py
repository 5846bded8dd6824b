"""What the head of a run has of one worker, in the places where one machine has a socket, a mailbox and a process."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_accel.async_sgd.policy.encoding.wire import MalformedMessageError, decode_values
from lightning_accel.async_sgd.policy.pushes import Push
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.ray_engine.shards.shard import Deposit
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.shared_memory.peers import Peer

KILLED = -9


class AnswerChannel:
    """Carries the answers to a worker's calls: a worker has one call that waits for an answer at a time."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[Message]] = deque()

    def expect(self) -> "asyncio.Future[Message]":
        """Return what the next answer will be."""
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    def send(self, message: Message) -> None:
        """Answer."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():  # else whoever called is gone
                future.set_result(message)
                return

    def ring(self) -> None:
        """Nothing to do: who pushed is told by `RayPeer.acknowledge`."""

    def flush(self, *, wait: bool) -> bool:  # noqa: ARG002  # as of a socket
        """Nothing is ever left to be sent."""
        return True

    def poll(self) -> list[Message]:
        """Return nothing: calls are dealt with as they come."""
        return []

    def close(self) -> None:
        """Answer nobody any more."""
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()


class ActorProcess:
    """A worker's actor, in the place of a process.

    Args:
        kill: Ends the actor.
    """

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill: Callable[[], None] | None = kill
        self.pid: int | None = None  # where it is on the machine of the head
        self.exitcode: int | None = None

    def kill(self) -> None:
        """End it; its death is noted at once."""
        if self._kill is not None:
            self._kill()
        self.ended(KILLED)

    def ended(self, code: int) -> None:
        """Take note of how it ended, and let go of the actor: Ray gives its cores to another only then."""
        self.exitcode = code if self.exitcode is None else self.exitcode
        self._kill = None

    def join(self, timeout: float | None = None) -> None:
        """Return at once: Ray buries its dead."""


class _NoSegment:
    def close(self) -> None:
        """Nothing to give up."""


class Announced:
    """Pushes whose gradients lie on the shards, in the place of a mailbox: their descriptions by number."""

    def __init__(self) -> None:
        self.segment = _NoSegment()
        self._pushes: dict[int, tuple[dict[str, Any], list[Tensor]]] = {}

    def put(self, meta: dict[str, Any]) -> None:
        """Keep the description of a push until its turn has come."""
        self._pushes[meta["sequence"]] = meta, []

    def committed(self, sequence: int) -> tuple[dict[str, Any], list[Tensor]] | None:
        """Return push ``sequence`` if it is there; then those before it are forgotten."""
        for old in [number for number in self._pushes if number < sequence]:
            del self._pushes[old]
        return self._pushes.get(sequence)


@dataclass
class RayPeer(Peer):
    """One worker as the head sees it."""

    is_there: bool = False
    coordinates: bool = False
    acknowledged: dict[int, "asyncio.Future[str]"] = field(default_factory=dict)

    def expect(self, sequence: int) -> "asyncio.Future[str]":
        """Return what will become of a push."""
        return self.acknowledged.setdefault(sequence, asyncio.get_running_loop().create_future())

    def acknowledge(self, sequence: int, outcome: str) -> None:
        """Tell what became of the pushes up to ``sequence``."""
        for number in [number for number in self.acknowledged if number <= sequence]:
            future = self.acknowledged.pop(number)
            if not future.done():
                future.set_result(outcome)

    def decode(self, server: ParameterServer, meta: dict[str, Any], areas: list[Tensor]) -> Push:  # noqa: ARG002
        """Return a push with the norm of its gradients in the place of them."""
        norm = torch.tensor(meta["square"], dtype=torch.float64).sqrt()
        return Push(
            worker=self.worker,
            incarnation=self.incarnation,
            sequence=meta["sequence"],
            base_version=-1 if meta["void"] else meta["base_version"],  # what is lost is refused, as older than any
            optimizer=meta["optimizer"],
            gradients=[norm],
            finite=meta["finite"],
            leases=meta["leases"],
            groups=meta["groups"] if self.coordinates else None,
            buffers=meta["tensors"],
            pull_seconds=meta["pull_seconds"],
        )


def checked_push(message: Message, deposits: tuple[Any, ...], server: Any) -> dict[str, Any]:
    """Return the description of a push, with what the shards found in it.

    Raises:
        MalformedMessageError: If it does not fit the run.
    """
    meta = dict(message.values)
    if not -5 < meta["optimizer"] < len(server.optimizers) or meta["sequence"] < 1 or meta["base_version"] < 0:
        raise MalformedMessageError("a push names an optimizer, a number or a version that this run has not.")
    if meta["base_version"] > server.version:
        raise MalformedMessageError(f"a push belongs to version {meta['base_version']}, which is yet to come.")
    _check_groups(meta, server)
    found = [deposit for deposit in deposits if isinstance(deposit, Deposit)]
    if len(found) != len(deposits) or (found and len(found) != len(server.layout)):
        raise MalformedMessageError(f"a push has {len(server.layout)} parts.")
    meta["void"] = meta["void"] or not all(deposit.known for deposit in found)
    meta["finite"] = meta["finite"] and all(deposit.finite for deposit in found)
    meta["square"] = sum(deposit.square for deposit in found)
    if meta["present"] and meta["finite"] and not meta["void"] and not found:
        raise MalformedMessageError("a push says that it has gradients, and no shard has any.")
    meta["tensors"] = []
    if meta["buffers"] and not meta["void"]:
        specs = [type(server.specs[0]).of(n, b) for n, b in zip(server.buffer_names, server.buffers, strict=True)]
        meta["tensors"], _, _ = decode_values(message.payload, specs, optimizers=0)
    return meta


def _check_groups(meta: dict[str, Any], server: Any) -> None:
    groups = meta["groups"]
    if groups is None:
        return
    if meta["optimizer"] < 0 or len(groups) != len(server.optimizers[meta["optimizer"]].param_groups):
        raise MalformedMessageError(f"{len(groups)} parameter groups do not fit the optimizer.")
    if not all(isinstance(group, dict) and "params" not in group for group in groups):
        raise MalformedMessageError("hyper-parameters are one object a parameter group, without `params`.")
