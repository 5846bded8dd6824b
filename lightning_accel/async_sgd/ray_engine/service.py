"""What the head of a run does for its workers: the `Service` of one machine, with shards in the place of memory."""

import logging
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.encoding.wire import encode_values
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.ray_engine.options import RayOptions
from lightning_accel.async_sgd.ray_engine.peers import Announced, RayPeer
from lightning_accel.async_sgd.ray_engine.shards.group import ShardGroup
from lightning_accel.async_sgd.ray_engine.shards.server import ShardedServer
from lightning_accel.async_sgd.ray_engine.whereabouts import Whereabouts
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Message
from lightning_accel.async_sgd.shared_memory.memory import anonymous_file
from lightning_accel.async_sgd.shared_memory.peers import Peer
from lightning_accel.async_sgd.shared_memory.service import Service
from lightning_accel.async_sgd.store import Opening

log = logging.getLogger(__name__)


@dataclass
class Answer(Message):
    """An answer with references to what shards are about to return, and handles of the shards."""

    references: list[Any] = field(default_factory=list)
    actors: list[Any] = field(default_factory=list)


class RayService(Service):
    """Serve workers that are actors, around a `ShardedServer`.

    Args:
        workers: How many there are.
        settings: Of the run.
        peers: The workers, a list that its owner keeps up to date.
        options: Of the engine.
        node: Of the head; workers there can be looked at as processes.
        place: Of the caller.
    """

    def __init__(
        self,
        workers: int,
        settings: Settings,
        peers: Sequence[Peer],
        *,
        options: RayOptions,
        node: str,
        place: Whereabouts,
    ) -> None:
        super().__init__(workers, settings, peers)
        self.lost_versions = 0
        self._options = options
        self._node = node
        self.shards = ShardGroup(
            settings,
            options,
            workers,
            place,
            on_lost=self._shard_lost,
            on_saved=self.drain_all,
            on_error=self._shard_failed,
        )

    @property
    def sharded(self) -> ShardedServer:
        """The server, once the run is open."""
        assert self.server is not None, "the run is not open"
        return cast(ShardedServer, self.server)

    def close(self) -> None:
        """Give up what is shared, and end the shards."""
        super().close()
        self.shards.close()

    # --- what workers say

    def handle(self, peer: Peer, message: Message) -> None:
        """Deal with one message; an answer that has to wait is kept for `answer_waiting`."""
        if message.kind == "hello":
            peer.is_there = True
            if message.values["node"] == self._node:
                peer.signs.pid = message.values["pid"]
            self.send(peer, Message("welcome", {"workers": self._workers}))
        elif message.kind == "read":
            self.send(peer, self.publication())
        elif message.kind in ("snapshot", "hold"):
            if message.kind == "hold":
                self._holder = peer.worker
            self.send(peer, self._cut(message.kind))
        elif message.kind == "deliver":
            file = anonymous_file()
            with os.fdopen(os.dup(file), "wb") as writer:
                writer.write(message.payload)
            self.end.keep_file(peer.worker, file)
            self.send(peer, Message("deliver"))
        elif message.kind == "failed":
            message.values["worker"] = peer.worker
            super().handle(peer, message)
        elif message.kind == "lease":
            units = message.values.pop("units")
            message.payload = b"" if units is None else pickle.dumps(units)  # where the service looks for them
            super().handle(peer, message)
        else:
            super().handle(peer, message)

    def drain(self, peer: Peer) -> None:
        """Decide on every push of a worker that is there, unless the shards' copies have to catch up first."""
        ray_peer = cast(RayPeer, peer)
        if self.server is None or self.shards.is_ahead:
            return
        ray_peer.coordinates = self.control.coordinator == peer.worker
        super().drain(peer)
        if peer.mailbox is not None:
            ray_peer.acknowledge(*self.control.acknowledged(peer.worker))

    def close_round(self) -> None:
        """Decide on the pushes of a round that is due, unless the shards' copies have to catch up first."""
        if self.server is None or self.server.rounds is None or self.shards.is_ahead:
            return
        for peer in self.peers:
            cast(RayPeer, peer).coordinates = self.control.coordinator == peer.worker
        super().close_round()
        for peer in self.peers:
            if peer.active and peer.mailbox is not None:
                cast(RayPeer, peer).acknowledge(*self.control.acknowledged(peer.worker))

    def drain_all(self) -> None:
        """Decide on every push that is there."""
        for peer in self.peers:
            if peer.active:
                self.drain(peer)

    def publication(self) -> Answer:
        """Return the newest parameters as references, with version, steps and buffers."""
        server = self.sharded
        payload = encode_values(server.buffers, version=server.version, steps=[])
        return Answer(
            "read", {"version": server.version, "steps": list(server.steps)}, payload, references=self.shards.read()
        )

    def _cut(self, kind: str) -> Answer:
        cut = self.sharded.head_of_cut()
        payload = encode_values(cut.buffers, version=cut.version, steps=[])
        values = {"version": cut.version, "steps": cut.steps, "epochs": cut.epochs}
        return Answer(kind, values, payload, references=self.shards.cut())

    # --- shards

    def _new_server(self, opening: Opening) -> ParameterServer:
        return ShardedServer(opening, self.settings, self.shards, shards=self._options.shards)

    def _shard_lost(self, number: int, lost: int) -> int:
        server = self.sharded
        self.lost_versions += lost
        log.warning(
            "shard %d is gone; another takes its place with the copy of %d versions before, and gradients of "
            "parameters from before are refused.",
            number,
            lost,
        )
        server.shard_lost()
        self.drain_all()
        return server.version

    def _shard_failed(self, error: BaseException) -> None:
        self.end.failure = self.end.failure or Message(
            "failed", {"worker": -1, "traceback": f"a shard of the parameters failed:\n{error}"}
        )

    def _publish(self) -> None:
        """Nothing to do: the next `publication` is of what the shards have been told."""

    def _open_page(self) -> None:
        """Nothing to do: shards are opened by the server."""

    def _exchange(self, peer: Peer, opening: Opening) -> None:
        self.sharded.exchange(opening)
        self.control.generation += 1
        self.send(peer, self._admitted(peer))
        self._let_go(peer)

    def _admitted(self, peer: Peer) -> Message:
        server = self.sharded
        self.drain(peer)
        if peer.mailbox is None:
            peer.mailbox = cast(Any, Announced())
        peer.generation = self.control.generation
        values = {
            "open": False,
            "generation": peer.generation,
            "specs": server.specs,
            "buffer_specs": [TensorSpec.of(n, b) for n, b in zip(server.buffer_names, server.buffers, strict=True)],
            "layout": server.layout,
            "order": server.order,
            "shard_generation": self.shards.generation,
            "epoch": server.leases.current_epoch(),
        }
        return Answer("join", values, actors=self.shards.actors)
