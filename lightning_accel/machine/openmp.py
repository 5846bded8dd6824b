"""Threads of OpenMP, with which torch computes: machine code shares them, and before a fork they have to end.

They do not survive a fork, and who needs them then waits. Between torch's operations they stay awake for a while, each
on a core of its own, so that threads which machine code starts beside them share a core with one that only waits.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")
_HARD = 2  # of OpenMP 5.0, `omp_pause_resource_t`: let everything go that is not needed to go on


def rest_threads() -> bool:
    """Let the OpenMP threads of this process end, so that a forked one makes its own; the next parallel loop does here.

    Returns whether that is so: False where the runtime of this process is not known to be able to. For the main thread,
    outside of parallel loops.
    """
    runtimes = _runtimes()
    return bool(runtimes) and all(pause(_HARD) == 0 for pause in runtimes)


@functools.cache
def team_of_torch() -> int | None:
    """Return the address of ``GOMP_parallel`` in torch's OpenMP runtime; ``None`` where that is not known to be GNU's.

    The function is ``void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags)``: it calls
    ``work`` on the calling thread and on others of its team, and returns when all are done.
    """
    paths = _loaded_runtimes()
    folder = Path(torch.__file__).parent.resolve() / "lib"
    own = [path for path in paths if Path(path).parent == folder] or paths
    if len(own) != 1 or not os.path.basename(own[0]).startswith("libgomp"):
        return None
    try:
        parallel = ctypes.CDLL(own[0], mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
    except (OSError, AttributeError):  # replaced on disk, or from before OpenMP 4.0
        return None
    return ctypes.cast(parallel, ctypes.c_void_p).value


def _runtimes() -> list[Callable[[int], int]]:
    """Return what lets the threads of each loaded GNU runtime end; nothing if there is one that cannot, or another."""
    paths = _loaded_runtimes()
    if not all(os.path.basename(path).startswith("libgomp") for path in paths):
        return []  # of LLVM and Intel, which were not tried
    found: list[Callable[[int], int]] = []
    for path in paths:
        try:
            pause = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).omp_pause_resource_all
        except (OSError, AttributeError):  # replaced on disk, or from before OpenMP 5.0
            return []
        pause.restype, pause.argtypes = ctypes.c_int, [ctypes.c_int]
        found.append(pause)
    return found


def _loaded_runtimes() -> list[str]:
    """Return the paths of the OpenMP runtimes in this process: GNU's, LLVM's and Intel's."""
    try:
        lines = _MAPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(path for path in paths if os.path.basename(path).startswith(("libgomp", "libomp", "libiomp")))
