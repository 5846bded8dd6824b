"""Training steps of recurrent networks: schedules against the plain loop, ``nn.LSTM`` and the measured floor.

The floor is the time of the products alone at the machine's measured rate: input and recurrent products once forward
and twice backward, the recurrent ones step by step, so that their weights are read once a step and a direction. For
cells of any kind it is that of all products in one piece, for a linear recurrence that of passes over its tensors.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_accel.bench.recurrent.cases import (
    HIDDEN,
    INPUT,
    Decoder,
    LoopOverGRUCell,
    LoopOverLSTMCell,
    LoopOverPeephole,
    LoopOverTwoCells,
    LoopThatLooks,
    floor,
    floor_in_one_piece,
    gradients,
    layer_of,
    peak_kib,
    scan_floor,
    training_step,
    unbind_loop,
)
from lightning_accel.bench.recurrent.diagonal_cells import DiagonalGRUCell, NewtonOverTime
from lightning_accel.bench.recurrent.graph_rows import graph_rows, small_rows
from lightning_accel.bench.recurrent.matrix_cells import (
    AttentionMemory,
    DeltaRule,
    DiagonalStateSpace,
    MatrixLSTM,
    matrix_states,
)
from lightning_accel.bench.recurrent.rows import chosen_by, timed_row
from lightning_accel.bench.recurrent.trainer_rows import rows as trainer_rows
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.machine.c_functions import refusal
from lightning_accel.measure import compare_paired
from lightning_accel.recurrent.cells import (
    CoupledGateLSTMCell,
    FeedbackLSTMCell,
    LayerNormLSTMCell,
    MinGRUCell,
    OutputGRUCell,
    PeepholeLSTMCell,
    ZoneoutLSTMCell,
)
from lightning_accel.recurrent.deferred.find_cells import DeferredCells
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.packed.run_padded import RunPackedPadded
from lightning_accel.recurrent.scan import linear_scan
from lightning_accel.recurrent.schedule_choice import Schedule

_BATCHES = (1, 8, 32)
_CELLS: dict[str, type[PeepholeLSTMCell] | type[LayerNormLSTMCell]] = {
    "peephole LSTM": PeepholeLSTMCell,
    "LayerNorm LSTM": LayerNormLSTMCell,
}
_TARGETS = {128: (4.5, 2.5, 1.3), 512: (4.0, 2.5, 1.2)}
# Name, model, its targets, gates of its cells, input sizes of its layers, nn.LSTM or nn.GRU that computes the same.
_LOOPS: tuple[tuple[str, type[nn.Module], tuple[float, ...], int, tuple[int, ...], Callable[[], nn.Module]], ...] = (
    ("two nn.LSTMCells", LoopOverTwoCells, (5.5, 3.0, 1.4), 4, (INPUT, HIDDEN), lambda: nn.LSTM(INPUT, HIDDEN, 2)),
    ("an nn.LSTMCell", LoopOverLSTMCell, _TARGETS[128], 4, (INPUT,), lambda: nn.LSTM(INPUT, HIDDEN)),
    ("an nn.GRUCell", LoopOverGRUCell, _TARGETS[128], 3, (INPUT,), lambda: nn.GRU(INPUT, HIDDEN)),
    ("a peephole cell", LoopOverPeephole, _TARGETS[128], 4, (INPUT,), lambda: nn.LSTM(INPUT, HIDDEN)),
)
_LAYERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.LSTMCell: nn.LSTM,
    nn.GRUCell: nn.GRU,
    nn.RNNCell: nn.RNN,
}
_MEMORY_BATCH = 32
_NOTICED = 5  # batches after which a loop that gains nothing runs plain
_NOT_SLOWER = 0.97  # what a program may measure against itself
_LOOKS = {
    "head": ("with a head a step", 1.3),
    "written": ("that writes every state into one tensor", 1.3),
    "masked": ("that masks its states between the steps", _NOT_SLOWER),  # no step is known before the one before it
    "sampled": ("that is fed its own output now and then", _NOT_SLOWER),  # likewise
}


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the rows; ``quick`` leaves out long sequences and the largest batch and takes fewer rounds."""
    rounds, batches = (3, _BATCHES[:2]) if quick else (6, _BATCHES)  # 6 pairs are enough for a verdict
    for steps in (128,) if quick else (128, 512):
        for name, kind in _CELLS.items():
            yield from _cell_rows(name, kind, steps, batches, rounds, device)
    yield from graph_rows(batches, rounds, device)
    yield from small_rows(3 if quick else 40, device)
    yield from _deferred_rows(batches, rounds, device)
    if device == "cpu":
        yield _packed_row(128 if quick else 512, rounds)
    yield from _scan_rows((2048,) if quick else (2048, 8192), rounds, device)
    if device == "cpu" and not quick:
        yield from _memory_rows()
    yield from _auto_rows((8,) if quick else (8, 32), rounds, device)
    yield from _matrix_rows((1,) if quick else (1, 32), rounds, device)
    yield from _diagonal_rows((512,) if quick else (512, 2048), rounds, device)
    yield from trainer_rows(quick=quick, device=device)


