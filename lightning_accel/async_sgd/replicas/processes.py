"""The processes of one replica, which the supervisor sees as one: they start, and end, together."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_accel.async_sgd.shared_memory.peers import WorkerProcess

_LOOK_SECONDS = 0.25
_LAST_WORDS_SECONDS = 5.0  # that the others have to report the same error, once one rank ended with one


@dataclass
class RankPlace:
    """Where one rank of a replica finds the others, on loopback.

    Attributes:
        rank: Its number; 0 leads: it alone speaks with the server.
        size: How many there are.
        port: Of the leader's store, on 127.0.0.1.
        listener: Of that port, bound already; the leader's alone.
        links: To each follower, the leader's; to the leader, a follower's. Memory is handed over through them.
    """

    rank: int
    size: int
    port: int
    listener: socket.socket | None
    links: list[socket.socket]

    def close(self) -> None:
        """Give up this process's copies of the sockets: who holds one of another rank does not see that one end."""
        for sock in (self.listener, *self.links):
            if sock is not None:
                sock.close()


def make_places(size: int) -> list[RankPlace]:
    """Return the places of all ranks of a new replica."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(1, size)]
    leader = RankPlace(0, size, port, listener, [ours for ours, _ in pairs])
    return [leader, *(RankPlace(rank, size, port, None, [theirs]) for rank, (_, theirs) in enumerate(pairs, 1))]


class ReplicaProcess:
    """Several processes as one: when one has died, the others are ended, and then it counts as dead.

    Args:
        processes: Started; the leader first.
    """

    def __init__(self, processes: Sequence[WorkerProcess]) -> None:
        self._processes = list(processes)
        self._failed_at: float | None = None
        self._code: int | None = None  # of the first that died

    @property
    def pid(self) -> int | None:
        """Process number of the leader."""
        return self._processes[0].pid

    @property
    def pids(self) -> list[int | None]:
        """Process numbers of all ranks."""
        return [process.pid for process in self._processes]

    @property
    def exitcode(self) -> int | None:
        """None while any that matters lives; the leader's code if all went well, else that of the first who failed."""
        codes = [process.exitcode for process in self._processes]
        failed = next((code for code in codes if code), None)
        if failed is None:
            return codes[0]  # followers have nothing to hand over, and end with it
        if self._failed_at is None:
            self._failed_at, self._code = time.monotonic(), failed
        # one that raised is soon followed by the leader, which reports why; one that was killed lets the others wait
        patient = self._code is not None and self._code > 0 and codes[0] is None
        if not (patient and time.monotonic() - self._failed_at < _LAST_WORDS_SECONDS):
            self.kill()
        return self._code if all(process.exitcode is not None for process in self._processes) else None

    def kill(self) -> None:
        """Kill all that are left."""
        for process in self._processes:
            if process.exitcode is None:
                process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait until all have ended, at most ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for process in self._processes:
            process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))


def take_place(places: Sequence[RankPlace], rank: int) -> RankPlace:
    """Return the place of this process, and give up the others'."""
    for place in places:
        if place.rank != rank:
            place.close()
    return places[rank]


def start_ranks(size: int, start: Callable[[int, list[RankPlace]], WorkerProcess]) -> ReplicaProcess:
    """Start the processes of a replica; if one cannot be started, those before it are ended.

    Args:
        size: How many.
        start: Starts the one of this rank, which must `take_place` among the given ones.
    """
    places = make_places(size)
    processes: list[WorkerProcess] = []
    try:
        for rank in range(size):
            processes.append(start(rank, places))  # noqa: PERF401  # those before are needed if one fails
    except BaseException:
        ReplicaProcess(processes).kill()
        raise
    finally:
        for place in places:
            place.close()
    return ReplicaProcess(processes)


@contextlib.contextmanager
def ends_with(parent: int) -> Any:
    """End this process, a follower, when its parent is gone; its leader does so by its own heart."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            if os.getppid() != parent:
                os._exit(1)

    threading.Thread(target=look, daemon=True, name="parent-watch").start()
    try:
        yield
    finally:
        over.set()
