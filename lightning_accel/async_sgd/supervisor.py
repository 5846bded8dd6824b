"""The parent process of a run on one machine: starts workers, serves them, outlives and replaces them.

One thread, one loop, no locks. A worker may be killed at any instant: it takes part only through a socket that never
blocks the server and a mailbox whose pushes are there as a whole or not at all.
"""

import contextlib
import logging
import pickle
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from lightning_accel.async_sgd.channel import Channel, ChannelClosedError, Message
from lightning_accel.async_sgd.memory import Mailbox, ParameterPage, Segment, TensorSpec
from lightning_accel.async_sgd.peers import Peer, WorkerProcess, mailbox_areas
from lightning_accel.async_sgd.rules import has_slack
from lightning_accel.async_sgd.server import LogEntry, ParameterServer
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.store import Snapshot, Statistics

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.05
_GRACE_SECONDS = 5.0
STOP, COORDINATOR, LIVE, FIRST_HEARTBEAT = 0, 1, 2, 8  # words of the control page


StartWorker = Callable[[int, int, socket.socket], WorkerProcess]  # worker, incarnation, its end of the socket


class WorkerFailedError(RuntimeError):
    """A worker raised an exception; its traceback is in the message and the exception is the cause."""


@dataclass
class Ending:
    """How a run ended: results of workers, the server's last state, and what was counted.

    Attributes:
        result: What the coordinator returned (its bytes), or another worker if the coordinator's got lost.
        snapshot: The final cut; None if the run never opened.
        statistics: Final counts.
        log: The server's log, with ``record_log``.
    """

    result: bytes
    snapshot: Snapshot | None
    statistics: Statistics
    log: list[LogEntry] = field(default_factory=list)