def _cell_rows(  # noqa: PLR0917
    name: str,
    kind: type[PeepholeLSTMCell] | type[LayerNormLSTMCell],
    steps: int,
    batches: tuple[int, ...],
    rounds: int,
    device: str,
) -> Iterator[BenchRow]:
    for batch, target in zip(batches, _TARGETS[steps], strict=False):
        cell = kind(INPUT, HIDDEN).to(device)
        x = torch.randn(steps, batch, INPUT, device=device)
        auto = layer_of(cell, "auto")
        variants = {
            "loop": training_step(layer_of(cell, "loop"), x),
            "auto": training_step(auto, x),
            "in Python": training_step(layer_of(cell, "intra_stream"), x),
            "nn.LSTM": training_step(nn.LSTM(INPUT, HIDDEN).to(device), x),
            "floor": floor(steps, batch, device),
        }
        case = f"{name}, H={HIDDEN}, T={steps}, B={batch}"
        yield timed_row(case, "loop", "auto", variants, rounds, device, target, chosen_by(auto))


def _deferred_rows(batches: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    for name, kind, targets, gates, inputs, native in _LOOPS:
        for batch, target in zip(batches, targets, strict=False):
            x = torch.randn(128, batch, INPUT, device=device)
            beside = {
                "torch's layer": training_step(native().to(device), x),
                "floor": floor(128, batch, device, gates=gates, inputs=inputs),
            }
            yield _deferred_row(f"unchanged loop over {name}", kind().to(device), x, beside, rounds, target)
    x = torch.randn(128, 8, INPUT, device=device)
    beside = {"floor": floor(128, 8, device)}
    yield _deferred_row("decoder that is fed its own output", Decoder().to(device), x, beside, rounds, _NOT_SLOWER)
    x = torch.randn(128, 1, INPUT, device=device)
    beside = {"floor": floor(128, 1, device)}
    for way, (name, target) in _LOOKS.items():
        yield _deferred_row(f"loop {name}", LoopThatLooks(way).to(device), x, beside, rounds, target)


def _deferred_row(  # noqa: PLR0917
    name: str, model: nn.Module, x: Tensor, beside: dict[str, Callable[[], object]], rounds: int, target: float
) -> BenchRow:
    plain = training_step(copy.deepcopy(model), x)
    recorded = training_step(model, x)
    deferred = DeferredCells(model)
    with deferred.watch():
        recorded()

    def scheduled() -> None:
        with deferred.active():
            recorded()

    for _ in range(_NOTICED if beside.keys() == {"floor"} else 1):
        scheduled()
    case = f"{name}, H={HIDDEN}, T={len(x)}, B={x.shape[1]}"
    variants = {"loop": plain, "deferred cells": scheduled, **beside}
    row = timed_row(case, "loop", "deferred cells", variants, rounds, x.device.type, target)
    deferred.remove()
    return row


def _packed_row(steps: int, rounds: int) -> BenchRow:
    batch = 16
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(steps // 2, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    rnn, x = nn.LSTM(INPUT, HIDDEN), torch.randn(steps, batch, INPUT)

    def packed() -> None:
        rnn.zero_grad()
        y, _ = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        pad_packed_sequence(y)[0].sum().backward()

    def padded() -> None:
        with RunPackedPadded():
            packed()

    variants = {
        "packed kernel": packed,
        "padded": padded,
        "nn.LSTM without lengths": training_step(rnn, x),
        "floor": floor(steps, batch, "cpu"),
    }
    case = f"packed nn.LSTM, H={HIDDEN}, T={steps}, B={batch}"
    return timed_row(case, "packed kernel", "padded", variants, rounds, "cpu", 8.0 if steps == 512 else None)


def _scan_rows(lengths: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    for steps, target in zip(lengths, (9.0, 12.0), strict=False):
        a = torch.rand(steps, 1, HIDDEN, device=device).requires_grad_()
        b = torch.randn(steps, 1, HIDDEN, device=device).requires_grad_()
        gradient = torch.randn(steps, 1, HIDDEN, device=device)
        inputs = (a, b)
        variants = {
            "unbind loop": gradients(unbind_loop, inputs, gradient),
            "scan": gradients(linear_scan, inputs, gradient),
            "floor": scan_floor(a, b, gradient),
        }
        yield timed_row(
            f"h = a h + b, D={HIDDEN}, T={steps}, B=1", "unbind loop", "scan", variants, rounds, device, target
        )


def _auto_rows(batches: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    cells: tuple[type[nn.Module], ...] = (
        nn.LSTMCell, nn.GRUCell, nn.RNNCell, PeepholeLSTMCell, LayerNormLSTMCell, CoupledGateLSTMCell,
        ZoneoutLSTMCell, FeedbackLSTMCell, OutputGRUCell, MinGRUCell,
    )  # fmt: skip
    for kind in cells:
        for batch in batches:
            cell = kind(INPUT, HIDDEN).to(device)
            x = torch.randn(64, batch, INPUT, device=device)
            masks = (torch.rand(64, batch, 2 * HIDDEN, device=device) < 0.1).float()
            given = (x, masks) if kind is ZoneoutLSTMCell else x
            auto = layer_of(cell, "auto")
            variants = {
                "loop": training_step(layer_of(cell, "loop"), given),
                "auto": training_step(auto, given),
                "floor": floor_in_one_piece(cell, len(x), batch, device),
            }
            if kind in _LAYERS:
                variants["torch's layer"] = training_step(_LAYERS[kind](INPUT, HIDDEN).to(device), x)
            case = f"auto, {kind.__name__}, H={HIDDEN}, T=64, B={batch}"
            yield timed_row(case, "loop", "auto", variants, rounds, device, 1.0, chosen_by(auto))


def _matrix_rows(batches: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    size, steps = 128, 128
    for kind in (DiagonalStateSpace, DeltaRule, MatrixLSTM, AttentionMemory):
        for batch, target in zip(batches, (4.0, 1.5), strict=False):
            cell = kind(size).to(device)
            state, x = matrix_states(cell, size, batch, device), torch.randn(steps, batch, size, device=device)
            auto = layer_of(cell, "auto")
            variants = {
                "loop": training_step(layer_of(cell, "loop"), x, state),
                "auto": training_step(auto, x, state),
                "floor": floor_in_one_piece(cell, steps, batch, device),
            }
            case = f"{kind.__name__}, a matrix-valued state, D={size}, T={steps}, B={batch}"
            yield timed_row(case, "loop", "auto", variants, rounds, device, target, chosen_by(auto))


def _diagonal_rows(lengths: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    size = 128
    for steps in lengths:
        cell = DiagonalGRUCell(size).to(device)
        start, x = torch.zeros(1, size, device=device), torch.randn(steps, 1, size, device=device)
        auto, newton = layer_of(cell, "auto"), NewtonOverTime(copy.deepcopy(cell))
        variants = {
            "loop": training_step(layer_of(cell, "loop"), x, start),
            "auto": training_step(auto, x, start),
            "Newton over time": training_step(newton, x, start),
            "floor": floor_in_one_piece(cell, steps, 1, device),
        }

        def said(auto: Recurrent = auto, newton: NewtonOverTime = newton) -> str:
            return f"{chosen_by(auto)()}; {newton.iterations} iterations of Newton's method"

        case = f"DiagonalGRUCell, D={size}, T={steps}, B=1"
        yield timed_row(case, "loop", "auto", variants, rounds, device, 10.0, said)


def _memory_rows() -> Iterator[BenchRow]:
    best: Schedule = "intra_stream" if refusal() else "compiled"
    for name in _CELLS:
        peaks = {s: _peak_memory(name, s) for s in ("loop", best)}
        yield BenchRow(
            suite="recurrent",
            case=f"peak memory, {name}, H={HIDDEN}, T=128, B={_MEMORY_BATCH}",
            variant=best,
            baseline="loop",
            ratio=compare_paired([float(peaks[best])], [float(peaks["loop"])]),
            target=1.1,
            better="at most",
            note=f"growth of memory in two steps, {peaks[best]} over {peaks['loop']} KiB; no times",
        )


def _peak_memory(name: str, schedule: str) -> int:
    """Return the KiB by which a process of its own grows in two training steps."""
    code = f"from lightning_accel.bench.suites.recurrent import print_peak; print_peak({name!r}, {schedule!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout.split()[-1])


def print_peak(name: str, schedule: Schedule) -> None:
    """Print the growth of this process in two training steps, in KiB; called in a process of its own."""
    torch.set_num_threads(1)
    cell = _CELLS[name](INPUT, HIDDEN)
    layer = layer_of(cell, schedule)
    training_step(layer, torch.randn(4, _MEMORY_BATCH, INPUT))()  # plans and libraries are loaded
    before = peak_kib()
    step = training_step(layer, torch.randn(128, _MEMORY_BATCH, INPUT))
    step()
    step()
    print(max(1, peak_kib() - before))
