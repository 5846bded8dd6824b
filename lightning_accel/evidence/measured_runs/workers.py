"""One persistent process an arm: imports are paid once, and its peak memory is its own."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from lightning_accel.evidence.measured_runs.runs import MakeFit, Run

_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: Shown in tables.
        make: Builds trainer, module and data; must be picklable (a function of a module, or a partial of one).
        make_warmup: Builds the discarded run, which may be shorter; ``None`` is ``make``.
        threads: Of torch in this arm's process; ``None`` leaves torch's own choice.
        count_flops: Whether to count operations; a compiled module would have to leave its compiled code for that.
        environment: Variables to set in the arm's process before torch is imported.
    """

    name: str
    make: MakeFit
    make_warmup: MakeFit | None = None
    threads: int | None = None
    count_flops: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` must be >= 1 or None, got {self.threads}.")


class WorkerError(RuntimeError):
    """A run failed in its process.

    Attributes:
        details: The process's traceback or last output.
        kind: Name of the exception's class; empty if the process died.
    """

    def __init__(self, message: str, details: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.details = details
        self.kind = kind


class ArmWorker:
    """The process of one arm, started by ``spawn``; use it as a context manager.

    It ignores Ctrl-C (the parent decides what to do about it) and ends when the parent ends, however that comes
    about. What it prints goes to ``log``.
    """

    def __init__(self, arm: Arm, *, log: Path) -> None:
        self.arm = arm
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Its own pipe, which no one writes to: it closes when this process is gone, killed or not.
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve, args=(arm, theirs, lifeline, str(log)), name=f"compare {arm.name}", daemon=False
        )
        with _interrupts_ignored(), _environment(_variables(arm)):
            self._process.start()
        theirs.close()
        lifeline.close()

    def __enter__(self) -> "ArmWorker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    def run(self, *, pair: int, seed: int, order: int, fingerprint: str = "", count_flops: bool = False) -> Run:
        """Run one fit (a warm-up for ``pair < 0``) and return what was measured.

        Raises:
            WorkerError: If the fit raised, or the process died.
        """
        try:
            count = count_flops and self.arm.count_flops
            self._connection.send(
                {"pair": pair, "seed": seed, "order": order, "fingerprint": fingerprint, "count_flops": count}
            )
        except OSError:
            raise self._death() from None
        kind, payload = self._receive()
        if kind == "run":
            return Run.from_dict(payload)
        message = f"the arm `{self.arm.name}` failed: {payload['kind']}: {payload['message']}"
        raise WorkerError(message, payload["traceback"], payload["kind"])

    def describe(self) -> dict[str, str | int]:
        """Return the environment block of this arm's process.

        Raises:
            WorkerError: If the process died.
        """
        self._connection.send("environment")
        return self._receive()[1]

    def close(self) -> None:
        """End the process: asked first, then told, then killed."""
        with contextlib.suppress(OSError):
            self._lifeline.close()
        self._connection.close()
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        for left in Path(tempfile.gettempdir()).glob(f"{_folders_of(self.pid)}*"):  # a killed process cleans up nothing
            shutil.rmtree(left, ignore_errors=True)

    def _receive(self) -> tuple[str, Any]:
        ready = wait([self._connection, self._process.sentinel])
        if self._connection in ready:
            with contextlib.suppress(EOFError, OSError):
                return self._connection.recv()
        raise self._death()

    def _death(self) -> WorkerError:
        self._process.join(_GRACE_SECONDS)
        code = self._process.exitcode
        why = f"exit code {code}"
        if code is not None and code < 0:
            why = f"signal {signal.Signals(-code).name}" + (", out of memory?" if code == -signal.SIGKILL else "")
        tail = ""
        with contextlib.suppress(OSError):
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        return WorkerError(f"the process of the arm `{self.arm.name}` died ({why}).", tail)


def _serve(arm: Arm, requests: Connection, lifeline: Connection, log: str) -> None:
    """Answer requests until the parent hangs up."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    _write_to(log)
    import torch

    from lightning_accel.evidence.measured_runs.runs import measure_fit
    from lightning_accel.measure import environment

    if arm.threads is not None:
        torch.set_num_threads(arm.threads)
    with contextlib.suppress(EOFError):
        while True:
            request = requests.recv()
            if request == "environment":
                requests.send(("environment", environment("cuda" if torch.cuda.is_available() else "cpu")))
                continue
            make = arm.make_warmup if request["pair"] < 0 and arm.make_warmup is not None else arm.make
            answer: tuple[str, object]
            try:
                with tempfile.TemporaryDirectory(prefix=_folders_of(os.getpid()), ignore_cleanup_errors=True) as folder:
                    run = measure_fit(make, arm=arm.name, folder=Path(folder), **request)
                answer = ("run", run.to_dict())
            except Exception as error:
                failure = {"kind": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
                answer = ("error", failure)
            requests.send(answer)  # when the folder is gone: whoever has the last answer ends this process


def _folders_of(pid: int) -> str:
    """Return what the names of the folders begin with in which a process runs its fits."""
    return f"lightning-accel-{pid}-"


def _leave(number: int, _: FrameType | None) -> None:
    """Unwind the stack on SIGTERM, so that processes and folder of a fit go, too; a second one changes nothing."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _end_with_parent(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    timer = threading.Timer(_GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
    os.kill(os.getpid(), signal.SIGTERM)


def _write_to(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _variables(arm: Arm) -> dict[str, str]:
    threads = {} if arm.threads is None else {"OMP_NUM_THREADS": str(arm.threads), "MKL_NUM_THREADS": str(arm.threads)}
    return {**threads, **arm.environment}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Children inherit these; this process gets its own back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A child keeps an ignored SIGINT through ``exec``; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
