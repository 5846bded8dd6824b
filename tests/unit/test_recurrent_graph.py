"""The graph, Tarjan's components and the schedule that follows from them."""

import subprocess
import sys

import pytest

from lightning_accel.recurrent.graph import Edge, Node, RecurrentGraph, strongly_connected_components


def graph(edges, *, nodes=("x", "a", "b", "y"), inputs=("x",), outputs=("y",), **sizes):
    return RecurrentGraph([Node(n, sizes.get(n, 2)) for n in nodes], edges, inputs=inputs, outputs=outputs)


def test_components_come_in_topological_order():
    arrows = {0: [1], 1: [2], 2: [1, 3], 3: [4], 4: [3], 5: [0]}
    components = strongly_connected_components(arrows, arrows.__getitem__)
    assert [sorted(c) for c in components] == [[5], [0], [1, 2], [3, 4]]


def test_a_chain_of_100000_nodes_needs_no_recursion():
    length = 100_000
    components = strongly_connected_components(range(length), lambda n: [(n + 1) % length])
    assert len(components) == 1
    assert len(components[0]) == length


def test_only_the_loop_runs_step_by_step():
    built = graph([Edge("x", "a"), Edge("a", "b"), Edge("b", "a", delay=1), Edge("b", "y")])
    assert [(s.nodes, s.loop, s.after) for s in built.schedule] == [
        (("x",), False, ()),
        (("a", "b"), True, (0,)),
        (("y",), False, (1,)),
    ]


def test_a_delayed_edge_outside_any_loop_is_a_shift():
    built = graph([Edge("x", "a", delay=3), Edge("a", "b", delay=1), Edge("b", "y")])
    assert not any(stage.loop for stage in built.schedule)
    assert built.max_delays == {"x": 3, "a": 1}


def test_inside_a_loop_the_edges_without_delay_set_the_order():
    built = graph([Edge("x", "b"), Edge("b", "a"), Edge("a", "b", delay=2), Edge("a", "y")])
    assert built.schedule[1].nodes == ("b", "a")
    assert built.step_order == ["x", "b", "a", "y"]


def test_a_self_loop_with_a_delay_is_a_loop():
    built = graph([Edge("x", "y"), Edge("y", "y", delay=1)], nodes=("x", "y"))
    assert built.schedule[1].loop


def test_a_cycle_without_delay_is_refused_by_name():
    with pytest.raises(ValueError, match="cycle through a, b has no delay"):
        graph([Edge("x", "a"), Edge("a", "b"), Edge("b", "a"), Edge("b", "y")])


@pytest.mark.parametrize(
    ("edges", "changes", "message"),
    [
        ([Edge("x", "q")], {}, "'q', which does not exist"),
        ([Edge("x", "y")], {"nodes": ("x", "y", "y")}, r"used twice: \['y'\]"),
        ([Edge("x", "y")], {"nodes": ("x", "y"), "inputs": ()}, "`inputs` must name at least one"),
        ([Edge("x", "y")], {"nodes": ("x", "y"), "outputs": ("y", "y")}, "`outputs` must name"),
        ([Edge("x", "y"), Edge("y", "x", 1)], {"nodes": ("x", "y")}, "'x' is an input or a clock"),
        ([Edge("x", "y")], {}, "'a' has no incoming edge"),
        ([Edge("x", "y", connection="identity")], {"nodes": ("x", "y"), "x": 3}, "joins 3 with 2 units"),
        ([Edge("x", "y", connection="broadcast")], {"nodes": ("x", "y")}, "node of 1 unit, got 2"),
    ],
)
def test_wrong_graphs_are_refused(edges, changes, message):
    with pytest.raises(ValueError, match=message):
        graph(edges, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Node("a.b", 1), "the name of a node must not be empty or contain"),
        (lambda: Node("a", 0), "`size` of node 'a' must be >= 1"),
        (lambda: Node("a", 1, activation="cos"), "`activation` of node 'a'"),
        (lambda: Node("a", 1, aggregation="max"), "`aggregation` of node 'a'"),
        (lambda: Node("a", 1, aggregation="product", bias=True), "multiplies its inputs"),
        (lambda: Node("a", 1, period=-1), "`period` of node 'a' must be >= 0"),
        (lambda: Edge("a", "b", delay=-1), "must be >= 0 time steps, got -1"),
        (lambda: Edge("a", "b", connection="sparse"), "`connection` of the edge a -> b"),
        (
            lambda: RecurrentGraph(
                [Node("x", 1, period=2), Node("y", 1)], [Edge("x", "y")], inputs=["x"], outputs=["y"]
            ),
            "can not be an input and a clock",
        ),
    ],
)
def test_wrong_parts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_graph_needs_no_torch():
    source = "import sys, lightning_accel.recurrent.graph; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False, timeout=60).returncode == 0
