"""Start worker processes with `multiprocessing`, each on its end of a socket pair."""

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import torch

from lightning_accel.async_sgd.replicas.processes import start_ranks
from lightning_accel.async_sgd.replicas.work import work_as_rank
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.channel import ChannelClosedError
from lightning_accel.async_sgd.shared_memory.client import SharedMemoryStore
from lightning_accel.async_sgd.shared_memory.peers import WorkerProcess
from lightning_accel.async_sgd.shared_memory.supervisor import Ending, Remains, StartWorker, Supervisor
from lightning_accel.async_sgd.shared_memory.unpicklable import what_cannot_be_pickled
from lightning_accel.async_sgd.store import Statistics
from lightning_accel.machine.openmp import rest_threads

StartMethod = Literal["auto", "fork", "forkserver", "spawn"]
WorkerFunction = Callable[..., Any]  # called with the store and the caller's arguments


def run_workers(
    function: WorkerFunction,
    args: tuple[Any, ...] = (),
    *,
    workers: int,
    settings: Settings,
    on_tick: Callable[[Statistics], None] | None = None,
    start_method: StartMethod = "spawn",
    on_failure: Callable[[Remains], None] | None = None,
    ranks: int = 1,
) -> tuple[Any, Ending]:
    """Run ``function(store, *args)`` in ``workers`` spawned processes around a parameter server in this one.

    The way in without a Trainer. What the coordinator's call returns must be picklable.

    Args:
        function: Importable from its module; joins the ``store``, trains, and returns. It need not `leave`.
        args: Picklable.
        workers: Number of processes, >= 1.
        settings: Of the run.
        on_tick: See `Supervisor`.
        start_method: Of `multiprocessing`; ``forkserver`` starts quickly what its server has imported before, ``fork``
            at once. ``auto``: see `resolve_start_method`.
        on_failure: Called with what the server has when the run does not end well, before the exception (or Ctrl-C)
            goes on to the caller. All processes have ended then.
        ranks: Processes of each worker: a model-parallel replica, whose ranks share a default process group.

    Returns:
        What the coordinator returned, and how the run ended.

    Raises:
        WorkerFailedError: If a worker raised.
        RuntimeError: If all of them died for good.
    """
    supervisor = Supervisor(
        workers, settings, starter(function, args, settings, start_method, ranks=ranks), on_tick=on_tick
    )
    try:
        ending = supervisor.run()
    except BaseException:
        if on_failure is not None:
            on_failure(supervisor.remains())
        raise
    return pickle.loads(ending.result), ending


def starter(
    function: WorkerFunction,
    args: tuple[Any, ...],
    settings: Settings,
    start_method: StartMethod = "spawn",
    *,
    ranks: int = 1,
) -> StartWorker:
    """Return what starts one worker process (or the ``ranks`` of one) for a `Supervisor`."""
    on_cpu = torch.device(settings.optimizer_device).type == "cpu"
    method = resolve_start_method(start_method, on_cpu=on_cpu)
    context: Any = multiprocessing.get_context(method)  # a context without processes, says its type
    task = Task(function, args)

    def start(worker: int, incarnation: int, sock: socket.socket) -> WorkerProcess:
        if method == "fork":
            rest_threads()  # a worker that is started again comes from a process which has computed
        given = task, worker, incarnation
        if ranks == 1:
            return begin(_work, *given, sock, settings, method == "fork")
        return start_ranks(
            ranks,
            lambda rank, places: begin(
                work_as_rank, *given, sock if rank == 0 else None, settings, method == "fork", rank, places
            ),
        )

    def begin(target: Callable[..., None], *values: Any) -> WorkerProcess:
        process: WorkerProcess = context.Process(target=target, args=values, name=f"async-sgd-worker-{values[1]}")
        with _interrupts_ignored():
            try:
                process.start()  # type: ignore[attr-defined]
            except (EOFError, ConnectionError) as error:
                raise RuntimeError(
                    "the process that starts workers has ended; its traceback is above. A script that trains when "
                    'it is imported needs `if __name__ == "__main__":` around that, for workers import it.'
                ) from error
        return process

    return start


