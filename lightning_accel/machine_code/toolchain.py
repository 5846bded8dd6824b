"""C text to machine code at run time: the compiler that a machine has, or the reason why there is none.

A compiler may hang (a wrapper on a slow file system, a licence server). Machine code saves parts of a second, so nobody
waits for it longer than `LIMIT_SECONDS`: then the compiler and all that it started are killed, and it is not asked
again.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT_SECONDS = 4.0  # of all compiling that one piece of work waits for, by the clock on the wall

_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-pthread", "-shared", "-fPIC")
_TUNED = ("-march=native", "-mprefer-vector-width=512")  # not every compiler knows them


class CannotCompileError(Exception):
    """There is no machine code to be had; the message says why."""


class _GivenUp:
    """Compilers that did not end in time, by their command."""

    def __init__(self) -> None:
        self.reasons: dict[tuple[str, ...], str] = {}
        self.lock = threading.Lock()


_given_up = _GivenUp()
_budget = threading.local()


@contextlib.contextmanager
def compile_budget(seconds: float = LIMIT_SECONDS) -> Iterator[None]:
    """Let all compiling inside, in this thread, take no longer than ``seconds`` together."""
    before = getattr(_budget, "left", None)
    _budget.left = seconds
    try:
        yield
    finally:
        _budget.left = before


def find_compiler() -> tuple[str, ...] | None:
    """Return the command of a C compiler: ``$CC``, which may have arguments, or ``cc``, ``gcc``, ``clang``."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        try:
            words = shlex.split(name)
        except ValueError:
            continue
        found = shutil.which(words[0]) if words else None
        if found:
            return (found, *words[1:])
    return None


def load(text: str) -> ctypes.CDLL:
    """Compile C text and load it; wait `LIMIT_SECONDS`, or what a `compile_budget` has left.

    Raises:
        CannotCompileError: If there is no compiler, it does not end in time, or the text does not compile.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CannotCompileError("there is no C compiler.")
    with _given_up.lock:
        reason = _given_up.reasons.get(compiler)
    if reason is not None:
        raise CannotCompileError(reason)
    left = getattr(_budget, "left", None)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lightning_accel_", ignore_cleanup_errors=True) as folder:
        try:
            return _opened(_compiled(compiler, text, Path(folder), begun + (LIMIT_SECONDS if left is None else left)))
        finally:
            if left is not None:
                _budget.left = left - (time.monotonic() - begun)


def _compiled(compiler: tuple[str, ...], text: str, folder: Path, deadline: float) -> Path:
    source, library, messages = folder / "text.c", folder / "text.so", folder / "messages"
    source.write_text(text, encoding="utf-8")
    for flags in ((*_FLAGS, *_TUNED), _FLAGS):
        command = [*compiler, *flags, "-o", str(library), str(source), "-lm"]
        if _run(compiler, command, messages, deadline) == 0:
            return library
    said = messages.read_bytes().decode(errors="replace").strip()[:300]
    raise CannotCompileError(f"{compiler[0]} refused the text: {said}")


def _run(compiler: tuple[str, ...], command: list[str], messages: Path, deadline: float) -> int:
    """Run a command in a process group of its own; what it says goes to a file, which no child can hold up."""
    with messages.open("wb") as file:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            raise CannotCompileError(f"{compiler[0]} did not run: {error}") from error
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            reason = f"{compiler[0]} is given up: it had not ended after {LIMIT_SECONDS:g} s."
            with _given_up.lock:
                _given_up.reasons[compiler] = reason
            raise CannotCompileError(reason) from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _opened(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CannotCompileError(f"the compiled text does not load: {error}") from error
