"""What the parent process does for its workers: answers what they ask, applies what they push, publishes the result.

Knows workers by their channels and mailboxes alone; their lives are the `Supervisor`'s affair.
"""

import contextlib
import logging
import pickle
import time
from collections.abc import Sequence

from lightning_accel.async_sgd.policy.drop_notes import DropNotes
from lightning_accel.async_sgd.policy.encoding.tensor_spec import TensorSpec
from lightning_accel.async_sgd.policy.rules import has_slack
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.policy.sharing import LeaseRequest, Sharing, Situation
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import ChannelClosedError, Message
from lightning_accel.async_sgd.shared_memory.control import ControlPage
from lightning_accel.async_sgd.shared_memory.memory import Mailbox, ParameterPage
from lightning_accel.async_sgd.shared_memory.peers import Peer, mailbox_areas, typed
from lightning_accel.async_sgd.shared_memory.push_decisions import DecidesOnPushes
from lightning_accel.async_sgd.shared_memory.run_end import RunEnd
from lightning_accel.async_sgd.store import Opening

log = logging.getLogger(__name__)


class Service(DecidesOnPushes):
    """Serve the workers of one machine around one `ParameterServer`, which the first message of a coordinator opens.

    Args:
        workers: How many there are.
        settings: Of the run.
        peers: The workers, a list that its owner keeps up to date.
    """

    def __init__(self, workers: int, settings: Settings, peers: Sequence[Peer]) -> None:
        self.settings = settings
        self.peers = peers
        self.control = ControlPage(workers)
        self.server: ParameterServer | None = None
        self.end = RunEnd(settings.straggler_grace)
        self.restarts = 0
        self.deaths = 0
        self._workers = workers
        self._page: ParameterPage | None = None
        self.kv: dict[str, bytes] = {}
        self.notes = DropNotes(settings.drop_beyond)
        self._sharing: Sharing | None = None
        self._first_version = 0
        self._holder: int | None = None  # worker that is about to exchange layers: nobody else's pushes count meanwhile

    def close(self) -> None:
        """Give up what is shared."""
        if self._page is not None:
            self._page.segment.close()
        self.end.close()
        self.control.close()

    # --- what workers say

    def handle(self, peer: Peer, message: Message) -> None:
        """Deal with one message; an answer that has to wait is kept for `answer_waiting`."""
        values = message.values
        if message.kind == "bell":
            self.drain(peer)
        elif message.kind in ("join", "lease", "slack", "kv", "stop"):
            peer.request = message
            self._answer(peer)
        elif message.kind == "hello":
            page = self.control.segment.fd
            self.send(peer, Message("welcome", {"workers": self._workers}, descriptors=[page]))
        elif message.kind == "result":
            self.end.results[peer.worker] = message.payload
        elif message.kind == "failed":
            self.end.failure = message
        elif message.kind == "commit" and self.server is not None:
            book = self.server.leases
            book.commit(peer.worker, [lease for lease in values["leases"] if book.holds(peer.worker, [lease])])
        elif message.kind == "give back" and self.server is not None:
            self.drain(peer)
            self.server.leases.give_back(peer.worker, values["leases"])
        elif message.kind == "deliver":
            self.end.keep_file(peer.worker, message.descriptors[0])
            self.send(peer, Message("deliver"))
        elif message.kind == "idle":
            peer.idle = values["idle"]
        elif message.kind == "snapshot" and self.server is not None:
            self.send(peer, Message("snapshot", payload=pickle.dumps(self.server.snapshot())))
        elif message.kind == "restore" and self.server is not None:
            self.server.restore(pickle.loads(message.payload))
            self._publish()
            self.send(peer, Message("restore"))
        elif message.kind == "hold" and self.server is not None:
            self._holder = peer.worker
            self.send(peer, Message("hold", payload=pickle.dumps(self.server.snapshot())))
        elif message.kind == "let go":
            self._let_go(peer)
        elif message.kind == "exchange" and self.server is not None:
            self._exchange(peer, pickle.loads(message.payload))
        elif message.kind == "rejoin" and self.server is not None:
            self.send(peer, self._admitted(peer))
        elif message.kind == "statistics" and self.server is not None:
            self.send(peer, Message("statistics", {"statistics": self.server.statistics()}))
        elif message.kind == "finish":
            # asked and answered at once, so that a worker never both ends and takes over
            peer.done = True
            self.send(peer, Message("finish", {"coordinates": self.control.coordinator == peer.worker}))
        elif message.kind == "leave":
            self._leave(peer, stop=values["stop"])

    def send(self, peer: Peer, message: Message) -> None:
        """Send without waiting; a worker that is gone gets nothing."""
        with contextlib.suppress(ChannelClosedError):
            peer.channel.send(message)

    def ring(self, peer: Peer) -> None:
        """Wake a worker up, if it is still there."""
        with contextlib.suppress(ChannelClosedError):
            peer.channel.ring()

    def ring_waiting(self) -> None:
        """Wake up whoever sleeps until a push is dealt with, in case a bell came between its look and its sleep."""
        for peer in self.peers:
            if peer.active and self.control.is_waiting(peer.worker):
                self.ring(peer)

    def dismiss(self, peer: Peer) -> int:
        """Take a dead worker out; returns how many of its leases are free again."""
        self.deaths += 1
        self._let_go(peer)
        if self.control.stopped and peer.worker == self.control.coordinator:
            self.end.coordinator_gone()
        peer.request = None
        freed = self.server.dismiss(peer.worker) if self.server is not None else 0
        self.count_live()
        return freed

    def count_live(self) -> None:
        """Tell everybody how many take part."""
        self.control.live = sum(peer.state == "joined" for peer in self.peers)
        if self.server is not None:
            self.server.live = self.control.live
            self.server.restarts = self.restarts

    def unfinished(self) -> bool:
        """Whether the dead left batches that nobody has trained on; who leaves an epoch unfinished himself means it."""
        return self.deaths > 0 and self.server is not None and self.server.leases.remaining() > 0

    def appoint(self) -> None:
        """Let another worker coordinate, if one is left that can."""
        able = [peer for peer in self.peers if peer.active and not peer.done]
        heirs = [peer for peer in able if peer.state == "joined"] or able
        if heirs:
            self.control.coordinator = heirs[0].worker
            log.warning("worker %d takes over as coordinator.", heirs[0].worker)

    def _exchange(self, peer: Peer, opening: Opening) -> None:
        assert self.server is not None
        assert self._page is not None
        self.server.exchange(opening)
        self.control.generation += 1
        self._page.segment.close()  # who has it mapped still reads what was published last
        self._open_page()
        self.send(peer, self._admitted(peer))
        self._let_go(peer)

    def _let_go(self, peer: Peer) -> None:
        if self._holder == peer.worker:
            self._holder = None
            for other in self.peers:
                self.drain(other)

    def _stop(self) -> None:
        self.control.stop()
        self.end.over()

    def _leave(self, peer: Peer, *, stop: bool) -> None:
        self.drain(peer)
        peer.state = "left"
        if self.server is not None:
            self.server.dismiss(peer.worker)
        self.count_live()
        self.send(peer, Message("leave"))
        if stop and not self.control.stopped:
            if self.unfinished():
                self.end.forget_result(peer.worker)  # of a run that goes on
                self.appoint()
                return
            self._stop()
        if self.control.stopped and peer.worker == self.control.coordinator:
            self.end.coordinator_gone()

    def _publish(self) -> None:
        assert self.server is not None
        assert self._page is not None
        self._page.publish([*self.server.published(), *self.server.buffers], self.server.version, self.server.steps)

    # --- what workers wait for

    def answer_waiting(self) -> None:
        """Look whether what workers wait for is there by now."""
        self.close_round()
        for peer in self.peers:
            if peer.request is not None and peer.active:
                self._answer(peer)

    def _answer(self, peer: Peer) -> None:
        assert peer.request is not None
        answer = getattr(self, f"_answer_{peer.request.kind}")(peer, peer.request)
        if answer is not None:
            peer.request = None
            self.send(peer, answer)

    def _answer_join(self, peer: Peer, request: Message) -> Message | None:
        if request.payload and self.server is None:
            opening = pickle.loads(request.payload)
            self.server = self._new_server(opening)
            self._sharing = Sharing(self.server.leases, self.settings, self._workers)
            self._first_version = opening.version
            self._open_page()
        if self.server is None:
            opens = self.control.coordinator == peer.worker
            return Message("join", {"open": True}) if opens else None
        peer.state = "joined"
        self.server.admit(peer.worker, peer.incarnation)
        self.count_live()
        return self._admitted(peer)

    def _new_server(self, opening: Opening) -> ParameterServer:
        return ParameterServer(opening, self.settings)

    def _open_page(self) -> None:
        assert self.server is not None
        names = [*self.server.names, *self.server.buffer_names]
        tensors = [*self.server.parameters, *self.server.buffers]
        specs = [TensorSpec.of(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        self._page = ParameterPage(specs, len(self.server.steps))
        self._publish()

    def _admitted(self, peer: Peer) -> Message:
        """Give a worker a mailbox for the present parameters; returns what it needs to know of them."""
        assert self.server is not None
        assert self._page is not None
        self.drain(peer)  # the mailbox that it had
        if peer.mailbox is not None:
            peer.mailbox.segment.close()
        parameters = len(self.server.parameters)
        peer.mailbox = Mailbox(*mailbox_areas(self._page.specs, parameters, self.settings))
        if self.settings.compression.name == "none":
            specs, mailbox = self._page.specs[:parameters], peer.mailbox
            peer.slots = [typed(mailbox.areas(slot), specs) for slot in range(2)]
            dtypes = {spec.dtype for spec in specs}
            peer.spans = [mailbox.span(slot, parameters).view(*dtypes) for slot in range(2)] if len(dtypes) == 1 else []
        peer.generation = self.control.generation
        values = {
            "generation": peer.generation,
            "open": False,
            "specs": self._page.specs,
            "parameters": parameters,
            "counters": len(self.server.steps),
            "epoch": self.server.leases.current_epoch(),
        }
        return Message("join", values, descriptors=[self._page.segment.fd, peer.mailbox.segment.fd])

    def _answer_lease(self, peer: Peer, request: Message) -> Message | None:
        if self.server is None or self._sharing is None:
            return None  # not yet joined
        values = request.values
        units = pickle.loads(request.payload) if request.payload else None
        known, complete = values.get("known", 0), values.get("complete", True)
        asked = LeaseRequest(values["epoch"], values["final"], units, known, complete)
        request.payload = b""  # learned once, whatever there is to wait for
        if self.control.coordinator == peer.worker:
            for other in self.peers:
                self.drain(other)  # what is there by now is in time
        at = Situation(
            now=time.monotonic(),
            coordinator=self.control.coordinator,
            live=self.server.live,
            steps=self.server.version - self._first_version,
            stopped=self.control.stopped,
            frozen=self._holder is not None,
        )
        answer = self._sharing.answer(peer, self.peers, asked, at)
        if answer is None:
            return None
        if (taken := self._sharing.taken_over) > self.server.taken_over:
            if not self.server.taken_over:
                log.warning(
                    "worker %d takes over batches that others hold for longer than `straggler_grace=%g` seconds at the "
                    "end of epoch %d.",
                    peer.worker,
                    self.settings.straggler_grace,
                    asked.epoch,
                )
            self.server.taken_over = taken
        return Message("lease", {"leases": answer.leases, "known": answer.known})

    def _answer_stop(self, peer: Peer, request: Message) -> Message | None:
        complete = request.values["complete"]
        if not (complete and self.unfinished()):
            self.end.early = not complete
            self._stop()
        elif any(other is not peer and other.active and other.is_there and not other.done for other in self.peers):
            return None  # what is handed over must have the steps of those who train on what the dead left
        return Message("stop")

    def _answer_slack(self, peer: Peer, request: Message) -> Message | None:
        assert self.server is not None
        clocks = self.server.clocks
        counting = [
            clocks[p.worker]
            for p in self.peers
            if p.worker in clocks and not p.idle and (p.request is None or p.request.kind != "lease")
        ]
        mine = clocks[peer.worker]
        free = self.control.stopped or has_slack(mine, counting, max_staleness=self.settings.max_staleness)
        return Message(request.kind) if free else None

    def _answer_kv(self, peer: Peer, request: Message) -> Message | None:  # noqa: ARG002  # as its siblings
        key, write = request.values["key"], request.values["write"]
        if write and (request.values["replace"] or key not in self.kv):
            self.kv[key] = request.payload
        if key in self.kv:
            return Message("kv", {"found": True}, self.kv[key])
        return None if request.values["wait"] and not self.control.stopped else Message("kv", {"found": False})
