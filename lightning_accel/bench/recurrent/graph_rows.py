"""Rows of LSTMs that are built otherwise than torch's layer, beside it: for the suite ``recurrent``."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from lightning_accel.bench.recurrent.cases import HIDDEN, INPUT, floor, layer_of, lstm_graph, training_step
from lightning_accel.bench.recurrent.rows import chosen_by, medians, times_beside
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired, time_interleaved


def graph_rows(batches: tuple[int, ...], rounds: int, device: str) -> Iterator[BenchRow]:
    """Yield what an LSTM as a graph takes beside torch's layer."""
    for batch, target in zip(batches, (2.0, 1.8, 1.3), strict=False):
        x = torch.randn(128, batch, INPUT, device=device)
        network = lstm_graph("auto").to(device)
        loop = copy.deepcopy(network)
        loop.rnn.schedules[0].schedule = "loop"
        variants = {
            "nn.LSTM": training_step(nn.LSTM(INPUT, HIDDEN).to(device), x),
            "GraphRNN": training_step(network, x),
            "loop": training_step(loop, x),
            "floor": floor(128, batch, device),
        }
        seconds = time_interleaved(variants, rounds=rounds, warmup=1, device=device)
        case = f"LSTM as a graph, H={HIDDEN}, T=128, B={batch}"
        note = times_beside(seconds, "nn.LSTM", "GraphRNN", chosen_by(network.rnn))
        yield _beside_torch(case, "GraphRNN", seconds, target, note)


def small_rows(rounds: int, device: str) -> Iterator[BenchRow]:
    """Yield what an LSTM takes beside torch's layer where the products are small, and what is around them counts."""
    steps, batch, size = 128, 4, 64
    x = torch.randn(steps, batch, size, device=device)
    auto = layer_of(nn.LSTMCell(size, size).to(device), "auto")
    graph = lstm_graph("auto", size, size).to(device)
    layers = {"Recurrent(nn.LSTMCell)": auto, "GraphRNN": graph}
    variants = {name: training_step(layer, x) for name, layer in layers.items()}
    variants["nn.LSTM"] = training_step(nn.LSTM(size, size).to(device), x)
    seconds = time_interleaved(variants, rounds=rounds, warmup=3, device=device)
    for name, layer in {"Recurrent(nn.LSTMCell)": auto, "GraphRNN": graph.rnn}.items():
        two = {key: seconds[key] for key in ("nn.LSTM", name)}
        yield _beside_torch(f"small LSTM, H={size}, T={steps}, B={batch}", name, two, 1.0, chosen_by(layer)())


def _beside_torch(case: str, variant: str, seconds: dict[str, list[float]], target: float, note: str) -> BenchRow:
    return BenchRow(
        suite="recurrent",
        case=case,
        variant=variant,
        baseline="nn.LSTM",
        ratio=compare_paired(seconds[variant], seconds["nn.LSTM"]),
        seconds=medians(seconds),
        target=target,
        better="at most",
        note=note,
    )
