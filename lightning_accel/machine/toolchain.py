"""C text to machine code at run time: the compiler that a machine has, or the reason why there is none.

A compiler may hang (a wrapper on a slow file system, a licence server). Machine code saves parts of a second, so nobody
waits for it longer than `LIMIT_SECONDS`: then the compiler and all that it started are killed, and it is not asked
again. Of a compiler that has worked before, on a busy machine or with a long text, only that text is given up.
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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LIMIT_SECONDS = 4.0  # of all compiling that one piece of work waits for, by the clock on the wall
_MOST_LATE = 3  # texts that a compiler which has worked may not end in time, before it is given up

_FAST, _QUICK = "-O3", "-O1"  # code that runs for long, and code that is compiled in a third of the time
_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-pthread", "-shared", "-fPIC")
_TUNED = ("-march=native", "-mprefer-vector-width=512")  # not every compiler knows them


class CannotCompileError(Exception):
    """There is no machine code to be had; the message says why."""


class _Experience:
    """What is known of compilers, by their command: which have worked, how often they were late, which are given up."""

    def __init__(self) -> None:
        self._worked: set[tuple[str, ...]] = set()
        self._late: Counter[tuple[str, ...]] = Counter()
        self._given_up: dict[tuple[str, ...], str] = {}
        self._lock = threading.Lock()

    def why_given_up(self, compiler: tuple[str, ...]) -> str | None:
        with self._lock:
            return self._given_up.get(compiler)

    def note_work(self, compiler: tuple[str, ...]) -> None:
        with self._lock:
            self._worked.add(compiler)

    def note_late(self, compiler: tuple[str, ...]) -> str:
        """Note that a text was not compiled in time, and return what to say of it."""
        late = f"it had not ended after {LIMIT_SECONDS:g} s."
        with self._lock:
            self._late[compiler] += 1
            if compiler in self._worked and self._late[compiler] < _MOST_LATE:
                return f"{compiler[0]} is stopped at this text: {late}"
            return self._given_up.setdefault(compiler, f"{compiler[0]} is given up: {late}")


_experience = _Experience()
_thread = threading.local()


@contextlib.contextmanager
def compile_budget(seconds: float = LIMIT_SECONDS) -> Iterator[None]:
    """Let all compiling inside, in this thread, take no longer than ``seconds`` together."""
    before = getattr(_thread, "left", None)
    _thread.left = seconds
    try:
        yield
    finally:
        _thread.left = before


@contextlib.contextmanager
def compiling_for_comparison() -> Iterator[None]:
    """Schedules made inside, in this thread, only run for the sake of their numbers."""
    before = is_for_comparison()
    _thread.for_comparison = True
    try:
        yield
    finally:
        _thread.for_comparison = before


def is_for_comparison() -> bool:
    """Tell whether schedules made now, in this thread, only run for the sake of their numbers."""
    return getattr(_thread, "for_comparison", False)


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


def load(text: str, *, quick: bool = False) -> ctypes.CDLL:
    """Compile C text and load it; wait `LIMIT_SECONDS`, or what a `compile_budget` has left.

    Args:
        text: C.
        quick: Compile in a third of the time what only runs for the sake of its numbers.

    Raises:
        CannotCompileError: If there is no compiler, it does not end in time, or the text does not compile.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CannotCompileError("there is no C compiler.")
    reason = _experience.why_given_up(compiler)
    if reason is not None:
        raise CannotCompileError(reason)
    left, level = getattr(_thread, "left", None), _QUICK if quick else _FAST
    begun = time.monotonic()
    deadline = begun + (LIMIT_SECONDS if left is None else left)
    with tempfile.TemporaryDirectory(prefix="lightning_accel_", ignore_cleanup_errors=True) as folder:
        try:
            return _opened(_compiled(compiler, level, text, Path(folder), deadline))
        finally:
            if left is not None:
                _thread.left = left - (time.monotonic() - begun)


def _compiled(compiler: tuple[str, ...], level: str, text: str, folder: Path, deadline: float) -> Path:
    source, library, messages = folder / "text.c", folder / "text.so", folder / "messages"
    source.write_text(text, encoding="utf-8")
    for flags in ((*_FLAGS, *_TUNED), _FLAGS):
        command = [*compiler, level, *flags, "-o", str(library), str(source), "-lm"]
        if _run(compiler, command, messages, deadline) == 0:
            _experience.note_work(compiler)
            return library
    said = messages.read_bytes().decode(errors="replace").strip()[:300]
    raise CannotCompileError(f"{compiler[0]} refused the text: {said}")


def _run(compiler: tuple[str, ...], command: list[str], messages: Path, deadline: float) -> int:
    """Run a command in a process group of its own; what it says goes to a file, which no child can hold up."""
    with messages.open("wb") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(messages.parent)},  # what a killed compiler leaves goes with the folder
            )
        except OSError as error:
            raise CannotCompileError(f"{compiler[0]} did not run: {error}") from error
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise CannotCompileError(_experience.note_late(compiler)) from None
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
