"""What a recurrent step does on a device, shown without one: it reads nothing back, and captured blocks are exact."""

import contextlib

import pytest
import torch
from recurrent_emitted import CELLS, Case, largest_error

from lightning_accel.recurrent.compiler import captured_blocks, executor
from lightning_accel.recurrent.compiler.captured_blocks import CapturedBlocks
from lightning_accel.recurrent.compiler.emit_triton import triton_code
from lightning_accel.recurrent.compiler.executor import StepSchedule
from lightning_accel.recurrent.compiler.trace import TensorSpec


@pytest.mark.parametrize("name", CELLS)
def test_a_step_with_kernels_reads_nothing_back(name, monkeypatch):
    """Tensors without numbers raise where one is read."""
    launched = []
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(triton_code, "launch", lambda kernel, grid, given, constants: launched.append(kernel.__name__))
    case = Case(name, 5, 20, steps=4, streams=3, device="meta")
    results = case.scheduled()
    assert all(r is None or r.device.type == "meta" for r in results)
    assert launched == ["loop_0", "loop_1"]
    assert case.schedule.failure is None


def captured(case, record):
    """Return the case with a schedule whose blocks are recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "CapturedBlocks", lambda function, device: CapturedBlocks(function, device, record))
        specs = [TensorSpec.of(x[0]) for x in case.xs], [TensorSpec.of(s) for s in case.states]
        case.schedule = StepSchedule(case.cell, case.step, *specs)
        case.schedule.captured = True
        case.scheduled()
    return case


@pytest.mark.parametrize("name", CELLS)
def test_captured_blocks_equal_the_loop(name, monkeypatch):
    monkeypatch.setattr(captured_blocks, "_PLAIN_CALLS", 0)
    replayed = []

    def record(function):
        function()
        for tensor in _held(function):  # a graph knows memory, no numbers
            tensor.fill_(torch.nan)
        return lambda: replayed.append(function())

    case = captured(Case(name, 5, 20, steps=70, streams=3, dtype=torch.float64), record)
    assert largest_error(case.scheduled(), case.loop()) <= 1e-12
    assert len(replayed) >= 6


def _held(function):
    (graph,) = [c.cell_contents for c in function.__closure__ if type(c.cell_contents).__name__ == "_Graph"]
    found, stack = [], [graph._inputs, graph._slabs]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            found += [value] if value.dtype.is_floating_point else []
        elif isinstance(value, (dict, list, tuple)):
            stack += value.values() if isinstance(value, dict) else value
    return found


def test_what_can_not_be_captured_runs_plainly(monkeypatch):
    monkeypatch.setattr(captured_blocks, "_PLAIN_CALLS", 0)

    def record(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    case = captured(Case("lstm", 5, 20, steps=40, streams=3, dtype=torch.float64), record)
    assert largest_error(case.scheduled(), case.loop()) <= 1e-12
    (code,) = {id(c): c for c in case.schedule._variants.values()}.values()
    assert "stream is capturing" in code["forward"].failure
