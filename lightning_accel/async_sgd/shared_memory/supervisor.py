"""The life of the workers of a run on one machine, seen from the parent process: started, watched, replaced.

One thread, one loop, no locks. A worker may be killed at any instant: it takes part only through a socket that never
blocks the server and a mailbox whose pushes are there as a whole or not at all.
"""

import contextlib
import logging
import pickle
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from lightning_accel.async_sgd.policy.pushes import LogEntry
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Channel, ChannelClosedError, Message
from lightning_accel.async_sgd.shared_memory.deferred_signals import DeferredSignals
from lightning_accel.async_sgd.shared_memory.peers import Peer, WorkerProcess
from lightning_accel.async_sgd.shared_memory.service import Service
from lightning_accel.async_sgd.shared_memory.vital_signs import VitalSigns
from lightning_accel.async_sgd.store import Opening, Snapshot, Statistics
from lightning_accel.measure import available_cores

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.05
_ANY = float("inf")  # seconds
_EXIT_SECONDS = 5.0  # that the process of a worker which has left may take to end


StartWorker = Callable[[int, int, socket.socket], WorkerProcess]  # worker, incarnation, its end of the socket


class WorkerFailedError(RuntimeError):
    """A worker raised an exception; its traceback is in the message and the exception is the cause.

    Example:
        >>> from lightning_accel.async_sgd import WorkerFailedError
        >>> issubclass(WorkerFailedError, RuntimeError)
        True
    """


@dataclass
class Ending:
    """How a run ended: results of workers, the server's last state, and what was counted.

    Attributes:
        result: What the coordinator returned (its bytes), or another worker if the coordinator's got lost.
        snapshot: The final cut; None if the run never opened.
        statistics: Final counts.
        log: The server's log, with ``record_log``.
        state: The server's own parameters, buffers and optimizers; None if the run never opened.
        file: Open file (a descriptor) that the worker of the result delivered, which is the receiver's to close.
    """

    result: bytes
    snapshot: Snapshot | None
    statistics: Statistics
    log: list[LogEntry] = field(default_factory=list)
    state: Opening | None = None
    file: int | None = None

    def take_file(self) -> int | None:
        """Return the descriptor of the delivered file, for the caller to close; None if there is none, or no more."""
        file, self.file = self.file, None
        return file


@dataclass(frozen=True)
class Remains:
    """What is left of a run that did not end well.

    Attributes:
        state: The server's parameters, buffers and optimizers; None if the run never opened.
        statistics: Counts so far.
        kv: What workers wrote with `ParameterStore.kv`.
        log: The server's log, with ``record_log``.
    """

    state: Opening | None
    statistics: Statistics
    kv: dict[str, bytes]
    log: list[LogEntry]


