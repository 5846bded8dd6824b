"""How a sequence is cut into blocks, and what the text of a block leaves out."""

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_accel.recurrent import GraphRNN, Recurrent
from lightning_accel.recurrent.compiler import run_blocks

CONF = Path(importlib.import_module("lightning_accel.conf").__file__).parent


def blocks_of(rnn, steps, streams, monkeypatch):
    """Lengths of the blocks that one call runs in."""
    lengths = []
    blocks = run_blocks._blocks

    def watched(*args):
        for begin, end, workspace in blocks(*args):
            lengths.append(end - begin)
            yield begin, end, workspace

    x = torch.randn(steps, streams, 4)
    rnn(x[:2])  # traces and compares
    with monkeypatch.context() as patch:
        patch.setattr(run_blocks, "_blocks", watched)
        rnn(x)
    return lengths


@pytest.mark.parametrize(
    ("hidden", "steps", "streams", "expected"),
    [(64, 600, 4, [256, 256, 88]), (8, 600, 4, [600]), (8, 5_000, 1, [4_096, 904]), (512, 600, 4, [64] * 9 + [24])],
)
def test_narrow_cells_run_in_long_blocks(hidden, steps, streams, expected, monkeypatch):
    rnn = Recurrent(nn.LSTMCell(4, hidden), schedule="intra_stream")
    assert blocks_of(rnn, steps, streams, monkeypatch) == expected


def test_parts_of_one_and_whole_slices_cost_nothing():
    config = yaml.safe_load((CONF / "model" / "recurrent_graph" / "lstm.yaml").read_text())
    nodes = {n: {**v, "size": 4} for n, v in config["nodes"].items()}
    rnn = GraphRNN(nodes, config["edges"], config["inputs"], config["outputs"], schedule="intra_stream")
    y, _ = rnn(torch.randn(3, 2, 4))
    y.sum().backward()
    ((_, schedule),) = next(iter(rnn.rnn.schedules[0]._traced.values())).made.items()
    (wanted, _), *_ = schedule._variants
    text = schedule.source(wanted)
    forward, backward = text.split("def backward(")
    assert "cat" not in forward
    assert "v_primals_1[" not in text
    assert backward.count(".sum(") == 1, "the four biases' gradients are parts of one sum"
