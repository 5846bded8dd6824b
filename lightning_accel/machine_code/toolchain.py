"""C text to machine code at run time: the compiler that a machine has, or the reason why there is none."""

import ctypes
import os
import shutil
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


def load(text: str) -> ctypes.CDLL:
    """Compile C text and load it.

    Raises:
        CannotCompileError: If there is no compiler, or the text does not compile.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CannotCompileError("there is no C compiler.")
    with tempfile.TemporaryDirectory(prefix="lightning_accel_") as folder:
        return _opened(_compiled(compiler, text, Path(folder)))


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
