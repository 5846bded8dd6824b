"""Workers of asynchronous SGD are killed at every stage of a push: nothing torn, lost, counted twice, or left."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from async_sweep import sweep
from async_workers import PUSH_STAGES, SETTINGS, Killed, check_ending, run_threads, train, train_and_die

from lightning_accel.async_sgd import Settings, WorkerFailedError, run_workers
from lightning_accel.bench.async_chaos import chaos
from lightning_accel.bench.async_faults import kill_sweep, send, shared_memory
from lightning_accel.bench.suites import async_accuracy
from lightning_accel.bench.suites import async_sgd as bench

BOTH = ("here 0 0", "here 1 0")


@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
@pytest.mark.parametrize("stage", PUSH_STAGES)
def test_kill_at_a_stage_leaves_whole_pushes_and_every_batch_once(stage, victim):
    def die(store, pushes, now):
        if store.worker == victim and pushes == 2 and now == stage:
            raise Killed

    ending = run_threads(2, 2, die=die, wait_for=BOTH, max_restarts=0)
    check_ending(ending, 2)
    of_victim = sum(entry.worker == victim for entry in ending.log)
    committed = PUSH_STAGES.index(stage) >= PUSH_STAGES.index("after the flag")
    assert of_victim == 1 + committed


@pytest.mark.parametrize("stage", PUSH_STAGES)
def test_a_worker_that_dies_again_and_again_is_started_again(stage):
    def die(store, pushes, now):
        if store.worker == 1 and store.incarnation < 3 and pushes == 1 and now == stage:
            raise Killed

    ending = run_threads(2, 3, die=die, wait_for=("here 1 3",), max_restarts=3)
    check_ending(ending, 3)
    assert ending.statistics.restarts == 3


def test_a_lone_worker_that_dies_goes_on_where_it_was():
    def die(store, pushes, now):
        if store.incarnation == 0 and pushes == 15 and now == "half-way":
            raise Killed

    ending = run_threads(1, 3, die=die, max_restarts=1)
    check_ending(ending, 3)


def test_when_all_are_dead_for_good_the_run_ends_and_says_what_to_do():
    def die(store, pushes, now):
        if pushes == 2:
            raise Killed

    with pytest.raises(RuntimeError, match=r"every worker died .* resume from the last checkpoint"):
        run_threads(2, 2, die=die, max_restarts=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_staleness": 1},
        {"warm_start_steps": 5, "cooldown_steps": 4},
        {"n_fetch": 3},
        {"validate": "pause", "lease_batches": 1},
    ],
    ids=str,
)
def test_every_rhythm_sees_every_batch_once_and_replays(settings):
    ending = run_threads(2, 2, die=None, wait_for=BOTH, **settings)
    check_ending(ending, 2)


def test_warm_start_and_cool_down_belong_to_the_coordinator():
    ending = run_threads(2, 2, die=None, wait_for=BOTH, warm_start_steps=5, cooldown_steps=4)
    assert {entry.worker for entry in ending.log[:5]} == {0}
    last = [entry for entry in ending.log if entry.leases[0] in {(1, i) for i in range(8, 12)}]
    assert {entry.worker for entry in last} == {0}


def test_the_coordinator_trains_a_batch_of_every_epoch():
    epochs = 40  # of twelve batches, of which the coordinator, stopped at each push, would get few
    pushed = threading.Event()

    def hold_up(store, pushes, now):
        if store.worker == 0 and now == "before":
            pushed.wait(0.01)  # a slow worker

    ending = run_threads(3, epochs, die=hold_up, wait_for=("here 0 0", "here 1 0", "here 2 0"))
    check_ending(ending, epochs)
    of_coordinator = {lease[0] for entry in ending.log for lease in entry.leases if entry.worker == 0}
    assert of_coordinator == set(range(epochs))


def test_with_overlap_every_batch_is_seen_once_and_the_log_replays():
    ending = run_threads(2, 4, die=None, wait_for=BOTH, overlap=True)
    check_ending(ending, 4)
    assert ending.statistics.staleness_mean > 0


@pytest.mark.parametrize("settings", [{"n_push": 3}, {"local_steps": 2}, {"compression": None}], ids=str)
def test_other_pushes_see_every_batch_once(settings):
    from lightning_accel.async_sgd import Compression

    if "compression" in settings:
        settings = {"compression": Compression("topk", kept=0.5)}
    ending = run_threads(2, 2, die=None, wait_for=BOTH, **settings)
    assert ending.statistics.lost_batches == 0
    assert ending.snapshot.epochs == [] or all(len(s["done"]) == len(s["units"]) for s in ending.snapshot.epochs)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "victim"), [("half-way", 1), ("before the flag", 0), ("after the bell", 1)])
def test_sigkill_of_a_process(stage, victim):
    before = shared_memory()
    arguments = (2, stage, victim, BOTH)
    _, ending = run_workers(train_and_die, arguments, workers=2, settings=Settings(**SETTINGS, max_restarts=0))
    check_ending(ending, 2)
    assert shared_memory() <= before


@pytest.mark.slow
def test_processes_killed_stopped_and_hanging_anywhere_and_at_any_time_do_no_harm():
    damage = kill_sweep(76, seed=5)
    assert damage.deaths >= 73
    assert damage.faults["kill of the parent"] == 3
    assert (damage.torn, damage.lost, damage.twice, damage.left) == (0, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_faults_at_every_stage_of_whole_fits_do_no_harm():
    harm, kinds, stages = sweep(24, seed=1)
    del harm["hangs"]  # of a machine that is busy with other tests
    assert harm == {}
    assert kinds.total() >= 24
    assert len(stages) >= 6


@pytest.mark.slow
def test_chaos_loses_no_gradient_and_counts_none_twice():
    found = chaos(6.0, every=0.7, stretch=2.0, seed=3)
    damage = found.damage
    assert sum(damage.faults.values()) >= 4
    assert sum(found.steps) > 0
    assert len(found.steps) == len(found.worker_seconds)
    assert (damage.torn, damage.lost, damage.twice, damage.left) == (0, 0, 0, 0)


def test_the_benchmark_of_accuracy_refuses_a_seed_below_zero():
    with pytest.raises(ValueError, match="`first_seed` must be >= 0"):
        next(async_accuracy.rows(quick=True, first_seed=-1))


@pytest.mark.parametrize(("name", "value"), [("kills", 0), ("chaos_minutes", 0.0)])
def test_the_benchmark_refuses_what_is_no_number_of_faults(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be >"):
        next(bench.rows(quick=True, device="cpu", **{name: value}))


@pytest.mark.slow
def test_a_worker_that_stands_still_is_ended_and_its_batches_go_to_others():
    chosen = Settings(**SETTINGS, max_restarts=0, heartbeat_seconds=2.0)
    _, ending = run_workers(train_and_stand_still, (2,), workers=2, settings=chosen)
    check_ending(ending, 2)


def train_and_stand_still(store, epochs):
    def stand(store, pushes, now):
        if store.worker == 1 and pushes == 2 and now == "half-way":
            os.kill(os.getpid(), signal.SIGSTOP)

    return train(store, epochs, die=stand, wait_for=BOTH)


def test_an_exception_in_a_worker_ends_the_run_and_is_the_cause():
    with pytest.raises(WorkerFailedError, match="ValueError: `epochs` is no number") as caught:
        run_workers(fail, workers=1, settings=Settings())
    assert isinstance(caught.value.__cause__, ValueError)


def fail(store):
    raise ValueError("`epochs` is no number")


PARENT = """
import sys
sys.path.insert(0, {here!r})
from async_workers import SETTINGS
from test_async_faults import train_for_ever
from lightning_accel.async_sgd import Settings, run_workers
if __name__ == "__main__":
    run_workers(train_for_ever, workers=2, settings=Settings(**SETTINGS))
"""


def train_for_ever(store):
    def tell(store, pushes, stage):
        if pushes == 3 and stage == "before":
            os.write(1, f"pid {os.getpid()}\n".encode())  # in one piece: the other worker writes here, too

    return train(store, 10**9, die=tell, wait_for=BOTH)


@pytest.mark.slow
def test_workers_end_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(here=str(Path(__file__).parent)))
    before = shared_memory()
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    try:
        pids = [int(line.split()[1]) for line in (parent.stdout.readline(), parent.stdout.readline())]
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(30)
    deadline = time.monotonic() + 30
    # workers hold the other end of this pipe: it ends when the last of them is gone
    assert parent.stdout.read() == ""
    assert time.monotonic() < deadline
    assert not any(Path(f"/proc/{pid}").exists() and _runs(pid) for pid in pids)
    assert shared_memory() <= before
    parent.stdout.close()


def _runs(pid):
    state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    return state != "Z"


def test_a_signal_to_a_process_that_has_just_ended_is_no_error():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not send(SimpleNamespace(process=ended), signal.SIGKILL)