class Supervisor:
    """Run ``workers`` processes around one `ParameterServer` until they are done.

    Args:
        workers: How many, >= 1.
        settings: Of the run.
        start: Starts one worker process and returns it; it must build a `SharedMemoryStore` on the given socket.
        on_tick: Called about 20 times a second with the statistics, to show them.

    Raises:
        ValueError: If ``workers < 1``.
    """

    def __init__(
        self,
        workers: int,
        settings: Settings,
        start: StartWorker,
        *,
        on_tick: Callable[[Statistics], None] | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"`workers` must be >= 1, got {workers}.")
        self.settings = settings
        self.server: ParameterServer | None = None
        self._start = start
        self._on_tick = on_tick
        self._selector = selectors.DefaultSelector()
        self._control = Segment(8 * (FIRST_HEARTBEAT + workers))
        self._words = self._control.bytes.view(torch.int64)
        self._page: ParameterPage | None = None
        self._kv: dict[str, bytes] = {}
        self._results: dict[int, bytes] = {}
        self._failure: Message | None = None
        self._order_asked: dict[int, int] = {}
        self._restarts = 0
        self._called_back = 0
        self._deaths = 0
        self._stopped_early = False
        self._first_version = 0
        self._stopped_at: float | None = None
        self._ticked = time.monotonic()
        self.peers: list[Peer] = []
        self._former: list[Peer] = []  # left, and since then called back
        self._workers = workers

    def run(self) -> Ending:
        """Serve until every worker has left.

        Raises:
            WorkerFailedError: If a worker raised an exception.
            RuntimeError: If every worker died and none could be started again.
        """
        try:
            for worker in range(self._workers):
                self.peers.append(self._launch(worker, 0))
            while any(peer.active for peer in self.peers) and self._failure is None:
                self._turn()
                self._call_back()
            return self._ending()
        finally:
            self._close()

    # --- one turn of the loop

    def _turn(self) -> None:
        pending = [peer for peer in self.peers if peer.active and not self._flush(peer)]
        for key, _ in self._selector.select(0.001 if pending else _TICK_SECONDS):
            peer: Peer = key.data
            try:
                messages = peer.channel.poll()
            except ChannelClosedError:
                self._selector.unregister(peer.channel)  # its death shows in its exit code
                continue
            for message in messages:
                self._handle(peer, message)
        now = time.monotonic()
        if now - self._ticked >= _TICK_SECONDS:
            self._tick(now - self._ticked)
            self._ticked = now
        self._serve_waiting()

    def _tick(self, seconds: float) -> None:
        for peer in list(self.peers):
            if peer.state == "left" or not peer.active:
                continue
            if peer.process.exitcode is not None:
                self._bury(peer)
                continue
            heartbeat = int(self._words[FIRST_HEARTBEAT + peer.worker])
            # our own pauses (a suspended machine) must not count as theirs
            peer.silent_seconds = 0.0 if heartbeat != peer.heartbeat else peer.silent_seconds + min(seconds, 1.0)
            peer.heartbeat = heartbeat
            if peer.state == "joined" and peer.silent_seconds > self.settings.heartbeat_seconds:
                log.warning("worker %d was silent for %.0f s; ending it.", peer.worker, peer.silent_seconds)
                peer.process.kill()
                peer.silent_seconds = 0.0
        if self._stopped_at is not None and time.monotonic() - self._stopped_at > _GRACE_SECONDS:
            for peer in self.peers:
                if peer.active and peer.process.exitcode is None:
                    log.warning("worker %d did not stop when the run was over; ending it.", peer.worker)
                    peer.process.kill()
        if self._on_tick is not None and self.server is not None:
            self._on_tick(self.server.statistics())

    def _flush(self, peer: Peer) -> bool:
        try:
            return peer.channel.flush(wait=False)
        except ChannelClosedError:
            return True  # its death shows in its exit code

    def _send(self, peer: Peer, message: Message) -> None:
        try:
            peer.channel.send(message)
        except ChannelClosedError:
            log.debug("worker %d is gone before it got %s", peer.worker, message.kind)

    # --- life and death

    def _launch(self, worker: int, incarnation: int) -> Peer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            process = self._start(worker, incarnation, theirs)
        finally:
            theirs.close()
        peer = Peer(worker, incarnation, process, Channel(ours))
        self._selector.register(peer.channel, selectors.EVENT_READ, peer)
        return peer

    def _bury(self, peer: Peer) -> None:
        """See to it that what a dead worker has committed counts, and what it has not goes to others."""
        for message in self._last_words(peer):
            self._handle(peer, message)
        if peer.state == "left":
            return
        self._drain(peer)
        code = peer.process.exitcode
        peer.state = "dead"
        self._deaths += 1
        peer.request = None
        self._release(peer)
        freed = self.server.dismiss(peer.worker) if self.server is not None else 0
        self._count_live()
        log.warning("worker %d ended with code %s; %d of its batches go to others.", peer.worker, code, freed)
        stopping = bool(self._words[STOP])
        if not stopping and peer.incarnation < self.settings.max_restarts:
            self._restarts += 1
            self.peers[self.peers.index(peer)] = fresh = self._launch(peer.worker, peer.incarnation + 1)
            log.info("worker %d started again (process %s).", fresh.worker, fresh.process.pid)
        if self._words[COORDINATOR] == peer.worker and not stopping:
            self._appoint()

    def _appoint(self) -> None:
        able = [peer for peer in self.peers if peer.active and not peer.done]
        heirs = [peer for peer in able if peer.state == "joined"] or able
        if heirs:
            self._words[COORDINATOR] = heirs[0].worker
            log.warning("worker %d takes over as coordinator.", heirs[0].worker)

    def _last_words(self, peer: Peer) -> list[Message]:
        try:
            return peer.channel.poll()
        except (ChannelClosedError, OSError):
            return []

    def _count_live(self) -> None:
        live = sum(peer.state == "joined" for peer in self.peers)
        self._words[LIVE] = live
        if self.server is not None:
            self.server.live = live
            self.server.restarts = self._restarts

    def _release(self, peer: Peer) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it is not registered if its end was seen before
            self._selector.unregister(peer.channel)
        peer.channel.close()
        if peer.mailbox is not None:
            peer.mailbox.segment.close()

    def _close(self) -> None:
        for peer in self.peers + self._former:
            self._release(peer)
            peer.process.join(_GRACE_SECONDS if self._failure is None and peer.state == "left" else 0.0)
            if peer.process.exitcode is None:
                peer.process.kill()
                peer.process.join()
        if self._page is not None:
            self._page.segment.close()
        self._control.close()
        self._selector.close()

    def _ending(self) -> Ending:
        if self._failure is not None:
            text = self._failure.values["traceback"]
            error = WorkerFailedError(f"worker {self._failure.values['worker']} failed:\n{text}")
            try:
                cause = pickle.loads(self._failure.payload)
            except Exception:  # an exception that pickles need not unpickle
                cause = None
            raise error from cause
        if not self._results:
            raise RuntimeError(
                "every worker died and none was left to start again; resume from the last checkpoint with "
                "`fit(ckpt_path=...)`, and allow more with `max_restarts`."
            )
        coordinator = int(self._words[COORDINATOR])
        result = self._results.get(coordinator, next(iter(self._results.values())))
        server = self.server
        if server is None:
            return Ending(result, None, Statistics())
        lost = server.leases.remaining() if self._unfinished() and not self._stopped_early else 0
        statistics = replace(server.statistics(), lost_batches=lost)
        if lost:
            log.warning("%d batches of the last epoch had nobody left to train on them.", lost)
        return Ending(result, server.snapshot(), statistics, server.log)

    # --- what workers say

    def _handle(self, peer: Peer, message: Message) -> None:
        values = message.values
        if message.kind == "bell":
            self._drain(peer)
        elif message.kind in ("join", "lease", "slack", "kv"):
            peer.request = message
            self._answer(peer)
        elif message.kind == "hello":
            self._send(peer, Message("welcome", {"workers": self._workers}, descriptors=[self._control.fd]))
        elif message.kind == "result":
            self._results[peer.worker] = message.payload
        elif message.kind == "failed":
            self._failure = message
        elif message.kind == "commit" and self.server is not None:
            self._commit(peer, values["leases"])
        elif message.kind == "idle":
            peer.idle = values["idle"]
        elif message.kind == "snapshot" and self.server is not None:
            self._send(peer, Message("snapshot", payload=pickle.dumps(self.server.snapshot())))
        elif message.kind == "restore" and self.server is not None:
            self.server.restore(pickle.loads(message.payload))
            self._publish()
            self._send(peer, Message("restore"))
        elif message.kind == "statistics" and self.server is not None:
            self._send(peer, Message("statistics", {"statistics": self.server.statistics()}))
        elif message.kind == "finish":
            # asked and answered at once, so that a worker never both ends and takes over
            peer.done = True
            self._send(peer, Message("finish", {"coordinates": int(self._words[COORDINATOR]) == peer.worker}))
        elif message.kind == "stop":
            if not (values["complete"] and self._unfinished()):
                self._stopped_early = not values["complete"]
                self._stop()
            self._send(peer, Message("stop"))
        elif message.kind == "leave":
            self._leave(peer, stop=values["stop"])

    def _stop(self) -> None:
        self._words[STOP] = 1
        self._stopped_at = self._stopped_at or time.monotonic()

    def _unfinished(self) -> bool:
        # whoever leaves an epoch unfinished by itself means it; only what the dead left is unfinished business
        return self._deaths > 0 and self.server is not None and self.server.leases.remaining() > 0

    def _commit(self, peer: Peer, leases: list[tuple[int, int]]) -> None:
        assert self.server is not None
        self.server.leases.commit(peer.worker, [i for i in leases if self.server.leases.holds(peer.worker, [i])])

    def _leave(self, peer: Peer, *, stop: bool) -> None:
        self._drain(peer)
        peer.state = "left"
        if self.server is not None:
            self.server.dismiss(peer.worker)
        self._count_live()
        self._send(peer, Message("leave"))
        if not stop or self._words[STOP]:
            return
        if not self._unfinished():
            self._stop()
            return
        self._appoint()

    def _call_back(self) -> None:
        """Start a worker again that has left, if another died with the last batches after this one was told of no more.

        Only then is nobody left to train on them, or to end the run; it happens once a worker at most.
        """
        if self._words[STOP] or any(peer.active for peer in self.peers) or self._called_back >= self._workers:
            return
        left = [peer for peer in self.peers if peer.state == "left"]
        ended = any(peer.worker == self._words[COORDINATOR] for peer in left)
        if not left or (ended and not self._unfinished()):
            return
        self._called_back += 1
        self._words[COORDINATOR] = left[0].worker
        log.warning("worker %d is started again for the batches that a dead worker left.", left[0].worker)
        self.peers[self.peers.index(left[0])] = self._launch(left[0].worker, left[0].incarnation + 1)
        self._former.append(left[0])

    def _drain(self, peer: Peer) -> None:
        """Apply every committed push of a worker, publish once, then acknowledge."""
        if self.server is None or peer.mailbox is None:
            return
        done = []
        changed = False
        while (found := peer.mailbox.committed(peer.sequence)) is not None:
            push = peer.decode(self.server, *found)
            coordinates = int(self._words[COORDINATOR]) == peer.worker
            over = bool(self._words[STOP]) and not coordinates  # the result is what the coordinator ended with
            outcome = self.server.refuse(push) if over else self.server.apply(push, from_coordinator=coordinates)
            changed |= outcome in ("applied", "assigned") or (outcome == "committed" and bool(push.buffers))
            done.append((peer.sequence, outcome))
            peer.sequence += 1
        if changed:
            self._publish()
        for sequence, outcome in done:
            self._send(peer, Message("ack", {"sequence": sequence, "outcome": outcome}))

    def _publish(self) -> None:
        assert self.server is not None
        assert self._page is not None
        tensors = [p.detach() for p in self.server.parameters] + self.server.buffers
        self._page.publish(tensors, self.server.version, self.server.steps)

    # --- what workers wait for

    def _serve_waiting(self) -> None:
        for peer in self.peers:
            if peer.request is not None and peer.active:
                self._answer(peer)

    def _answer(self, peer: Peer) -> None:
        assert peer.request is not None
        answer = getattr(self, f"_answer_{peer.request.kind}")(peer, peer.request)
        if answer is not None:
            peer.request = None
            self._send(peer, answer)

    def _answer_join(self, peer: Peer, request: Message) -> Message | None:
        if request.payload and self.server is None:
            opening = pickle.loads(request.payload)
            self.server = ParameterServer(opening, self.settings)
            self._first_version = opening.version
            names = [*opening.names, *opening.buffer_names]
            tensors = [*opening.parameters, *opening.buffers]
            specs = [TensorSpec.of(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
            self._page = ParameterPage(specs, len(self.server.steps))
            self._publish()
        if self.server is None:
            opens = self._words[COORDINATOR] == peer.worker
            return Message("join", {"open": True}) if opens else None
        assert self._page is not None
        areas, meta_bytes = mailbox_areas(self._page.specs, len(self.server.parameters), self.settings)
        peer.mailbox = Mailbox(areas, meta_bytes)
        peer.state = "joined"
        self.server.admit(peer.worker, peer.incarnation)
        self._count_live()
        values = {
            "open": False,
            "specs": self._page.specs,
            "parameters": len(self.server.parameters),
            "counters": len(self.server.steps),
            "epoch": self.server.leases.current_epoch(),
        }
        return Message("join", values, descriptors=[self._page.segment.fd, peer.mailbox.segment.fd])

    def _answer_lease(self, peer: Peer, request: Message) -> Message | None:
        assert self.server is not None
        epoch, book = request.values["epoch"], self.server.leases
        peer.epoch = max(peer.epoch, epoch)
        nothing = Message("lease", {"leases": [], "order": False})
        if self._words[STOP]:
            return nothing
        coordinates = int(self._words[COORDINATOR]) == peer.worker
        if request.payload and not book.has_order(epoch):
            book.begin(epoch, pickle.loads(request.payload))
        if not coordinates:
            if self.server.version - self._first_version < self.settings.warm_start_steps:
                return None
            chief = next((p for p in self.peers if p.worker == self._words[COORDINATOR]), None)
            if self.settings.validate == "pause" and chief is not None and (chief.idle or chief.epoch < epoch):
                return None
        if not book.has_order(epoch):
            asked = self._order_asked.get(epoch)
            if asked is not None and asked != peer.worker and self._is_active(asked):
                return None
            self._order_asked[epoch] = peer.worker
            return Message("lease", {"leases": [], "order": True})
        reserve = self.settings.cooldown_steps if request.values["final"] and not coordinates else 0
        leases = book.grant(peer.worker, epoch, workers=self.server.live, reserve=reserve)
        if leases:
            return Message("lease", {"leases": leases, "order": False})
        # the coordinator ends the epoch: it waits for the others, and takes what the dead leave behind
        return None if coordinates and book.held_by_others(peer.worker) else nothing

    def _is_active(self, worker: int) -> bool:
        return any(peer.worker == worker and peer.active for peer in self.peers)

    def _answer_slack(self, peer: Peer, request: Message) -> Message | None:
        assert self.server is not None
        clocks = self.server.clocks
        counting = [
            clocks[p.worker]
            for p in self.peers
            if p.worker in clocks and not p.idle and (p.request is None or p.request.kind != "lease")
        ]
        mine = clocks[peer.worker]
        free = bool(self._words[STOP]) or has_slack(mine, counting, max_staleness=self.settings.max_staleness)
        return Message(request.kind) if free else None

    def _answer_kv(self, peer: Peer, request: Message) -> Message | None:  # noqa: ARG002  # as its siblings
        key, write = request.values["key"], request.values["write"]
        if write and (request.values["replace"] or key not in self._kv):
            self._kv[key] = request.payload
        if key in self._kv:
            return Message("kv", {"found": True}, self._kv[key])
        return None if request.values["wait"] and not self._words[STOP] else Message("kv", {"found": False})