class Supervisor:
    """Run ``workers`` processes around one `Service` until they are done.

    Args:
        workers: How many, >= 1.
        settings: Of the run.
        start: Starts one worker process and returns it; it must build a `SharedMemoryStore` on the given socket.
        on_tick: Called about 20 times a second with the statistics, to show them.

    Raises:
        ValueError: If ``workers < 1``, or rounds wait for more.
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
        settings.check_workers(workers)
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
        self._failed_to_start = False
        self._ends: dict[int, str] = {}  # of each worker that died: what was seen last

    def run(self) -> Ending:
        """Serve until every worker has left.

        Raises:
            WorkerFailedError: If a worker raised an exception.
            RuntimeError: If every worker died and none could be started again.
        """
        try:
            with DeferredSignals() as signals, _threads_beside(self._workers):
                for worker in range(self._workers):
                    self.peers.append(self._launch(worker, 0))
                while self._goes_on():
                    self._turn()
                    self._call_back()
                    signals.deliver()
            return self._ending()
        finally:
            self._close()

    # --- one turn of the loop

    def _goes_on(self) -> bool:
        failed = self._failed_to_start or self.service.end.failure is not None
        return not failed and any(peer.active for peer in self.peers)

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
            why = peer.signs.look(
                seconds,
                heartbeat=service.control.heartbeat(peer.worker),
                progress=service.control.progress(peer.worker),
                has_joined=peer.state == "joined",
                others_allow=self._allowed_by_others(peer),
            )
            if why is None and service.end.is_overdue(peer):
                why = "did not stop when the run was over"
            if why is not None and peer.ended_for is None:
                peer.ended_for = why
                log.warning("worker %d %s; ending it.", peer.worker, why)
                peer.process.kill()
        service.ring_waiting()
        if self._on_tick is not None and service.server is not None:
            self._on_tick(service.server.statistics())

    def _allowed_by_others(self, peer: Peer) -> float:
        limits = [other.signs.allows for other in self.peers if other is not peer]
        return max((limit for limit in limits if limit < _ANY), default=_ANY)

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
        signs = VitalSigns(self.settings, process.pid, heartbeat=self.service.control.heartbeat(worker))
        peer = Peer(worker, incarnation, process, Channel(ours), signs)
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
        why = peer.ended_for or f"ended with code {code}"
        self._ends[peer.worker] = why
        if code is not None and code > 0 and not self._has_begun:
            self._failed_to_start = True  # what it wrote itself says why, and another try would end alike
            return
        log.warning("worker %d %s; %d of its batches go to others.", peer.worker, why, freed)
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
            peer.process.join(_EXIT_SECONDS if self.service.end.failure is None and peer.state == "left" else 0.0)
            if peer.process.exitcode is None:
                peer.process.kill()
                peer.process.join()
        self.service.close()
        self._selector.close()

    def _ending(self) -> Ending:
        service = self.service
        if service.end.failure is not None:
            text = service.end.failure.values["traceback"]
            error = WorkerFailedError(f"worker {service.end.failure.values['worker']} failed:\n{text}")
            try:
                cause = pickle.loads(service.end.failure.payload)
            except Exception:  # an exception that pickles need not unpickle
                cause = None
            raise error from cause
        if not service.end.results:
            ends = "; ".join(f"worker {worker} {why}" for worker, why in sorted(self._ends.items()))
            if not self._has_begun:
                raise RuntimeError(
                    f"no worker ever took part: {ends}. What they wrote before they ended says why; a worker process "
                    "imports your program again, and what it is given must be importable there."
                )
            raise RuntimeError(
                f"every worker died ({ends}) and none was left to start again; resume from the last checkpoint with "
                "`fit(ckpt_path=...)`, and allow more with `max_restarts`."
            )
        reported = service.control.coordinator
        if reported not in service.end.results:
            reported = next(iter(service.end.results))
        result, file = service.end.results[reported], service.end.files.pop(reported, None)
        server = service.server
        if server is None:
            return Ending(result, None, Statistics(), file=file)
        if (summary := service.notes.summary()) is not None:
            log.warning(summary)
        lost = server.leases.remaining() if service.unfinished() and not service.end.early else 0
        statistics = replace(server.statistics(), lost_batches=lost)
        if lost:
            log.warning("%d batches of the last epoch had nobody left to train on them.", lost)
        return Ending(result, server.snapshot(), statistics, server.log, server.state(), file)

    @property
    def _has_begun(self) -> bool:
        return self.service.server is not None

    def remains(self) -> Remains:
        """Return what the server has, in the middle of a run or after it failed; nothing of it is a copy."""
        server = self.service.server
        if server is None:
            return Remains(None, Statistics(), dict(self.service.kv), [])
        return Remains(server.state(), server.statistics(), dict(self.service.kv), server.log)


@contextlib.contextmanager
def _threads_beside(workers: int) -> Iterator[None]:
    """Let torch use the cores that the workers leave, at least one, so that the server's steps do not slow theirs."""
    cores = available_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, cores - workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
