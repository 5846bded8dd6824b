"""The suite for GPUs: on the device where there is one, and to its end on a CPU."""

import json
import subprocess
import sys

import pytest
import torch

from lightning_accel.bench.on_gpu.checks import checks
from lightning_accel.bench.suites import gpu

TIMED = ("_low_rank", "_recurrent", "_projections", "_overhead", "_asynchronous")


@pytest.mark.gpu
def test_every_path_is_right_on_the_device():
    wrong = [(what, error, allowed) for what, error, allowed in checks("cuda", quick=False) if not error <= allowed]
    assert not wrong


@pytest.mark.gpu
def test_the_suite_ends_on_the_device(tmp_path):
    assert gpu.main(tmp_path, "cuda") == 0


@pytest.mark.slow
def test_the_suite_ends_on_a_cpu_marked_as_such_without_hydra(tmp_path):
    blocked = "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf')));"
    code = f"{blocked} from pathlib import Path; from lightning_accel.bench.suites.gpu import main"
    line = f"{code}; sys.exit(main(Path({str(tmp_path)!r}), 'cpu'))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    right = [r for r in found["rows"] if r["case"].startswith("correct")]
    timed = [r for r in found["rows"] if not r["case"].startswith("correct")]
    assert len(right) >= 9
    assert all(r["ratio"]["median"] <= 1.0 for r in right)
    assert all(r["note"].startswith("CPU, small sizes: only shows that it runs") for r in timed)
    assert {r["target"] for r in timed} == {None}
    assert any("ResNet" in r["case"] for r in timed)
    assert any("projection" in r["case"] for r in timed)
    assert any("LayerNorm LSTM" in r["case"] for r in timed)
    assert {"L1InfProjection()", "SequentialFreezing(mode='none')"} <= {r["variant"] for r in timed}
    shared = [r for r in timed if "two asynchronous workers" in r["case"]]
    assert [r["variant"] for r in shared] == ["2 workers", "2 workers, optimizer_device=cpu"]
    assert all(r["ratio"]["median"] > 0.0 and "loss" in r["note"] for r in shared)
    assert "| correct: LSTM, compiled, float32 |" in (tmp_path / "gpu.md").read_text()


def test_a_wrong_result_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "checks", lambda device, quick: iter([("a thing", 0.5, 0.1)]))
    for part in TIMED:
        monkeypatch.setattr(gpu, part, lambda device, small: iter(()))
    assert gpu.main(tmp_path, "cpu") == 1
    said = capsys.readouterr().out
    assert "1 not right" in said
    assert "- correct: a thing: error 5, at most 1 wanted" in said
    assert "- correct: a thing" in (tmp_path / "gpu.md").read_text()


def test_what_does_not_fit_into_the_budget_is_left_out_and_named(monkeypatch, caplog):
    begun = []
    monkeypatch.setattr(gpu, "_BUDGET", -1.0)
    for part in ("_correct", *TIMED):

        def rows(device, small, part=part):
            begun.append(part)
            return iter(())

        rows.__name__ = part
        monkeypatch.setattr(gpu, part, rows)
    assert list(gpu.rows(quick=True, device="cpu")) == []
    assert begun == []
    assert "asynchronous is left out" in caplog.text


def test_tests_for_a_device_are_not_passed_by_a_machine_without_one(request):
    marked = [item for item in request.session.items if item.get_closest_marker("gpu")]
    assert not marked or torch.cuda.is_available()
