"""GraphRNN: graphs from YAML compute what they describe, and their schedules can be read."""

import dataclasses
import importlib
import xml.dom.minidom
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_accel.recurrent import GraphRNN, schedule_svg, schedule_text
from lightning_accel.recurrent.exactness.assumptions import assumptions_of
from lightning_accel.recurrent.exactness.code_names import is_fixed

CONF = Path(importlib.import_module("lightning_accel.conf").__file__).parent / "model" / "recurrent_graph"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
T, B = 6, 3


def graph_of(name, schedule="loop"):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    nodes = {n: {**v, "size": min(v["size"], 4)} for n, v in config["nodes"].items()}
    torch.manual_seed(0)
    return GraphRNN(nodes, config["edges"], config["inputs"], config["outputs"], schedule=schedule).double()


def results(rnn, x, *state):
    y, last = rnn(x, state[0] if state else None)
    total = y.cos().sum() + sum((k + 2.0) * s.sin().sum() for k, s in enumerate(last))
    return [y, *last, *torch.autograd.grad(total, [x, *rnn.parameters()])]


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 1e-12 * max(1.0, e.abs().max())


def test_the_configurations():
    assert NAMES == ["clockwork", "feedback_stack", "gru", "lstm", "peephole_lstm"]


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_computes_what_the_loop_computes(name):
    x = torch.randn(T, B, 2, dtype=torch.double, requires_grad=True)
    assert_equal(results(graph_of(name, "intra_stream"), x), results(graph_of(name), x))


def test_the_lstm_is_torchs():
    rnn = graph_of("lstm")
    reference = nn.LSTM(2, 4).double()
    cell = rnn.rnn.cell
    with torch.no_grad():
        reference.weight_ih_l0.copy_(cell.weights["x@0"])
        reference.weight_hh_l0.copy_(cell.weights["hidden@1"])
        gates = ("input_gate", "forget_gate", "candidate", "output_gate")
        reference.bias_ih_l0.copy_(torch.cat([cell.biases[f"{g}@bias"] for g in gates]))
        reference.bias_hh_l0.zero_()
    x = torch.randn(T, B, 2, dtype=torch.double)
    torch.testing.assert_close(rnn(x)[0], reference(x)[0])


def test_a_graph_that_is_changed_after_the_trace_counts():
    rnn, loop = graph_of("lstm", "intra_stream"), graph_of("lstm")
    x = torch.randn(T, B, 2, dtype=torch.double, requires_grad=True)
    assert_equal(results(rnn, x), results(loop, x))
    before = rnn(x)[0]
    for graph in (rnn.graph, loop.graph):
        graph.nodes["candidate"] = dataclasses.replace(graph.nodes["candidate"], activation="relu")
    assert_equal(results(rnn, x), results(loop, x))
    assert not torch.equal(rnn(x)[0], before)
    graph = rnn.graph
    rnn.rnn.cell._incoming[graph.step_order[-1]] = list(rnn.rnn.cell._incoming[graph.step_order[-1]])  # as it was
    assert_equal(results(rnn, x), results(loop, x))


def test_looking_at_a_graph_takes_its_nodes_as_they_are():
    cell = graph_of("lstm").rnn.cell
    assert all(is_fixed(type(node)) for node in (*cell.graph.nodes.values(), *cell.graph.edges))
    assert not is_fixed(type(cell.graph)), "its nodes can be replaced"
    assert len(assumptions_of(cell).key) < 300, "a look is due at every call"


def test_delays_of_two_and_three_mixed_and_a_shift_of_the_input():
    arguments = (
        {"x": {"size": 2}, "late": {"size": 2}, "a": {"size": 3, "activation": "tanh", "bias": True}, "b": {"size": 3}},
        ["x -> late delay=2 identity", "late -> a", "a -> a delay=2", "b -> a delay=3", "a -> b", "x -> b"],
        ["x"],
        ["b", "late"],
    )
    torch.manual_seed(0)
    loop = GraphRNN(*arguments, schedule="loop").double()
    fast = GraphRNN(*arguments, schedule="intra_stream").double()
    fast.load_state_dict(loop.state_dict())
    x = torch.randn(T, B, 2, dtype=torch.double, requires_grad=True)
    assert_equal(results(fast, x), results(loop, x))
    y, _ = loop(x)
    torch.testing.assert_close(y[2:, :, 3:], x[:-2])
    torch.testing.assert_close(loop(x[3:], loop(x[:3])[1])[0], y[3:])


def test_clocks_tick_from_the_start_and_batch_first():
    rnn = GraphRNN({"c": {"size": 1, "period": 3}, "x": {"size": 1}, "y": {"size": 1, "aggregation": "product"}},
                   ["c -> y identity", "x -> y identity"], ["x"], ["y"], batch_first=True)  # fmt: skip
    y, _ = rnn(torch.ones(2, 7, 1))
    assert y[0, :, 0].tolist() == [1, 0, 0, 1, 0, 0, 1]


