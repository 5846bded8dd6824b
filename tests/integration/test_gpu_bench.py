"""The suite for GPUs: on the device where there is one, and to its end on a CPU."""

import json
import subprocess
import sys

import pytest
import torch

from lightning_accel.bench.gpu_checks import checks
from lightning_accel.bench.suites import gpu


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
    assert {r["note"] for r in timed} == {"CPU, small sizes: only shows that it runs"}
    assert {r["target"] for r in timed} == {None}
    assert any("ResNet" in r["case"] for r in timed)
    assert any("projection" in r["case"] for r in timed)
    assert any("LayerNorm LSTM" in r["case"] for r in timed)
    assert "| correct: LSTM, compiled, float32 |" in (tmp_path / "gpu.md").read_text()


def test_a_wrong_result_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "checks", lambda device, quick: iter([("a thing", 0.5, 0.1)]))
    for part in ("_low_rank", "_recurrent", "_projections"):
        monkeypatch.setattr(gpu, part, lambda device, small: iter(()))
    assert gpu.main(tmp_path, "cpu") == 1
    assert "1 not right" in capsys.readouterr().out


def test_tests_for_a_device_are_not_passed_by_a_machine_without_one(request):
    marked = [item for item in request.session.items if item.get_closest_marker("gpu")]
    assert not marked or torch.cuda.is_available()
