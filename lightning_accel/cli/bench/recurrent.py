"""Training steps of recurrent networks: schedules against the plain loop, ``nn.LSTM`` and the measured floor.

The floor is the time of the products alone at the machine's measured rate: input and recurrent products once forward
and twice backward, the recurrent ones step by step, so that their weights are read once a step and a direction.
"""

import copy
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired, time_interleaved
from lightning_accel.recurrent.cells import (
    CoupledGateLSTMCell,
    FeedbackLSTMCell,
    LayerNormLSTMCell,
    MinGRUCell,
    OutputGRUCell,
    PeepholeLSTMCell,
)
from lightning_accel.recurrent.choice import Schedule
from lightning_accel.recurrent.deferral import DeferredCells
from lightning_accel.recurrent.graph_rnn import GraphRNN
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.packed import RunPackedPadded
from lightning_accel.recurrent.scan import linear_scan

INPUT, HIDDEN = 128, 256
_BATCHES = (1, 8, 32)
_CELLS: dict[str, type[PeepholeLSTMCell] | type[LayerNormLSTMCell]] = {
    "peephole LSTM": PeepholeLSTMCell,
    "LayerNorm LSTM": LayerNormLSTMCell,
}
_TARGETS = {128: (4.5, 2.5, 1.3), 512: (4.0, 2.5, 1.2)}
_MEMORY_BATCH = 32


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the rows; ``quick`` leaves out long sequences and the largest batch and takes fewer rounds."""
    rounds = 3 if quick else 9
    for steps in (128,) if quick else (128, 512):
        for name, kind in _CELLS.items():
            yield from _cell_rows(name, kind, steps, _BATCHES[: 2 if quick else 3], rounds, device)
    yield from _graph_rows(_BATCHES[: 2 if quick else 3], rounds, device)
    yield from _deferred_rows(_BATCHES[: 2 if quick else 3], rounds, device)
    if device == "cpu":
        yield _packed_row(128 if quick else 512, rounds)
    yield from _scan_rows((2048,) if quick else (2048, 8192), rounds, device)
    if device == "cpu" and not quick:
        yield from _memory_rows()
    yield from _auto_rows(rounds, device)


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
        variants = {
            "loop": _training_step(_layer(cell, "loop"), x),
            "intra-stream": _training_step(_layer(cell, "intra_stream"), x),
            "nn.LSTM": _training_step(nn.LSTM(INPUT, HIDDEN).to(device), x),
            "floor": _floor(steps, batch, device),
        }
        yield _row(
            f"{name}, H={HIDDEN}, T={steps}, B={batch}", "loop", "intra-stream", variants, rounds, device, target
        )


def _graph_rows(batches: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    for batch, target in zip(batches, (2.0, 1.8, 1.3), strict=False):
        x = torch.randn(128, batch, INPUT, device=device)
        network = lstm_graph("intra_stream").to(device)
        loop = copy.deepcopy(network)
        loop.rnn.schedules[0].schedule = "loop"
        variants = {
            "nn.LSTM": _training_step(nn.LSTM(INPUT, HIDDEN).to(device), x),
            "GraphRNN": _training_step(network, x),
            "loop": _training_step(loop, x),
            "floor": _floor(128, batch, device),
        }
        case = f"LSTM as a graph, H={HIDDEN}, T=128, B={batch}"
        seconds = time_interleaved(variants, rounds=rounds, warmup=2, device=device)
        yield BenchRow(
            suite="recurrent",
            case=case,
            variant="GraphRNN",
            baseline="nn.LSTM",
            ratio=compare_paired(seconds["GraphRNN"], seconds["nn.LSTM"]),
            seconds=_medians(seconds),
            target=target,
            better="at most",
            note="time over nn.LSTM's",
        )


def lstm_graph(schedule: Schedule) -> GraphRNN:
    """Build the LSTM of ``conf/model/recurrent_graph/lstm.yaml`` in the size of the benchmarks."""
    text = (files("lightning_accel.conf") / "model" / "recurrent_graph" / "lstm.yaml").read_text(encoding="utf-8")
    config: Any = OmegaConf.to_container(OmegaConf.create(text))
    nodes = {n: node | {"size": INPUT if n == "x" else HIDDEN} for n, node in config["nodes"].items()}
    return GraphRNN(nodes, config["edges"], config["inputs"], config["outputs"], schedule=schedule)


class LoopOverTwoCells(nn.Module):
    """What a reader would write: two stacked ``nn.LSTMCell``s, one step after another."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.lower, self.upper = nn.LSTMCell(input_size, hidden_size), nn.LSTMCell(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (T, B, I) to (T, B, H)."""
        h1 = c1 = h2 = c2 = x.new_zeros(x.shape[1], self.lower.hidden_size)
        outputs = []
        for t in range(len(x)):
            h1, c1 = self.lower(x[t], (h1, c1))
            h2, c2 = self.upper(h1, (h2, c2))
            outputs.append(h2)
        return torch.stack(outputs)


