"""Threads of OpenMP, with which torch computes, before a fork: they do not survive it, and who needs them waits."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_HARD = 2  # of OpenMP 5.0, `omp_pause_resource_t`: let everything go that is not needed to go on


def rest_threads() -> bool:
    """Let the OpenMP threads of this process end, so that a forked one makes its own; the next parallel loop does here.

    Returns whether that is so: False where the runtime of this process is not known to be able to. For the main thread,
    outside of parallel loops.
    """
    runtimes = _runtimes()
    return bool(runtimes) and all(pause(_HARD) == 0 for pause in runtimes)


def _runtimes() -> list[Callable[[int], int]]:
    """Return what lets the threads of each loaded GNU runtime end; nothing if there is one that cannot, or another."""
    try:
        lines = _MAPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    names = {path: os.path.basename(path) for path in paths}
    if any(name.startswith(("libomp", "libiomp")) for name in names.values()):
        return []  # of LLVM and Intel, which were not tried
    found: list[Callable[[int], int]] = []
    for path in sorted(path for path, name in names.items() if name.startswith("libgomp")):
        try:
            pause = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).omp_pause_resource_all
        except (OSError, AttributeError):  # replaced on disk, or from before OpenMP 5.0
            return []
        pause.restype, pause.argtypes = ctypes.c_int, [ctypes.c_int]
        found.append(pause)
    return found
