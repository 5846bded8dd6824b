"""What counts as death and as a hang of a worker, and what does not: silence, stops, long calls, slow ends."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lightning_accel.async_sgd import Settings
from lightning_accel.async_sgd.policy.drop_notes import DropNotes
from lightning_accel.async_sgd.policy.pace import Pace
from lightning_accel.async_sgd.shared_memory import process_state, vital_signs
from lightning_accel.async_sgd.shared_memory.deferred_signals import DeferredSignals
from lightning_accel.async_sgd.shared_memory.process_state import ProcessState, look_at
from lightning_accel.async_sgd.shared_memory.run_end import RunEnd
from lightning_accel.async_sgd.shared_memory.vital_signs import VitalSigns

FREE = (0, float("inf"))  # progress without a limit


@pytest.fixture
def state(monkeypatch):
    """What the system says of every process."""
    seen = SimpleNamespace(state=ProcessState(stopped=False, cpu_seconds=0.0))
    monkeypatch.setattr(vital_signs, "look_at", lambda pid: seen.state)
    return seen


def watch(signs, seconds, *, progress=FREE, beats=False, joined=True, cpu=None, state=None):
    """Look once a second for so long; returns what was said first, and when."""
    for second in range(1, seconds + 1):
        if cpu is not None:
            state.state = ProcessState(stopped=False, cpu_seconds=cpu * second)
        heartbeat = second if beats else 0
        why = signs.look(1.0, heartbeat=heartbeat, progress=progress, has_joined=joined)
        if why is not None:
            return second, why
    return None


def test_a_stopped_process_is_dead_after_the_heartbeat(state):
    state.state = ProcessState(stopped=True, cpu_seconds=0.0)
    assert watch(VitalSigns(Settings(heartbeat_seconds=5.0), 1), 20) == (6, "was stopped for 6 s")


def test_a_stopped_process_is_dead_although_it_has_not_joined(state):
    state.state = ProcessState(stopped=True, cpu_seconds=0.0)
    assert watch(VitalSigns(Settings(heartbeat_seconds=5.0), 1), 20, joined=False) == (6, "was stopped for 6 s")


def test_a_start_takes_what_it_takes(state):
    assert watch(VitalSigns(Settings(heartbeat_seconds=5.0), 1), 500, joined=False) is None


def test_a_silent_heart_of_a_process_that_holds_the_interpreter_is_no_death(state):
    assert watch(VitalSigns(Settings(heartbeat_seconds=5.0), 1), 50) is None
    assert watch(VitalSigns(Settings(heartbeat_seconds=5.0), 1), 60) == (51, "was silent for 51 s")


def test_where_the_system_says_nothing_silence_is_death(state):
    state.state = None
    assert watch(VitalSigns(Settings(heartbeat_seconds=5.0), None), 20) == (6, "was silent for 6 s")


def test_a_beating_heart_without_progress_in_a_step_is_a_hang(state):
    signs = VitalSigns(Settings(), 1)
    second, why = watch(signs, 100, progress=(7, 30.0), beats=True)
    assert (second, why) == (32, "hung for 31 s in the middle of a batch")
    assert watch(VitalSigns(Settings(), 1), 500, progress=FREE, beats=True) is None, "outside of a batch"


def test_a_step_that_computes_gets_ten_times_as_long_unless_the_user_said_how_long(state):
    signs = VitalSigns(Settings(), 1)
    assert watch(signs, 299, progress=(7, 30.0), beats=True, cpu=0.9, state=state) is None
    assert watch(VitalSigns(Settings(), 1), 400, progress=(7, 30.0), beats=True, cpu=0.9, state=state)[0] == 302
    chosen = VitalSigns(Settings(stall_seconds=3.0), 1)
    assert watch(chosen, 100, progress=(7, 3.0), beats=True, cpu=0.9, state=state)[0] == 5


def test_a_first_step_may_take_what_the_others_allow_themselves(state):
    signs, unknown = VitalSigns(Settings(), 1), (7, 0.0)
    for second in range(40):
        why = signs.look(1.0, heartbeat=second, progress=unknown, has_joined=True)
        assert why is None, "nobody has measured one"
    for second in range(40):
        why = why or signs.look(1.0, heartbeat=second, progress=unknown, has_joined=True, others_allow=30.0)
    assert why is not None
    assert "in the middle of a batch" in why
    other = VitalSigns(Settings(), 1)
    for limit in (float("inf"), 80.0, 300.0, 0.0):
        other.look(1.0, heartbeat=0, progress=(int(limit == 80.0), limit), has_joined=True)
    assert other.allows == 80.0


def test_a_stopped_process_does_not_hang(state):
    state.state = ProcessState(stopped=True, cpu_seconds=0.0)
    assert watch(VitalSigns(Settings(), 1), 300, progress=(7, 30.0), beats=True) is None


def test_our_own_pause_is_not_theirs(state):
    signs = VitalSigns(Settings(heartbeat_seconds=5.0), None)
    assert signs.look(3600.0, heartbeat=0, progress=(0, 2.0), has_joined=True) is None


def test_the_system_says_whether_a_process_is_stopped_and_how_long_it_computed(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        assert not look_at(child.pid).stopped
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert look_at(child.pid).stopped
        seen = process_state._from_ps(child.pid) if os.path.exists("/bin/ps") else None
        assert seen is None or seen.stopped
    finally:
        child.kill()
        child.communicate()
    assert look_at(child.pid) is None, "gone"
    assert look_at(None) is None
    assert look_at(os.getpid()).cpu_seconds > 0.0


def test_without_proc_the_state_comes_from_ps(monkeypatch):
    said = SimpleNamespace(stdout="T   1-02:03:04\n")
    monkeypatch.setattr(process_state.subprocess, "run", lambda *_, **__: said)
    assert process_state._from_ps(1) == ProcessState(stopped=True, cpu_seconds=((24 + 2) * 60 + 3) * 60 + 4)
    said.stdout = "S+ 0:01.5"
    assert process_state._from_ps(1) == ProcessState(stopped=False, cpu_seconds=1.5)
    said.stdout = ""
    assert process_state._from_ps(1) is None


def test_a_limit_comes_from_the_longest_step_so_far_and_waiting_for_others_does_not_count():
    told, now = [], [0.0]
    pace = Pace(None, told.append, lambda: now[0])
    none = float("inf")

    def last(seconds):
        now[0] += seconds

    pace.begin("step")
    last(0.5)
    pace.end()
    pace.begin("step")
    assert told == [0.0, none, 30.0], "unknown before the first was measured"
    pace.wait(lambda: last(100.0))
    last(4.0)
    pace.begin("load")
    assert told[3:] == [none, 30.0, none, none]
    pace.begin("load")
    assert told[-1] == 300.0, "storage may be slow for a while"
    pace.begin("step")
    assert told[-1] == 80.0, "twenty of the longest"
    pace.end()
    pace.wait(lambda: last(1.0))
    pace.end()
    assert Pace(7.0, told.append).limit("step") == 7.0


def test_the_coordinator_is_never_late_at_the_end_and_the_others_have_as_long_as_it_had():
    now = [0.0]
    end = RunEnd(5.0, lambda: now[0])
    training, ended = SimpleNamespace(done=False), SimpleNamespace(done=True)
    end.over()
    now[0] = 1000.0
    assert not end.is_overdue(training), "the coordinator makes the result"
    end.coordinator_gone()
    assert end.is_overdue(training)
    now[0] = 2004.0
    assert not end.is_overdue(ended)
    now[0] = 2006.0
    assert end.is_overdue(ended)
    assert not RunEnd(5.0, lambda: now[0]).is_overdue(training), "the run is not over"


def test_a_result_of_a_run_that_goes_on_is_forgotten():
    end = RunEnd(5.0)
    end.results[0] = b"too early"
    descriptor = os.open(os.devnull, os.O_RDONLY)
    end.keep_file(0, descriptor)
    end.forget_result(0)
    end.forget_result(1)
    assert end.results == {}
    assert end.files == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_dropped_gradients_are_spoken_of_but_not_each_time():
    notes = DropNotes(16)
    said = [notes.take(1, "dropped", finite=False) for _ in range(100)]
    assert said[0] == (
        "a gradient of worker 1 had NaN or Inf: it was dropped, and its batch counts as seen (1 so far)."
    )
    assert [i + 1 for i, text in enumerate(said) if text] == [1, 10, 100]
    assert said[9].startswith("the last 10 gradients of worker 1 all had NaN or Inf and were dropped")
    assert notes.take(0, "applied", finite=True) is None
    assert "more than `drop_beyond=16` steps old" in notes.take(0, "dropped", finite=True)
    assert notes.take(0, "dropped", finite=True) is None
    assert notes.summary().startswith("100 gradients had NaN or Inf and were dropped (100 of worker 1)")
    assert DropNotes(1).summary() is None


def test_an_interrupt_waits_for_a_safe_moment():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with DeferredSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert came == []
            signals.deliver()
            assert came == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
        assert came == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, before)