def resolve_start_method(wanted: StartMethod, *, threads: int = 1, on_cpu: bool = True) -> StartMethod:
    """Return how to start workers: ``wanted``, and for ``auto`` what is quick here and safe.

    ``fork`` makes a worker of this process within milliseconds, with all that is imported. It is safe as for the
    processes of a DataLoader: on Linux, where no other Python thread may hold a lock, no accelerator is in use, and
    the worker computes with one thread, or the threads of OpenMP can be made to end before (they do not survive a
    fork). Else ``forkserver``.

    Args:
        wanted: By the caller.
        threads: With which a worker is going to compute.
        on_cpu: Whether workers and optimizers compute on CPU.

    Raises:
        ValueError: For ``fork`` where CUDA is in use, which does not survive one.
    """
    if wanted == "fork" and not (on_cpu and not torch.cuda.is_initialized()):
        raise ValueError(
            "`start_method` must be 'auto', 'forkserver' or 'spawn' where CUDA is in use, got 'fork': a forked process "
            "cannot use CUDA, nor one whose parent has used it."
        )
    if wanted != "auto":
        return wanted
    _rest_progress_bars()
    alone = threading.active_count() == 1 and threading.current_thread() is threading.main_thread()
    safe = sys.platform == "linux" and alone and on_cpu and not torch.cuda.is_initialized()
    return "fork" if safe and (threads == 1 or rest_threads()) else "forkserver"


def _rest_progress_bars() -> None:
    """Let the thread end that `tqdm` leaves behind to look after slow bars; the next bar starts it anew."""
    bars: Any = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    if (monitor := getattr(bars, "monitor", None)) is not None:
        monitor.exit()
        bars.monitor = None


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let workers ignore Ctrl-C, which their whole group gets: the parent alone ends the run, and them.

    A child keeps an ignored SIGINT through ``exec``; only the main thread may say so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Task:
    """A function and its arguments, on the way to another process.

    They are pickled apart, so that what cannot be unpickled there is an error of the worker, which can be told, and not
    one of a process that has just begun. Whatever `multiprocessing` can hand over (locks, queues) still can be.
    """

    def __init__(self, function: WorkerFunction, args: tuple[Any, ...]) -> None:
        self._content: tuple[WorkerFunction, tuple[Any, ...]] | bytes = function, args

    def __getstate__(self) -> bytes:
        # called while a process is being started, which is when locks and descriptors may be pickled
        packed = io.BytesIO()
        try:
            ForkingPickler(packed, pickle.HIGHEST_PROTOCOL).dump(self._content)
        except Exception as error:
            # the particular (models, data) comes last among arguments, and is named first
            parts = [*reversed(self._content[1]), self._content[0]] if isinstance(self._content, tuple) else []
            found = next(filter(None, map(what_cannot_be_pickled, parts)), None)
            if found is None:
                raise
            raise TypeError(
                f"`{found}` cannot be pickled, and model, data and callbacks go to worker processes by pickle; make "
                "it in a hook that runs there, such as `setup` or `train_dataloader`, or leave it out in "
                "`__getstate__`."
            ) from error
        return packed.getvalue()

    def __setstate__(self, packed: bytes) -> None:
        self._content = packed

    def unpack(self) -> tuple[WorkerFunction, tuple[Any, ...]]:
        """Return function and arguments."""
        if isinstance(self._content, bytes):
            unpacked: tuple[WorkerFunction, tuple[Any, ...]] = pickle.loads(self._content)
            return unpacked
        return self._content


def _work(  # noqa: PLR0917  # a process is started with a flat list of arguments
    task: Task,
    worker: int,
    incarnation: int,
    sock: socket.socket,
    settings: Settings,
    forked: bool,
) -> None:
    if forked:  # handlers of the process that it was
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # the parent of a forked process is the fork server, which ends with the process that it serves
    store = SharedMemoryStore(worker, incarnation, sock, settings, parent=os.getppid())
    try:
        function, args = task.unpack()
        result = pickle.dumps(function(store, *args))
        coordinates = store.finish()
        store.report(result)
        store.leave(stop=coordinates)
    except ChannelClosedError:
        raise SystemExit(1) from None  # orphaned: nobody is left to report to
    except BaseException as exception:
        store.report_failure(exception, traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        store.close()
