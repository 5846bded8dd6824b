"""C text to machine code at run time: the compiler that a machine has, or the reason why there is none.

Text that changes with every model is compiled in a temporary folder. Text of the package itself is kept in the user's
cache folder, so that a machine compiles it once.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-pthread", "-shared", "-fPIC")
_TUNED = ("-march=native", "-mprefer-vector-width=512")  # not every compiler knows them
_LIMIT_SECONDS = 60


class CannotCompileError(Exception):
    """There is no machine code to be had; the message says why."""


def find_compiler() -> str | None:
    """Return the path of a C compiler."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def load(text: str, *, keep: bool = False) -> ctypes.CDLL:
    """Compile C text and load it.

    Args:
        text: Of functions to be called by name.
        keep: Keep the result in the user's cache folder, under the text, the compiler and the processor; where that
            folder cannot be trusted or written, compile anew.

    Raises:
        CannotCompileError: If there is no compiler, or the text does not compile.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CannotCompileError("there is no C compiler.")
    folder = _cache_folder() if keep else None
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="lightning_accel_") as own:
            return _opened(_compiled(compiler, text, Path(own)))
    kept = folder / f"{_key(compiler, text)}.so"
    if kept.exists():
        try:
            return _opened(kept)
        except CannotCompileError:  # cut short by a full disk
            kept.unlink(missing_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="building_", dir=folder) as own:
            # whole or not at all, whoever else compiles the same now
            os.replace(_compiled(compiler, text, Path(own)), kept)
    except OSError as error:
        raise CannotCompileError(f"{folder} cannot be written: {error}") from error
    return _opened(kept)


def _compiled(compiler: str, text: str, folder: Path) -> Path:
    source, library = folder / "text.c", folder / "text.so"
    source.write_text(text, encoding="utf-8")
    for flags in ((*_FLAGS, *_TUNED), _FLAGS):
        command = [compiler, *flags, "-o", str(library), str(source), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotCompileError(f"{compiler} did not run: {error}") from error
        if done.returncode == 0:
            return library
    raise CannotCompileError(f"{compiler} refused the text: {done.stderr.strip()[:300]}")


def _opened(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CannotCompileError(f"the compiled text does not load: {error}") from error


def _cache_folder() -> Path | None:
    """Return the user's own folder; ``None`` if there is none, or others may write to it."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "lightning_accel"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home, or a read-only one
        return None
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    foreign = hasattr(os, "getuid") and found.st_uid != os.getuid()
    return None if shared or foreign or not os.access(folder, os.W_OK) else folder


def _key(compiler: str, text: str) -> str:
    real = Path(compiler).resolve()
    try:
        version = f"{real} {real.stat().st_mtime_ns}"
    except OSError:
        version = str(real)
    parts = [text, version, _processor(), *_FLAGS, *_TUNED]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _processor() -> str:
    """Name the processor and what it can do, for code is tuned to it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    named = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))
