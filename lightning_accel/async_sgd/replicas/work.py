"""What a process that is one rank of a replica does."""

import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from lightning_accel.async_sgd.replicas.processes import RankPlace, ends_with, take_place
from lightning_accel.async_sgd.replicas.ranks import Ranks
from lightning_accel.async_sgd.replicas.store import LeadersStore, ReplicaStore
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import ChannelClosedError

_KILLED_SECONDS = 60.0


class HasFunction(Protocol):
    """A function and its arguments, on their way to another process, see `spawn.Task`."""

    def unpack(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return function and arguments."""
        ...


def work_as_rank(  # noqa: PLR0917  # a process is started with a flat list of arguments
    task: HasFunction,
    worker: int,
    incarnation: int,
    sock: socket.socket | None,
    settings: Settings,
    forked: bool,
    rank: int,
    places: list[RankPlace],
) -> None:
    """Call the function of ``task`` with a `ReplicaStore`; only the leader, which has a ``sock``, reports."""
    if forked:  # handlers of the process that it was
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()
    leader = None if sock is None else LeadersStore(worker, incarnation, sock, settings, parent=parent)
    ranks = None
    code = 0
    with ends_with(parent):
        try:
            ranks = Ranks(take_place(places, rank))
            store = ReplicaStore(ranks, worker, incarnation, settings, leader)
            function, args = task.unpack()
            result = function(store, *args)
            coordinates = store.finish()
            if leader is not None:
                leader.report(pickle.dumps(result))
                leader.leave(stop=coordinates)
        except ChannelClosedError:
            code = 1  # orphaned: nobody is left to report to
        except BaseException as exception:
            code = 1
            _report(exception, ranks, leader)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Gloo's threads may abort a process that ends otherwise


def _report(exception: BaseException, ranks: Ranks | None, leader: LeadersStore | None) -> None:
    """Tell why this rank ends; where another one ended first, what that one said, or nothing if it was killed."""
    text = traceback.format_exc()
    if leader is None:
        if ranks is not None and "gloo" not in str(exception).lower():
            ranks.tell_leader(text)
        return
    lost = ranks.lost_words() if ranks is not None and "gloo" in str(exception).lower() else None
    if lost is None:
        leader.report_failure(exception, text)
    elif lost:
        leader.report_failure(RuntimeError("a process of the replica failed."), lost)
    else:
        threading.Event().wait(_KILLED_SECONDS)  # the supervisor ends a replica that has lost a rank
