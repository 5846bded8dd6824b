"""A worker's end of a run on one machine: the shared-memory `ParameterStore`."""

import os
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_accel.async_sgd.policy.leases import Lease, LeaseId
from lightning_accel.async_sgd.policy.optimizer_copy import dumps
from lightning_accel.async_sgd.policy.pace import Pace
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import Channel, Message
from lightning_accel.async_sgd.shared_memory.control import ControlPage
from lightning_accel.async_sgd.shared_memory.memory import ParameterPage
from lightning_accel.async_sgd.shared_memory.pushing import PushWriter
from lightning_accel.async_sgd.store import Activity, Membership, MoreUnits, Opening, Snapshot, Statistics

_BEAT_SECONDS = 0.25


def _pass(stage: str) -> None:
    """Do nothing at a stage of a push."""


class SharedMemoryStore:
    """The `ParameterStore` of one machine.

    A thread beats the heart and ends the process when the parent is gone, so that no worker outlives its run.

    Args:
        worker: Number of this worker.
        incarnation: How often it was started before.
        sock: Its end of the socket pair.
        settings: Of the run.
        parent: Process number of the supervisor.
        probe: Called with each of `PUSH_STAGES` as a push passes it; tests kill the process there.
    """

    def __init__(
        self,
        worker: int,
        incarnation: int,
        sock: socket.socket,
        settings: Settings,
        *,
        parent: int,
        probe: Callable[[str], None] = _pass,
    ) -> None:
        self.worker = worker
        self.incarnation = incarnation
        self.settings = settings
        self.probe = probe
        self._channel = Channel(sock)
        self._replies: deque[Message] = deque()
        self._finished_as_coordinator: bool | None = None
        self._sequence = 0
        self._base_version = 0
        self._parameters = 0
        self._generation = 0
        self._page: ParameterPage | None = None
        self._writer: PushWriter | None = None
        self._pull_seconds: float | None = None
        self._closed = threading.Event()
        self._turn = threading.RLock()  # a loader may ask for batches in a thread of its own
        self._pace: Pace | None = None
        welcome = self._ask(Message("hello"))
        control = self._control = ControlPage(welcome.values["workers"], welcome.descriptors[0])
        self._pace = Pace(settings.stall_seconds, lambda limit: control.get_on(worker, limit))
        threading.Thread(target=self._beat, args=(parent,), daemon=True, name="heartbeat").start()

    @property
    def is_coordinator(self) -> bool:
        """Whether this worker validates, checkpoints and reports."""
        if self._finished_as_coordinator is not None:
            return self._finished_as_coordinator
        return self._control.coordinator == self.worker

    @property
    def stopped(self) -> bool:
        """Whether the run is over for everybody."""
        return self._control.stopped

    @property
    def live_workers(self) -> int:
        """Workers taking part."""
        return max(1, self._control.live)

    def join(self, opening: Callable[[], Opening]) -> Membership:
        """Enter the run; see `ParameterStore.join`."""
        reply = self._ask(Message("join"))
        if reply.values["open"]:
            reply = self._ask(Message("join", payload=dumps(opening())))
        self._open(reply)
        return Membership(self.worker, self.incarnation, reply.values["epoch"])

    def _open(self, reply: Message) -> None:
        if self._page is not None and self._writer is not None:
            self._page.segment.close()
            self._writer.close()
        page, mailbox = reply.descriptors
        specs, self._parameters = reply.values["specs"], reply.values["parameters"]
        self._page = ParameterPage(specs, reply.values["counters"], page)
        self._writer = PushWriter(specs, self._parameters, self.settings, mailbox)
        self._generation = reply.values["generation"]

    @property
    def is_current(self) -> bool:
        """Whether the run still has the parameters that were joined; False once layers were exchanged."""
        return self._control.generation == self._generation

    @property
    def parameter_names(self) -> list[str]:
        """Names of the run's parameters, in order."""
        return [spec.name for spec in self._opened().specs[: self._parameters]]

    def hold(self) -> Snapshot:
        """Return a cut that stays the latest until `exchange` or `let_go`: pushes of the others wait."""
        self.wait_for(self._sequence)
        snapshot: Snapshot = pickle.loads(self._ask(Message("hold")).payload)
        return snapshot

    def let_go(self) -> None:
        """End `hold` without an exchange."""
        self._channel.send(Message("let go"))

    def exchange(self, opening: Opening) -> None:
        """Put other parameters and optimizers in the place of the run's; the others see `is_current` and `rejoin`.

        Pushes of the others that are under way are refused; their batches are given out again.
        """
        self._open(self._ask(Message("exchange", payload=dumps(opening))))

    def rejoin(self) -> None:
        """Take part with the parameters that the run has now, under the same number."""
        self.wait_for(self._sequence)
        self._open(self._ask(Message("rejoin")))

    def check(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Compare this worker's tensors with those the run was opened with.

        Raises:
            ValueError: If number, shape or dtype differ.
        """
        specs = self._opened().specs
        tensors = [*parameters, *buffers]
        here = [(tuple(t.shape), t.dtype) for t in tensors]
        there = [(tuple(s.shape), s.dtype) for s in specs]
        if here != there:
            wrong = next((s.name for s, a, b in zip(specs, here, there, strict=False) if a != b), "their number")
            raise ValueError(
                f"worker {self.worker} built another model than the coordinator ({wrong} differs); "
                "build the same layers in every process."
            )

    def pull(self, parameters: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> tuple[int, list[int]]:
        """Copy the latest publication in place; see `ParameterStore.pull`. ``buffers`` may be empty: none is wanted."""
        page = self._opened()
        began = time.perf_counter()
        targets = [None if p is None else p.detach() for p in parameters]
        targets += list(buffers) or [None] * (len(page.specs) - len(parameters))
        assert self._writer is not None
        lane = self._writer.beside(page.segment.bytes, targets)
        self._base_version, steps = page.read_into(targets, lane.copy)
        self._pull_seconds = time.perf_counter() - began
        return self._base_version, steps

    def push(
        self,
        gradients: Sequence[Tensor | None],
        *,
        optimizer: int,
        leases: Sequence[LeaseId] = (),
        groups: list[dict[str, Any]] | None = None,
        buffers: Sequence[Tensor] = (),
        base: Sequence[Tensor] = (),
    ) -> int:
        """Write a push into the free slot and ring; see `ParameterStore.push`."""
        assert self._writer is not None, "join first"
        self._sequence += 1
        self.wait_for(self._sequence - 2)  # whoever is two ahead would write over a push not yet read
        meta: dict[str, Any] = {
            "base_version": self._base_version,
            "optimizer": optimizer,
            "leases": list(leases),
            "groups": groups,
            "pull_seconds": self._pull_seconds,
        }
        self._pull_seconds = None
        self.probe("before")
        self._writer.write(self._sequence, meta, gradients, buffers=buffers, base=base, probe=self.probe)
        self.probe("after the flag")
        self._channel.ring()
        self.probe("after the bell")
        return self._sequence

    def wait_for(self, sequence: int) -> bool:
        """Wait for the acknowledgement of a push; see `ParameterStore.wait_for`."""
        acknowledged, outcome = self._control.acknowledged(self.worker)
        while acknowledged < sequence:
            self._control.wait(self.worker, waiting=True)
            acknowledged, outcome = self._control.acknowledged(self.worker)
            if acknowledged < sequence:
                with self._turn:
                    acknowledged, outcome = self._control.acknowledged(self.worker)
                    if acknowledged < sequence:
                        self._receive()  # sleeps; the server rings whoever waits
                acknowledged, outcome = self._control.acknowledged(self.worker)
            self._control.wait(self.worker, waiting=False)
        if 0 < sequence == self._sequence:
            self.probe("acknowledged")
        return outcome != "refused"

    def wait_for_slack(self) -> None:
        """See `ParameterStore.wait_for_slack`; no message without ``max_staleness``."""
        if self.settings.max_staleness is not None:
            self.wait_for(self._sequence)  # the server's count of our pushes must be ours
            self._ask(Message("slack"))

    def lease(
        self,
        epoch: int,
        order: Callable[[], Sequence[Any]],
        *,
        final: bool = False,
        more: MoreUnits | None = None,
    ) -> list[Lease]:
        """See `ParameterStore.lease`."""
        reply = self._ask(Message("lease", {"epoch": epoch, "final": final}))
        while (known := reply.values["known"]) is not None:
            units, complete = (list(order()), True) if more is None else more(known)
            values = {"epoch": epoch, "final": final, "known": known, "complete": complete}
            reply = self._ask(Message("lease", values, pickle.dumps(units)))
        leases: list[Lease] = reply.values["leases"]
        return leases

    def give_back(self, leases: Sequence[LeaseId]) -> None:
        """See `ParameterStore.give_back`."""
        if leases:
            self._channel.send(Message("give back", {"leases": list(leases)}))

    def begin(self, activity: Activity) -> None:
        """See `ParameterStore.begin`."""
        assert self._pace is not None
        self._pace.begin(activity)

    def rest(self) -> None:
        """See `ParameterStore.rest`."""
        assert self._pace is not None
        self._pace.end()

    def commit(self, leases: Sequence[LeaseId]) -> None:
        """See `ParameterStore.commit`."""
        self._channel.send(Message("commit", {"leases": list(leases)}))

    def kv(self, key: str, value: bytes | None = None, *, replace: bool = False, wait: bool = True) -> bytes | None:
        """See `ParameterStore.kv`."""
        values = {"key": key, "write": value is not None, "replace": replace, "wait": wait}
        reply = self._ask(Message("kv", values, value or b""))
        return reply.payload if reply.values["found"] else None

    def snapshot(self) -> Snapshot:
        """See `ParameterStore.snapshot`."""
        snapshot: Snapshot = pickle.loads(self._ask(Message("snapshot")).payload)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """See `ParameterStore.restore`."""
        self._ask(Message("restore", payload=pickle.dumps(snapshot)))

    def statistics(self) -> Statistics:
        """See `ParameterStore.statistics`."""
        statistics: Statistics = self._ask(Message("statistics")).values["statistics"]
        return statistics

    def idle(self, idle: bool) -> None:
        """See `ParameterStore.idle`."""
        self._channel.send(Message("idle", {"idle": idle}))

    def finish(self) -> bool:
        """See `ParameterStore.finish`."""
        self._finished_as_coordinator = self._ask(Message("finish")).values["coordinates"]
        return self._finished_as_coordinator

    def stop(self, *, complete: bool = False) -> None:
        """See `ParameterStore.stop`."""
        self._ask(Message("stop", {"complete": complete}))

    def leave(self, *, stop: bool = False) -> None:
        """See `ParameterStore.leave`."""
        self._ask(Message("leave", {"stop": stop}))

    def report(self, result: bytes) -> None:
        """Hand the result of this worker to the parent process."""
        self._channel.send(Message("result", payload=result))
        self._channel.flush(wait=True)

    def deliver(self, descriptor: int) -> None:
        """Hand an open file (large values of the result) to the parent process, see `Ending.file`."""
        self._ask(Message("deliver", descriptors=[descriptor]))

    def report_failure(self, exception: BaseException, text: str) -> None:
        """Tell the parent process that this worker raised ``exception``, with its traceback as text."""
        try:
            payload = pickle.dumps(exception)
        except Exception:  # anything may hang on an exception
            payload = b""
        self._channel.send(Message("failed", {"worker": self.worker, "traceback": text}, payload))
        self._channel.flush(wait=True)

    def close(self) -> None:
        """Stop the heart and close the socket."""
        self._closed.set()
        self._channel.close()

    def _opened(self) -> ParameterPage:
        assert self._page is not None, "join first"
        return self._page

    def _ask(self, message: Message) -> Message:
        with self._turn:
            self._channel.send(message)
            while not self._replies:
                self._receive()
            return self._replies.popleft()

    def _receive(self) -> None:
        if self._pace is None:
            self._wait_for_messages()
        else:
            self._pace.wait(self._wait_for_messages)

    def _wait_for_messages(self) -> None:
        self._replies.extend(message for message in self._channel.wait() if message.kind != "bell")

    def _beat(self, parent: int) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            self._control.beat(self.worker)
            if os.getppid() != parent:
                os._exit(1)  # orphaned: nobody is left to report to
