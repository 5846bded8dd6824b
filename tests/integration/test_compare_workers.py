import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import compare_fits as fits
import pytest
import torch

from lightning_accel.evidence.measured_runs.ledger import RunLedger
from lightning_accel.evidence.measured_runs.pairs import run_pairs, schedule
from lightning_accel.evidence.measured_runs.workers import Arm, ArmWorker, WorkerError


def _arms(second=fits.burdened):
    return [Arm("plain", fits.plain, threads=1), Arm("accelerated", second, threads=1)]


def test_pairs_run_in_turns_with_the_same_seeds(tmp_path):
    ledger = RunLedger(tmp_path, fingerprint="x")
    seen = []
    environment = run_pairs(_arms(), ledger, pairs=2, seed=5, before_run=seen.append)
    assert seen == schedule(["plain", "accelerated"], pairs=2, seed=5)
    assert [(r.arm, r.pair) for r in ledger.runs] == [(s.arm, s.pair) for s in seen]
    assert environment["threads"] == 1

    whole = ledger.complete_pairs(["plain", "accelerated"])
    for plain, burdened in zip(whole["plain"], whole["accelerated"], strict=True):
        assert plain.seed == burdened.seed == 5 + plain.pair
        assert plain.metrics == burdened.metrics  # the burden changes no number
        assert plain.steps == burdened.steps == 8
        assert [p["epoch"] for p in plain.curve] == [0, 1]
        assert 0 < plain.curve[0]["seconds"] < plain.curve[1]["seconds"] < plain.fit_seconds
        assert burdened.phase_seconds["callbacks"] > plain.phase_seconds["callbacks"]
        assert plain.parameters == 10
        assert plain.checkpoint_bytes > 10 * 4
        assert plain.peak_memory_bytes > 50e6
        assert plain.samples_per_second > 0
        assert plain.step_seconds == pytest.approx(sum(plain.phase_seconds.values()), rel=0.5)
    assert whole["plain"][0].metrics != whole["plain"][1].metrics  # another seed
    # 16 samples, 4 inputs, 2 outputs: forward and the weight's gradient, a multiplication and an addition each
    assert whole["plain"][0].flops == 2 * (2 * 16 * 4 * 2)
    assert whole["plain"][1].flops is None
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [r.to_dict() for r in ledger.runs]


def test_error_of_a_fit_comes_back_with_its_message_and_keeps_finished_rows(tmp_path):
    ledger = RunLedger(tmp_path, fingerprint="x")
    with pytest.raises(WorkerError, match=r"`accelerated` failed: RuntimeError: the loss went for a walk") as error:
        run_pairs(_arms(fits.crashing), ledger, pairs=1)
    assert "on_train_batch_end" in error.value.details
    assert [r.arm for r in RunLedger(tmp_path, fingerprint="x", resume=True).runs] == ["plain"]


def test_death_of_a_process_is_told_with_the_signal_and_its_last_words(tmp_path, monkeypatch):
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setenv("TMPDIR", str(folders))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with ArmWorker(Arm("gone", fits.killed), log=tmp_path / "log") as worker:
        with pytest.raises(WorkerError, match=r"`gone` died \(signal SIGKILL, out of memory\?\)") as error:
            worker.run(pair=0, seed=0, order=0)
        assert "last words" in error.value.details
        with pytest.raises(WorkerError, match="died"):
            worker.run(pair=1, seed=0, order=0)
        assert len(list(folders.glob("lightning-accel-*"))) == 1, "nobody was left to clean up"
    assert list(folders.glob("lightning-accel-*")) == []


def test_worker_leaves_environment_of_the_parent_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LIGHTNING_ACCEL_TEST", raising=False)
    arm = Arm("two", fits.plain, threads=2, environment={"LIGHTNING_ACCEL_TEST": "1"})
    with ArmWorker(arm, log=tmp_path / "log") as worker:
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert "LIGHTNING_ACCEL_TEST" not in os.environ
        assert worker.describe()["threads"] == 2
        assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_folder_of_a_run_is_gone_when_its_answer_comes(tmp_path, monkeypatch):
    """For whoever has the last answer ends the process, in whatever it is about."""
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setenv("TMPDIR", str(folders))
    with ArmWorker(Arm("littering", fits.littering), log=tmp_path / "log") as worker:
        worker.run(pair=0, seed=0, order=0)
        assert list(folders.glob("lightning-accel-*")) == []


def test_worker_dies_with_its_parent_and_leaves_no_folder(tmp_path):
    """A parent killed by SIGKILL can not clean up; its busy worker must notice by itself."""
    folders = tmp_path / "folders"
    folders.mkdir()
    program = f"""
import sys
sys.path.insert(0, {str(Path(fits.__file__).parent)!r})
import compare_fits as fits
from pathlib import Path
from lightning_accel.evidence.measured_runs.workers import Arm, ArmWorker
if __name__ == "__main__":
    worker = ArmWorker(Arm("endless", fits.endless), log=Path({str(tmp_path)!r}) / "log")
    worker.describe()
    print(worker.pid, flush=True)
    worker.run(pair=0, seed=0, order=0)
"""
    script = tmp_path / "parent.py"
    script.write_text(program)
    environment = os.environ | {"TMPDIR": str(folders)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    # The kernel reparents the orphan; a process that is gone, or a zombie that no one reaped yet, runs no more.
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        os.sched_yield()
    assert list(folders.glob("lightning-accel-*")) == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_threads_are_checked():
    with pytest.raises(ValueError, match="`threads` must be >= 1 or None, got 0"):
        Arm("x", fits.plain, threads=0)
    assert torch.get_num_threads() == 1
