"""When the pushes that workers have written count: at once, or as ways of a round of local steps when it closes."""

import logging
import time
from collections.abc import Sequence

from lightning_accel.async_sgd.policy.drop_notes import DropNotes
from lightning_accel.async_sgd.policy.pushes import OUTER, Outcome, Push
from lightning_accel.async_sgd.policy.server import ParameterServer
from lightning_accel.async_sgd.shared_memory.control import ControlPage
from lightning_accel.async_sgd.shared_memory.peers import Peer

log = logging.getLogger(__name__)


class DecidesOnPushes:
    """What a service does with pushes; the rest is `Service`'s.

    A way of a round stays in the mailbox of its worker, unread, until its round closes. One whose worker dies before
    that is gone with it, and its batches go to others, so each batch is in one way that counts.
    """

    peers: Sequence[Peer]
    control: ControlPage
    notes: DropNotes
    server: ParameterServer | None
    _holder: int | None

    def drain(self, peer: Peer) -> None:
        """Apply every committed push of a worker but ways of a round, publish once, then acknowledge."""
        if self.server is None or peer.mailbox is None or self._holder not in (None, peer.worker):
            return
        done = []
        known = peer.generation == self.control.generation
        changed = False
        while not self._waits_for_round(peer) and (found := peer.mailbox.committed(peer.sequence)) is not None:
            push = peer.decode(self.server, *found) if known else peer.undecoded(found[0])
            coordinates, late = self.control.coordinator == peer.worker, self._is_too_late(peer)
            outcome = self.server.refuse(push) if late else self.server.apply(push, from_coordinator=coordinates)
            changed |= outcome in ("applied", "assigned") or (outcome == "committed" and bool(push.buffers))
            if not late:
                self._say_if_dropped(peer, push, outcome)
            done.append((peer.sequence, outcome))
            peer.sequence += 1
        if changed:
            self._publish()
        if [self.control.acknowledge(peer.worker, *which) for which in done][-1:] == [True]:
            self.ring(peer)

    def close_round(self) -> None:
        """Apply the ways that are there if their round is due; those that came too late for any are refused."""
        if self.server is None or self.server.rounds is None or self._holder is not None:
            return
        for peer in self.peers:
            if peer.active and self._is_too_late(peer):  # its way may have waited since before the end
                self.drain(peer)
        pushed = {peer.worker: peer for peer in self.peers if peer.active and self._waits_for_round(peer)}
        able = [peer.worker for peer in self.peers if self._could_push(peer)]
        if not self.server.rounds.is_due(pushed, able, time.monotonic()):
            return
        members = [pushed[worker] for worker in sorted(pushed)]
        pushes = []
        for peer in members:
            assert peer.mailbox is not None
            found = peer.mailbox.committed(peer.sequence)
            assert found is not None
            pushes.append(peer.decode(self.server, *found))
        outcomes = self.server.apply_round(pushes, coordinator=self.control.coordinator)
        for peer, push, outcome in zip(members, pushes, outcomes, strict=True):
            self._say_if_dropped(peer, push, outcome)
        self._publish()
        for peer, outcome in zip(members, outcomes, strict=True):
            peer.sequence += 1
            if self.control.acknowledge(peer.worker, peer.sequence - 1, outcome):
                self.ring(peer)

    def _waits_for_round(self, peer: Peer) -> bool:
        """Whether the next push of a worker is a way that counts only when its round closes."""
        if self.server is None or self.server.rounds is None or peer.mailbox is None or self._is_too_late(peer):
            return False
        found = peer.mailbox.committed(peer.sequence)
        return found is not None and found[0]["optimizer"] == OUTER

    def _is_too_late(self, peer: Peer) -> bool:
        """Whether pushes of a worker are refused: of layers that are no more, or after the run was over."""
        coordinates = self.control.coordinator == peer.worker  # the result is what the coordinator ended with
        return (self.control.stopped and not coordinates) or peer.generation != self.control.generation

    def _say_if_dropped(self, peer: Peer, push: Push, outcome: Outcome) -> None:
        if (note := self.notes.take(peer.worker, outcome, finite=push.finite)) is not None:
            log.warning(note)

    def _could_push(self, peer: Peer) -> bool:
        waits = peer.request is not None and peer.request.kind == "lease"
        takes_part = peer.state == "joined" and not (peer.idle or peer.done or waits)
        return takes_part and not self._is_too_late(peer)

    def ring(self, peer: Peer) -> None:  # noqa: D102
        raise NotImplementedError

    def _publish(self) -> None:
        raise NotImplementedError
