"""The life of the workers of a run on one machine, seen from the parent process: started, watched, replaced.

One thread, one loop, no locks. A worker may be killed at any instant: it takes part only through a socket that never
blocks the server and a mailbox whose pushes are there as a whole or not at all.
"""

import contextlib
import logging
import os
import pickle
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from lightning_accel.async_sgd.policy.server import LogEntry
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Channel, ChannelClosedError, Message
from lightning_accel.async_sgd.shared_memory.peers import Peer, WorkerProcess
from lightning_accel.async_sgd.shared_memory.service import Service
from lightning_accel.async_sgd.store import Opening, Snapshot, Statistics

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.05
_GRACE_SECONDS = 5.0
STOP, COORDINATOR, LIVE, GENERATION, FIRST_HEARTBEAT = 0, 1, 2, 3, 8  # words of the control page


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
        state: The server's own parameters, buffers and optimizers; None if the run never opened.
    """

    result: bytes
    snapshot: Snapshot | None
    statistics: Statistics
    log: list[LogEntry] = field(default_factory=list)
    state: Opening | None = None


class Supervisor:
    """Run ``workers`` processes around one `Service` until they are done.

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
        self.peers: list[Peer] = []
        self.service = Service(workers, settings, self.peers)
        self._workers = workers
        self._start = start
        self._on_tick = on_tick
        self._selector = selectors.DefaultSelector()
        self._called_back = 0
        self._ticked = time.monotonic()
        self._former: list[Peer] = []  # left, and since then called back

    def run(self) -> Ending:
        """Serve until every worker has left.

        Raises:
            WorkerFailedError: If a worker raised an exception.
            RuntimeError: If every worker died and none could be started again.
        """
        try:
            with _threads_beside(self._workers):
                for worker in range(self._workers):
                    self.peers.append(self._launch(worker, 0))
                while any(peer.active for peer in self.peers) and self.service.failure is None:
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
                self.service.handle(peer, message)
        now = time.monotonic()
        if now - self._ticked >= _TICK_SECONDS:
            self._tick(now - self._ticked)
            self._ticked = now
        self.service.answer_waiting()

    def _tick(self, seconds: float) -> None:
        service = self.service
        for peer in list(self.peers):
            if peer.state == "left" or not peer.active:
                continue
            if peer.process.exitcode is not None:
                self._bury(peer)
                continue
            heartbeat = service.control.heartbeat(peer.worker)
            # our own pauses (a suspended machine) must not count as theirs
            peer.silent_seconds = 0.0 if heartbeat != peer.heartbeat else peer.silent_seconds + min(seconds, 1.0)
            peer.heartbeat = heartbeat
            if peer.state != "joined":
                peer.silent_seconds = 0.0  # a start takes what it takes, and its heart does not beat yet
            if peer.silent_seconds > self.settings.heartbeat_seconds:
                log.warning("worker %d was silent for %.0f s; ending it.", peer.worker, peer.silent_seconds)
                peer.process.kill()
                peer.silent_seconds = 0.0
        if service.stopped_at is not None and time.monotonic() - service.stopped_at > _GRACE_SECONDS:
            for peer in self.peers:
                if peer.active and peer.process.exitcode is None:
                    log.warning("worker %d did not stop when the run was over; ending it.", peer.worker)
                    peer.process.kill()
        service.ring_waiting()
        if self._on_tick is not None and service.server is not None:
            self._on_tick(service.server.statistics())

    def _flush(self, peer: Peer) -> bool:
        try:
            return peer.channel.flush(wait=False)
        except ChannelClosedError:
            return True  # its death shows in its exit code

    # --- life and death

    def _launch(self, worker: int, incarnation: int) -> Peer:
        self.service.control.clear(worker)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            process = self._start(worker, incarnation, theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        peer = Peer(worker, incarnation, process, Channel(ours))
        self._selector.register(peer.channel, selectors.EVENT_READ, peer)
        return peer

    def _bury(self, peer: Peer) -> None:
        """See to it that what a dead worker has committed counts, and what it has not goes to others."""
        service = self.service
        for message in self._last_words(peer):
            service.handle(peer, message)
        if peer.state == "left":
            return
        service.drain(peer)
        peer.state = "dead"
        self._release(peer)
        freed = service.dismiss(peer)
        code = peer.process.exitcode
        log.warning("worker %d ended with code %s; %d of its batches go to others.", peer.worker, code, freed)
        stopping = service.control.stopped
        if not stopping and peer.incarnation < self.settings.max_restarts:
            service.restarts += 1
            self.peers[self.peers.index(peer)] = fresh = self._launch(peer.worker, peer.incarnation + 1)
            log.info("worker %d started again (process %s).", fresh.worker, fresh.process.pid)
        if service.control.coordinator == peer.worker and not stopping:
            service.appoint()

    def _last_words(self, peer: Peer) -> list[Message]:
        try:
            return peer.channel.poll()
        except (ChannelClosedError, OSError):
            return []

    def _release(self, peer: Peer) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it is not registered if its end was seen before
            self._selector.unregister(peer.channel)
        peer.channel.close()
        if peer.mailbox is not None:
            peer.mailbox.segment.close()

    def _call_back(self) -> None:
        """Start a worker again that has left, if another died with the last batches after this one was told of no more.

        Only then is nobody left to train on them, or to end the run; it happens once a worker at most.
        """
        service = self.service
        if service.control.stopped or any(peer.active for peer in self.peers) or self._called_back >= self._workers:
            return
        left = [peer for peer in self.peers if peer.state == "left"]
        ended = any(peer.worker == service.control.coordinator for peer in left)
        if not left or (ended and not service.unfinished()):
            return
        self._called_back += 1
        service.control.coordinator = left[0].worker
        log.warning("worker %d is started again for the batches that a dead worker left.", left[0].worker)
        self.peers[self.peers.index(left[0])] = self._launch(left[0].worker, left[0].incarnation + 1)
        self._former.append(left[0])

    # --- the end

    def _close(self) -> None:
        for peer in self.peers + self._former:
            self._release(peer)
            peer.process.join(_GRACE_SECONDS if self.service.failure is None and peer.state == "left" else 0.0)
            if peer.process.exitcode is None:
                peer.process.kill()
                peer.process.join()
        self.service.close()
        self._selector.close()

    def _ending(self) -> Ending:
        service = self.service
        if service.failure is not None:
            text = service.failure.values["traceback"]
            error = WorkerFailedError(f"worker {service.failure.values['worker']} failed:\n{text}")
            try:
                cause = pickle.loads(service.failure.payload)
            except Exception:  # an exception that pickles need not unpickle
                cause = None
            raise error from cause
        if not service.results:
            raise RuntimeError(
                "every worker died and none was left to start again; resume from the last checkpoint with "
                "`fit(ckpt_path=...)`, and allow more with `max_restarts`."
            )
        result = service.results.get(service.control.coordinator, next(iter(service.results.values())))
        server = service.server
        if server is None:
            return Ending(result, None, Statistics())
        lost = server.leases.remaining() if service.unfinished() and not service.stopped_early else 0
        statistics = replace(server.statistics(), lost_batches=lost)
        if lost:
            log.warning("%d batches of the last epoch had nobody left to train on them.", lost)
        return Ending(result, server.snapshot(), statistics, server.log, server.state())


@contextlib.contextmanager
def _threads_beside(workers: int) -> Iterator[None]:
    """Let torch use the cores that the workers leave, at least one, so that the server's steps do not slow theirs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, cores - workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
