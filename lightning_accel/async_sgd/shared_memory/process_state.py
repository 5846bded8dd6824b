"""What the operating system says of a process: whether it is stopped, and how long it has computed."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessState:
    """One look at a process.

    Attributes:
        stopped: Whether a signal or a debugger holds it, so that nothing of it runs.
        cpu_seconds: Time that all its threads have computed so far.
    """

    stopped: bool
    cpu_seconds: float


def look_at(pid: int | None) -> ProcessState | None:
    """Return the state of a process of this machine; None where it cannot be told, or the process is gone."""
    if pid is None:
        return None
    return _from_proc(pid) if _PROC.joinpath("self").exists() else _from_ps(pid)


def _from_proc(pid: int) -> ProcessState | None:
    try:
        fields = _PROC.joinpath(str(pid), "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    # of proc(5): the third field is the state, the 14th and 15th are user and system time in clock ticks
    ticks = int(fields[11]) + int(fields[12])
    return ProcessState(fields[0] in "Tt", ticks / os.sysconf("SC_CLK_TCK"))


def _from_ps(pid: int) -> ProcessState | None:
    command = ["ps", "-o", "state=", "-o", "time=", "-p", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        state, time = done.stdout.split()
        days, _, clock = time.rpartition("-")  # [[days-]hours:]minutes:seconds
        seconds = 0.0
        for part in clock.split(":"):
            seconds = 60 * seconds + float(part)
        seconds += 86400 * int(days or 0)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return ProcessState(state.startswith("T"), seconds)