def _deferred_rows(batches: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    for batch, target in zip(batches, (5.5, 3.0, 1.4), strict=False):
        model = LoopOverTwoCells(INPUT, HIDDEN).to(device)
        x = torch.randn(128, batch, INPUT, device=device)
        plain = _training_step(model, x)
        deferred = DeferredCells(model)
        with deferred.watch():
            plain()

        def scheduled(deferred: DeferredCells = deferred, plain: Callable[[], object] = plain) -> None:
            with deferred.active():
                plain()

        variants = {
            "loop": plain,
            "deferred cells": scheduled,
            "nn.LSTM": _training_step(nn.LSTM(INPUT, HIDDEN, 2).to(device), x),
        }
        case = f"unchanged loop over two nn.LSTMCells, H={HIDDEN}, T=128, B={batch}"
        yield _row(case, "loop", "deferred cells", variants, rounds, device, target)
        deferred.remove()


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

    variants = {"packed kernel": packed, "padded": padded, "nn.LSTM without lengths": _training_step(rnn, x)}
    case = f"packed nn.LSTM, H={HIDDEN}, T={steps}, B={batch}"
    return _row(case, "packed kernel", "padded", variants, min(rounds, 5), "cpu", 8.0 if steps == 512 else None)


def _scan_rows(lengths: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    for steps, target in zip(lengths, (9.0, 12.0), strict=False):
        a = torch.rand(steps, 1, HIDDEN, device=device).requires_grad_()
        b = torch.randn(steps, 1, HIDDEN, device=device).requires_grad_()
        gradient = torch.randn(steps, 1, HIDDEN, device=device)
        inputs = (a, b)
        variants = {
            "unbind loop": _gradients(_unbind_loop, inputs, gradient),
            "scan": _gradients(linear_scan, inputs, gradient),
        }
        yield _row(f"h = a h + b, D={HIDDEN}, T={steps}, B=1", "unbind loop", "scan", variants, rounds, device, target)


def _gradients(
    recurrence: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], gradient: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(recurrence(*inputs), inputs, gradient)


def _unbind_loop(a: Tensor, b: Tensor) -> Tensor:
    state, outputs = None, []
    for a_t, b_t in zip(a.unbind(0), b.unbind(0), strict=True):
        state = b_t if state is None else torch.addcmul(b_t, a_t, state)
        outputs.append(state)
    return torch.stack(outputs)


def _auto_rows(rounds: int, device: str) -> Iterator[BenchRow]:
    cells: tuple[type[nn.Module], ...] = (
        nn.LSTMCell, nn.GRUCell, nn.RNNCell, PeepholeLSTMCell, LayerNormLSTMCell,
        CoupledGateLSTMCell, FeedbackLSTMCell, OutputGRUCell, MinGRUCell,
    )  # fmt: skip
    for kind in cells:
        cell = kind(INPUT, HIDDEN).to(device)
        x = torch.randn(64, 8, INPUT, device=device)
        auto = _layer(cell, "auto")
        variants = {"loop": _training_step(_layer(cell, "loop"), x), "auto": _training_step(auto, x)}
        row = _row(f"auto, {kind.__name__}, H={HIDDEN}, T=64, B=8", "loop", "auto", variants, rounds, device, 1.0)
        chosen = ", ".join(sorted(set(auto.schedules[0].choices.values())))
        yield BenchRow(**{**row.__dict__, "note": f"chose {chosen}"})


def _memory_rows() -> Iterator[BenchRow]:
    for name in _CELLS:
        peaks = {s: _peak_memory(name, s) for s in ("loop", "intra_stream")}
        yield BenchRow(
            suite="recurrent",
            case=f"peak memory, {name}, H={HIDDEN}, T=128, B={_MEMORY_BATCH}",
            variant="intra-stream",
            baseline="loop",
            ratio=compare_paired([float(peaks["intra_stream"])], [float(peaks["loop"])]),
            target=1.1,
            better="at most",
            note=f"growth of memory in two steps, {peaks['intra_stream']} over {peaks['loop']} KiB; no times",
        )


def _peak_memory(name: str, schedule: str) -> int:
    """Return the KiB by which a process of its own grows in two training steps."""
    code = f"from lightning_accel.cli.bench.recurrent import print_peak; print_peak({name!r}, {schedule!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout.split()[-1])


def print_peak(name: str, schedule: Schedule) -> None:
    """Print the growth of this process in two training steps, in KiB; called in a process of its own."""
    torch.set_num_threads(1)
    cell = _CELLS[name](INPUT, HIDDEN)
    layer = _layer(cell, schedule)
    _training_step(layer, torch.randn(4, _MEMORY_BATCH, INPUT))()  # plans and libraries are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = _training_step(layer, torch.randn(128, _MEMORY_BATCH, INPUT))
    step()
    step()
    print(max(1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def _layer(cell: nn.Module, schedule: Schedule) -> Recurrent:
    return Recurrent(copy.deepcopy(cell), schedule=schedule)


def _training_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        layer.zero_grad()
        result = layer(x)
        y = result[0] if isinstance(result, tuple) else result
        y.sum().backward()

    return step


def _floor(steps: int, batch: int, device: str) -> Callable[[], object]:
    """Return what does the products of an LSTM's training step and nothing else."""
    x, d_x = torch.randn(steps * batch, INPUT, device=device), torch.empty(steps * batch, INPUT, device=device)
    gates = torch.randn(steps, batch, 4 * HIDDEN, device=device)
    hidden = torch.randn(steps, batch, HIDDEN, device=device)
    w_ih, w_hh = (torch.randn(4 * HIDDEN, size, device=device) * 0.01 for size in (INPUT, HIDDEN))
    across = w_hh.t().contiguous()
    made_gates = torch.empty_like(gates)
    made_hidden = torch.empty(batch, HIDDEN, device=device)
    sums = [torch.empty_like(w) for w in (w_ih, w_hh)]
    rows_, made_rows = list(hidden.unbind(0)), list(made_gates.unbind(0))
    gate_rows = list(gates.unbind(0))

    def products() -> None:
        torch.mm(x, w_ih.t(), out=made_gates.view(-1, 4 * HIDDEN))
        for h, gate in zip(rows_, made_rows, strict=True):
            torch.mm(h, across, out=gate)
        for gate in gate_rows:
            torch.mm(gate, w_hh, out=made_hidden)
        flat = gates.view(-1, 4 * HIDDEN)
        torch.mm(flat.t(), x, out=sums[0])
        torch.mm(flat.t(), hidden.view(-1, HIDDEN), out=sums[1])
        torch.mm(flat, w_ih, out=d_x)

    return products


def _row(  # noqa: PLR0917
    case: str,
    baseline: str,
    variant: str,
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    target: float | None,
) -> BenchRow:
    seconds = time_interleaved(variants, rounds=rounds, warmup=2, device=device)
    return BenchRow(
        suite="recurrent",
        case=case,
        variant=variant,
        baseline=baseline,
        ratio=compare_paired(seconds[baseline], seconds[variant]),
        seconds=_medians(seconds),
        target=target,
    )


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds.items()}
