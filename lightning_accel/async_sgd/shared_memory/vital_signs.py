"""Whether a worker process is alive and gets on: its heartbeat, its progress, and what the system says of it."""

from dataclasses import dataclass

from lightning_accel.async_sgd.policy.pace import UNKNOWN
from lightning_accel.async_sgd.settings import Settings
from lightning_accel.async_sgd.shared_memory.process_state import ProcessState, look_at

_PATIENCE = 10  # times as long for a process that computes, or whose silence has no known cause
_COMPUTES = 0.2  # of the time, at least, in a process that is not merely waiting


@dataclass
class VitalSigns:
    """Watch over one worker.

    A heart that is silent is no death: a long call into C may hold the interpreter, and the heart is a thread. What
    counts is that the process is stopped. And a heart that beats is no life: a worker that gets on with nothing in the
    middle of a batch for longer than it allowed itself (`ControlPage.progress`) hangs.
    """

    settings: Settings
    pid: int | None
    heartbeat: int = 0
    progress: int = -1
    allows: float = float("inf")  # the shortest time that it allowed itself for anything it had measured
    allowed: float = 0.0  # the longest time that it allowed itself for anything
    silent_seconds: float = 0.0
    still_seconds: float = 0.0
    cpu_before: float = 0.0  # seconds computed when it last got on

    def look(
        self,
        seconds: float,
        *,
        heartbeat: int,
        progress: tuple[int, float],
        has_joined: bool,
        others_allow: float = float("inf"),
    ) -> str | None:
        """Take note of what is seen after so many seconds; returns why the worker has to be ended, or None.

        Args:
            seconds: Since the last look.
            heartbeat: Of the worker, see `ControlPage.heartbeat`.
            progress: See `ControlPage.progress`.
            has_joined: Whether it takes part.
            others_allow: Seconds that the others allow themselves, for what this worker has never measured.
        """
        # our own pauses (a suspended machine) must not count as theirs
        seconds = min(seconds, 1.0)
        count, limit = progress
        if limit == UNKNOWN:
            limit = others_allow
        else:
            self.allows = min(self.allows, limit)
        self.silent_seconds = 0.0 if heartbeat != self.heartbeat else self.silent_seconds + seconds
        if count != self.progress or limit == float("inf"):
            self.still_seconds, self.progress = 0.0, count
        elif self.still_seconds == 0.0:
            state = look_at(self.pid)
            self.cpu_before = 0.0 if state is None else state.cpu_seconds
            self.still_seconds = seconds
        else:
            self.still_seconds += seconds
        self.heartbeat = heartbeat
        return self._reason_of_silence(has_joined=has_joined) or self._reason_of_stillness(limit)

    def _reason_of_silence(self, *, has_joined: bool) -> str | None:
        most = self.settings.heartbeat_seconds
        if self.silent_seconds <= most:
            return None
        state = look_at(self.pid)
        if not has_joined and (state is None or not state.stopped):
            return None  # a start takes what it takes, and its heart need not beat yet
        if state is not None and not state.stopped and self.silent_seconds <= _PATIENCE * most:
            return None  # holds the interpreter
        how = "silent" if state is None or not state.stopped else "stopped"
        return f"was {how} for {self.silent_seconds:.0f} s"

    def _reason_of_stillness(self, limit: float) -> str | None:
        if self.still_seconds <= limit:
            return None
        state = look_at(self.pid)
        if state is not None and state.stopped:
            return None  # its silence is counted
        measured = self.settings.stall_seconds is None
        if measured and self._computes(state) and self.still_seconds <= _PATIENCE * limit:
            return None
        return f"hung for {self.still_seconds:.0f} s in the middle of a batch"

    def _computes(self, state: ProcessState | None) -> bool:
        return state is not None and state.cpu_seconds - self.cpu_before > _COMPUTES * self.still_seconds
