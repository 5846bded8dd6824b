"""What a recurrent step does on a device, shown without one: it reads nothing back, and captured blocks are exact."""

import contextlib

import pytest
import torch
from no_read_back import Watch
from recurrent_emitted import CELLS, Case, largest_error
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_accel.recurrent import Recurrent, schedule_choice, verified_schedules
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


@pytest.fixture
def on_device(monkeypatch):
    """Let schedules run on a device of the name "meta", whose kernels are written down; yields their names."""
    launched = []
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(schedule_choice, "plain_reason", lambda xs, states: None)  # meta tensors run plainly else
    monkeypatch.setattr(executor, "language_of", lambda device: "Triton")
    monkeypatch.setattr(verified_schedules, "verify_in_float64", lambda *_: None)  # there are no numbers to compare
    monkeypatch.setattr(verified_schedules, "verify_call", lambda *_: None)
    monkeypatch.setattr(triton_code, "launch", lambda kernel, grid, given, constants: launched.append(kernel.__name__))
    return launched


def steps_of_training(rnn, make_input, launched):
    """Make four training steps; the first, in which the cell is traced, may look at what it likes."""
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1, momentum=0.9)
    with Watch() as watch:
        for step in range(4):
            watch.strict = False
            given = make_input()  # packing copies its order, and waits for that; so does torch's own
            watch.strict = step > 0
            launched.clear()
            y, last = rnn(*given)
            data = y.data if isinstance(y, PackedSequence) else y
            total = data.cos().sum() + sum(s.sin().sum() for s in (last if isinstance(last, tuple) else (last,)))
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
    return len(watch.operations)


TWO_INPUTS = ("zoneout",)


@pytest.mark.parametrize("name", [name for name in CELLS if name not in TWO_INPUTS])
def test_a_training_step_of_a_recurrent_layer_reads_nothing_back(name, on_device):
    cell = CELLS[name](5, 20).to("meta")
    count = 2 if name == "lstm" else getattr(cell, "num_states", 1)
    states = tuple(torch.zeros(3, 20, device="meta") for _ in range(count))
    rnn = Recurrent(cell, schedule="compiled")

    def make_input():
        return torch.empty(6, 3, 5, device="meta"), states[0] if name in ("gru", "rnn") else states

    assert steps_of_training(rnn, make_input, on_device) > 0
    assert rnn.schedules[0].refusals == {}
    assert on_device == ["loop_0", "loop_1"]


def test_packed_sequences_and_lengths_read_nothing_back(on_device):
    lengths = torch.tensor([3, 6, 1])

    def packed():
        return (pack_padded_sequence(torch.empty(6, 3, 5, device="meta"), lengths, enforce_sorted=False),)

    def padded_there():
        return torch.empty(6, 3, 5, device="meta"), None, lengths.to("meta", non_blocking=True)

    def padded_here():
        return torch.empty(6, 3, 5, device="meta"), None, lengths

    for make_input in (packed, padded_here, padded_there):
        rnn = Recurrent(nn.LSTMCell(5, 20, device="meta"), schedule="compiled")
        assert steps_of_training(rnn, make_input, on_device) > 0
        assert rnn.schedules[0].refusals == {}
        assert on_device == ["loop_0", "loop_1"]


def test_both_directions_read_nothing_back(on_device):
    rnn = Recurrent(nn.LSTMCell(5, 20, device="meta"), bidirectional=True, schedule="compiled")

    def make_input():
        return torch.empty(6, 3, 5, device="meta"), None, torch.tensor([3, 6, 1])

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = rnn

        def forward(self, *given):
            y, (there, back) = self.rnn(*given)
            return y, (*there, *back)

    steps_of_training(Flat(), make_input, on_device)
    assert on_device == ["loop_0", "loop_0", "loop_1", "loop_1"]


def test_a_look_at_a_recurrent_result_is_seen(on_device):
    rnn = Recurrent(nn.GRUCell(5, 20, device="meta"), schedule="compiled")

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = rnn

        def forward(self, x):
            y, last = self.rnn(x)
            return y * float(y.detach().mean()), last

    with pytest.raises(Exception, match=r"meta|waits for the device"):
        steps_of_training(Looking(), lambda: (torch.empty(6, 3, 5, device="meta"),), on_device)


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
