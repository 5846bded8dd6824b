"""What the parent process does for its workers: answers what they ask, applies what they push, publishes the result.

Knows workers by their channels and mailboxes alone; their lives are the `Supervisor`'s affair.
"""

import logging
import pickle
import time
from collections.abc import Sequence

from lightning_accel.async_sgd.policy.leases import LeaseId
from lightning_accel.async_sgd.policy.rules import has_slack
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import ChannelClosedError, Message
from lightning_accel.async_sgd.shared_memory.control import ControlPage
from lightning_accel.async_sgd.shared_memory.memory import Mailbox, ParameterPage, TensorSpec
from lightning_accel.async_sgd.shared_memory.peers import Peer, mailbox_areas, typed
from lightning_accel.async_sgd.store import Opening

log = logging.getLogger(__name__)


class Service:
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
        self.results: dict[int, bytes] = {}  # of workers that reported one
        self.failure: Message | None = None  # of the worker that raised an exception
        self.restarts = 0
        self.deaths = 0
        self.stopped_at: float | None = None
        self.stopped_early = False
        self._workers = workers
        self._page: ParameterPage | None = None
        self._kv: dict[str, bytes] = {}
        self._order_asked: dict[int, int] = {}
        self._first_version = 0
        self._holder: int | None = None  # worker that is about to exchange layers: nobody else's pushes count meanwhile

    def close(self) -> None:
        """Give up what is shared."""
        if self._page is not None:
            self._page.segment.close()
        self.control.close()

    # --- what workers say

    def handle(self, peer: Peer, message: Message) -> None:
        """Deal with one message; an answer that has to wait is kept for `answer_waiting`."""
        values = message.values
        if message.kind == "bell":
            self.drain(peer)
        elif message.kind in ("join", "lease", "slack", "kv"):
            peer.request = message
            self._answer(peer)
        elif message.kind == "hello":
            page = self.control.segment.fd
            self.send(peer, Message("welcome", {"workers": self._workers}, descriptors=[page]))
        elif message.kind == "result":
            self.results[peer.worker] = message.payload
        elif message.kind == "failed":
            self.failure = message
        elif message.kind == "commit" and self.server is not None:
            self._commit(peer, values["leases"])
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
        elif message.kind == "stop":
            if not (values["complete"] and self.unfinished()):
                self.stopped_early = not values["complete"]
                self._stop()
            self.send(peer, Message("stop"))
        elif message.kind == "leave":
            self._leave(peer, stop=values["stop"])

    def send(self, peer: Peer, message: Message) -> None:
        """Send without waiting; a worker that is gone gets nothing."""
        try:
            peer.channel.send(message)
        except ChannelClosedError:
            log.debug("worker %d is gone before it got %s", peer.worker, message.kind)

    def ring(self, peer: Peer) -> None:
        """Wake a worker up."""
        try:
            peer.channel.ring()
        except ChannelClosedError:
            log.debug("worker %d is gone before it was woken up", peer.worker)

    def drain(self, peer: Peer) -> None:
        """Apply every committed push of a worker, publish once, then acknowledge."""
        if self.server is None or peer.mailbox is None or self._holder not in (None, peer.worker):
            return
        done = []
        known = peer.generation == self.control.generation
        changed = False
        while (found := peer.mailbox.committed(peer.sequence)) is not None:
            push = peer.decode(self.server, *found) if known else peer.undecoded(found[0])
            coordinates = self.control.coordinator == peer.worker
            over = self.control.stopped and not coordinates  # the result is what the coordinator ended with
            over |= not known
            outcome = self.server.refuse(push) if over else self.server.apply(push, from_coordinator=coordinates)
            changed |= outcome in ("applied", "assigned") or (outcome == "committed" and bool(push.buffers))
            done.append((peer.sequence, outcome))
            peer.sequence += 1
        if changed:
            self._publish()
        if [self.control.acknowledge(peer.worker, *which) for which in done][-1:] == [True]:
            self.ring(peer)

    def ring_waiting(self) -> None:
        """Wake up whoever sleeps until a push is dealt with, in case a bell came between its look and its sleep."""
        for peer in self.peers:
            if peer.active and self.control.is_waiting(peer.worker):
                self.ring(peer)

    def dismiss(self, peer: Peer) -> int:
        """Take a dead worker out; returns how many of its leases are free again."""
        self.deaths += 1
        self._let_go(peer)
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
        self.stopped_at = self.stopped_at or time.monotonic()

    def _commit(self, peer: Peer, leases: list[LeaseId]) -> None:
        assert self.server is not None
        self.server.leases.commit(peer.worker, [i for i in leases if self.server.leases.holds(peer.worker, [i])])

    def _leave(self, peer: Peer, *, stop: bool) -> None:
        self.drain(peer)
        peer.state = "left"
        if self.server is not None:
            self.server.dismiss(peer.worker)
        self.count_live()
        self.send(peer, Message("leave"))
        if not stop or self.control.stopped:
            return
        if not self.unfinished():
            self._stop()
            return
        self.appoint()

    def _publish(self) -> None:
        assert self.server is not None
        assert self._page is not None
        self._page.publish([*self.server.parameters, *self.server.buffers], self.server.version, self.server.steps)

    # --- what workers wait for

    def answer_waiting(self) -> None:
        """Look whether what workers wait for is there by now."""
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
            self.server = ParameterServer(opening, self.settings)
            self._first_version = opening.version
            self._open_page()
        if self.server is None:
            opens = self.control.coordinator == peer.worker
            return Message("join", {"open": True}) if opens else None
        peer.state = "joined"
        self.server.admit(peer.worker, peer.incarnation)
        self.count_live()
        return self._admitted(peer)

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
        assert self.server is not None
        epoch, book = request.values["epoch"], self.server.leases
        peer.epoch = max(peer.epoch, epoch)
        nothing = Message("lease", {"leases": [], "order": False})
        if self.control.stopped:
            return nothing
        coordinates = self.control.coordinator == peer.worker
        if request.payload and not book.has_order(epoch):
            book.begin(epoch, pickle.loads(request.payload))
        if not coordinates:
            if self.server.version - self._first_version < self.settings.warm_start_steps:
                return None
            chief = next((p for p in self.peers if p.worker == self.control.coordinator), None)
            if self.settings.validate == "pause" and chief is not None and (chief.idle or chief.epoch < epoch):
                return None
        if not book.has_order(epoch):
            asked = self._order_asked.get(epoch)
            if asked is not None and asked != peer.worker and self._is_active(asked):
                return None
            self._order_asked[epoch] = peer.worker
            return Message("lease", {"leases": [], "order": True})
        reserve = 0
        if not coordinates:
            # the coordinator trains a batch of every epoch: without one it would not validate at the epoch's end
            reserve = int(any(p.worker == self.control.coordinator and p.leased_epoch < epoch for p in self.peers))
            reserve = max(reserve, self.settings.cooldown_steps if request.values["final"] else 0)
        leases = book.grant(peer.worker, epoch, workers=self.server.live, reserve=reserve, leftovers=coordinates)
        if leases:
            peer.leased_epoch = max(peer.leased_epoch, leases[-1].epoch)
            return Message("lease", {"leases": leases, "order": False})
        # the coordinator ends the epoch: it waits for the others, and takes what the dead leave behind
        return None if coordinates and book.held_by_others(peer.worker, epoch) else nothing

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
        free = self.control.stopped or has_slack(mine, counting, max_staleness=self.settings.max_staleness)
        return Message(request.kind) if free else None

    def _answer_kv(self, peer: Peer, request: Message) -> Message | None:  # noqa: ARG002  # as its siblings
        key, write = request.values["key"], request.values["write"]
        if write and (request.values["replace"] or key not in self._kv):
            self._kv[key] = request.payload
        if key in self._kv:
            return Message("kv", {"found": True}, self._kv[key])
        return None if request.values["wait"] and not self.control.stopped else Message("kv", {"found": False})
