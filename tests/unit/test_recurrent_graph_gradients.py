"""Gradients of scheduled recurrences are autograd's: each within 1e-12 of the largest entry of its own tensor.

The relative error of a gradient g against the loop's g0 is ``max |g - g0| / max |g0|``, for every input, state and
parameter tensor by itself, in float64; a gradient that is zero has to be zero.
"""

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from recurrent_errors import relative_errors
from torch import nn

from lightning_accel.recurrent import (
    CoupledGateLSTMCell,
    FeedbackLSTMCell,
    GraphRNN,
    LayerNormLSTMCell,
    MinGRUCell,
    OutputGRUCell,
    PeepholeLSTMCell,
    Recurrent,
    ZoneoutLSTMCell,
)

CONF = Path(importlib.import_module("lightning_accel.conf").__file__).parent / "model" / "recurrent_graph"
STEPS, STREAMS, FEATURES, HIDDEN = 23, 3, 5, 6
LIMIT = 1e-12
CELLS = [
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
    PeepholeLSTMCell,
    LayerNormLSTMCell,
    CoupledGateLSTMCell,
    FeedbackLSTMCell,
    OutputGRUCell,
    MinGRUCell,
]
MIXED_DELAYS = (
    {
        "x": {"size": FEATURES},
        "a": {"size": HIDDEN, "activation": "tanh", "bias": True},
        "b": {"size": HIDDEN, "activation": "sigmoid"},
        "y": {"size": HIDDEN, "aggregation": "product"},
    },
    ["x -> a", "a -> a delay=2", "b -> a delay=3", "a -> b", "x -> b delay=2", "a -> y", "b -> y identity delay=3"],
    ["x"],
    ["y"],
)


def sequence(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.double, generator=generator).requires_grad_()


def results(rnn, x, state):
    """Outputs and final states, and the gradients of a sum that is none of their symmetries."""
    y, last = rnn(x, state)
    ends = torch.utils._pytree.tree_leaves(last)
    total = y.cos().sum() + sum((k + 2.0) * end.sin().sum() for k, end in enumerate(ends))
    leaves = [t for t in torch.utils._pytree.tree_leaves((x, state)) if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(total, [*leaves, *rnn.parameters()], allow_unused=True)
    names = [f"leaf {k}" for k in range(len(leaves))] + [n for n, _ in rnn.named_parameters()]
    return {"y": y, **dict(zip(names, gradients, strict=True))}


def assert_autograds(loop, scheduled, x, state=None):
    expected, actual = results(loop, x, state), results(scheduled, x, state)
    errors = relative_errors(actual, expected)
    assert max(errors.values()) <= LIMIT, errors


def twins(cell, schedule):
    """The plain loop and the schedule over equal parameters."""
    torch.manual_seed(0)
    loop = Recurrent(cell().double(), schedule="loop")
    scheduled = Recurrent(cell().double(), schedule=schedule)
    scheduled.load_state_dict(loop.state_dict())
    return loop, scheduled


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    loop, scheduled = twins(lambda: kind(FEATURES, HIDDEN), "intra_stream")
    x = sequence(STEPS, STREAMS, FEATURES)
    assert_autograds(loop, scheduled, x)
    assert set(scheduled.schedules[0].choices.values()) == {"intra_stream"}


def test_a_scan_of_min_gru():
    loop, scheduled = twins(lambda: MinGRUCell(FEATURES, HIDDEN), "scan")
    assert_autograds(loop, scheduled, sequence(STEPS, STREAMS, FEATURES), (sequence(STREAMS, HIDDEN, seed=2),))
    assert set(scheduled.schedules[0].choices.values()) == {"scan"}


def test_zoneout_with_a_given_mask():
    loop, scheduled = twins(lambda: ZoneoutLSTMCell(FEATURES, HIDDEN), "intra_stream")
    keep = (sequence(STEPS, STREAMS, 2 * HIDDEN, seed=3).detach() < -0.5).double()
    state = (sequence(STREAMS, HIDDEN, seed=4), sequence(STREAMS, HIDDEN, seed=5))
    assert_autograds(loop, scheduled, (sequence(STEPS, STREAMS, FEATURES), keep), state)
    assert set(scheduled.schedules[0].choices.values()) == {"intra_stream"}


def graph_twins(arguments):
    torch.manual_seed(0)
    loop = GraphRNN(*arguments, schedule="loop").double()
    scheduled = GraphRNN(*arguments, schedule="intra_stream").double()
    scheduled.load_state_dict(loop.state_dict())
    return loop, scheduled


@pytest.mark.parametrize("name", ["clockwork", "feedback_stack", "gru", "lstm", "peephole_lstm"])
def test_graphs_of_the_configurations(name):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    nodes = {n: {**v, "size": min(v["size"], HIDDEN)} for n, v in config["nodes"].items()}
    loop, scheduled = graph_twins((nodes, config["edges"], config["inputs"], config["outputs"]))
    assert_autograds(loop, scheduled, sequence(STEPS, STREAMS, loop.input_size))
    assert set(scheduled.rnn.schedules[0].choices.values()) == {"intra_stream"}


def test_the_stack_feeds_back_from_the_upper_to_the_lower_layer_one_step_late():
    config = yaml.safe_load((CONF / "feedback_stack.yaml").read_text())
    graph = GraphRNN(config["nodes"], config["edges"], config["inputs"], config["outputs"]).graph
    (loop,) = [stage for stage in graph.schedule if stage.loop]
    assert {"lower_cell", "upper_hidden"} <= set(loop.nodes)
    assert any(e.source == "upper_hidden" and e.target.startswith("lower") and e.delay == 1 for e in graph.edges)


def test_delays_of_two_and_three_mixed():
    loop, scheduled = graph_twins(MIXED_DELAYS)
    assert sorted({edge.delay for edge in loop.graph.edges}) == [0, 2, 3]
    assert_autograds(loop, scheduled, sequence(STEPS, STREAMS, FEATURES))
    assert set(scheduled.rnn.schedules[0].choices.values()) == {"intra_stream"}