LSTM_SCHEDULE = """\
 1. all time steps at once
      x           = input of 2
    before stage 2, for all time steps at once: W x of input_gate, forget_gate, candidate, output_gate
 2. step by step, a step in this order, after 1
      input_gate  = sigmoid(W x + W hidden[t-1] + b)
      forget_gate = sigmoid(W x + W hidden[t-1] + b)
      candidate   = tanh(W x + W hidden[t-1] + b)
      output_gate = sigmoid(W x + W hidden[t-1] + b)
      write       = input_gate * candidate
      keep        = forget_gate * cell[t-1]
      cell        = write + keep
      squashed    = tanh(cell)
      hidden      = output_gate * squashed
"""


def test_the_schedule_as_text():
    assert schedule_text(graph_of("lstm").graph).startswith(LSTM_SCHEDULE)


def test_the_schedule_of_the_feedback_stack_is_one_loop_over_both_layers():
    text = schedule_text(graph_of("feedback_stack").graph)
    assert "lower_candidate   = tanh(W x + W lower_hidden[t-1] + W upper_hidden[t-1] + b)" in text
    assert "upper_candidate   = tanh(W lower_hidden + W upper_hidden[t-1] + b)" in text
    assert text.count("step by step") == 1


def test_every_kind_of_node_and_edge_as_text():
    rnn = GraphRNN(
        {
            "x": {"size": 1}, "tick": {"size": 2, "period": 3}, "rest": {"size": 2, "activation": "one_minus"},
            "a": {"size": 2, "activation": "one_minus"}, "b": {"size": 2, "aggregation": "product"},
        },
        ["tick -> rest identity", "x -> a broadcast", "a -> a delay=2 diagonal", "rest -> b", "a -> b delay=3"],
        ["x"],
        ["b"],
    )  # fmt: skip
    lines = [line.strip() for line in schedule_text(rnn.graph).splitlines()]
    assert "tick = 1 at every 3 steps, else 0" in lines
    assert "rest = 1 - tick" in lines
    assert "a    = 1 - (x + w * a[t-2])" in lines
    assert "b    = (W rest) * (W a[t-3])" in lines


def boxes_of(svg):
    """Left, top, right and bottom of every node."""
    rects = [r for r in svg.getElementsByTagName("rect") if r.getAttribute("fill") == "white" and r.getAttribute("rx")]
    places = [[float(r.getAttribute(a)) for a in ("x", "y", "width", "height")] for r in rects]
    return [(x, y, x + w, y + h) for x, y, w, h in places]


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_as_a_picture(name):
    graph = graph_of(name).graph
    svg = xml.dom.minidom.parseString(schedule_svg(graph))
    texts = [t.firstChild.data for t in svg.getElementsByTagName("text")]
    assert set(graph.nodes) <= set(texts)
    assert texts.count("step by step") == sum(stage.loop for stage in graph.schedule)
    arrows = [p for p in svg.getElementsByTagName("path") if p.getAttribute("marker-end")]
    assert len(arrows) == len(graph.edges)
    late = {f"{e.source}, {e.delay} step{'s' * (e.delay > 1)} earlier" for e in graph.edges if e.delay}
    assert late <= set(texts)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_picture_covers_a_node(name):
    graph = graph_of(name).graph
    svg = xml.dom.minidom.parseString(schedule_svg(graph))
    boxes = boxes_of(svg)
    assert len(boxes) == len(graph.nodes)
    for k, (left, top, right, bottom) in enumerate(boxes):
        assert all(right < a or c < left or bottom < b or d < top for a, b, c, d in boxes[k + 1 :])
    for path in svg.getElementsByTagName("path"):
        if not path.getAttribute("stroke-dasharray"):
            continue
        x = y = 0.0
        for word in path.getAttribute("d").split():
            to = [float(v) for v in word[1:].split(",")]
            ends = (to[0], to[1]) if word[0] == "M" else (to[0], y) if word[0] == "H" else (x, to[0])
            if word[0] != "M":
                low, high = sorted((x, ends[0])), sorted((y, ends[1]))
                for left, top, right, bottom in boxes:
                    assert low[1] <= left or low[0] >= right or high[1] <= top or high[0] >= bottom
            x, y = ends


@pytest.mark.parametrize(
    ("edge", "message"),
    [("x y", "must read `source -> target"), ("x -> y speed=2", "got 'speed=2'"), ("x -> y sparse", "`connection`")],
)
def test_wrong_texts_are_refused(edge, message):
    with pytest.raises(ValueError, match=message):
        GraphRNN({"x": {"size": 1}, "y": {"size": 1}}, [edge], ["x"], ["y"])
