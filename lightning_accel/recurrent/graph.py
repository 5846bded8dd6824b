"""A recurrent network as a directed graph with delays, and the schedule that follows from it. Standard library only.

Nodes are layers, edges are connections, some delayed by time steps. What lies on no cycle runs for all time steps at
once; only the strongly connected components (Tarjan) run step by step, and inside one of them the edges without delay
say what comes first.
"""

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

Activation = Literal["linear", "sigmoid", "tanh", "relu", "softplus", "one_minus"]
Aggregation = Literal["sum", "product"]
Connection = Literal["full", "identity", "diagonal", "broadcast"]

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
CONNECTIONS: tuple[str, ...] = get_args(Connection)

N = TypeVar("N", bound=Hashable)


def strongly_connected_components(nodes: Iterable[N], successors: Callable[[N], Iterable[N]]) -> list[list[N]]:
    """Return the strongly connected components in topological order of the condensed graph.

    Tarjan's algorithm without recursion, so that a chain of 100,000 nodes is no problem.

    Args:
        nodes: Every node once.
        successors: Nodes that an edge of the given node leads to.

    Complexity:
        O(nodes + edges).

    References:
        Tarjan, "Depth-first search and linear graph algorithms", 1972.
    """
    index: dict[N, int] = {}
    low: dict[N, int] = {}
    stack: list[N] = []
    on_stack: set[N] = set()
    found: list[list[N]] = []
    for root in nodes:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        work = [(root, iter(successors(root)))]
        while work:
            node, rest = work[-1]
            for following in rest:
                if following not in index:
                    index[following] = low[following] = len(index)
                    stack.append(following)
                    on_stack.add(following)
                    work.append((following, iter(successors(following))))
                    break
                if following in on_stack:
                    low[node] = min(low[node], index[following])
            else:
                work.pop()
                if work:
                    parent = work[-1][0]
                    low[parent] = min(low[parent], low[node])
                if low[node] == index[node]:
                    component: list[N] = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    found.append(component[::-1])
    return found[::-1]


@dataclass(frozen=True)
class Node:
    """A layer.

    Attributes:
        name: Unique in its graph.
        size: Units.
        activation: Applied to the aggregated input; ``one_minus`` is ``1 - v``.
        aggregation: Of what the incoming edges bring.
        bias: Whether a learned bias is added before the activation; only with ``aggregation="sum"``.
        period: A clock instead of a layer: no incoming edge, its value is 1 at every ``period``-th time step (the first
            included) and 0 between. 0 means no clock.

    Example:
        >>> from lightning_accel.recurrent import Node
        >>> Node("hidden", size=64, activation="tanh").bias
        False
    """

    name: str
    size: int
    activation: Activation = "linear"
    aggregation: Aggregation = "sum"
    bias: bool = False
    period: int = 0

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set(".@> "):
            raise ValueError(
                f"the name of a node must not be empty or contain any of `.@>` or a space, got {self.name!r}."
            )
        if self.size < 1:
            raise ValueError(f"`size` of node {self.name!r} must be >= 1, got {self.size}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` of node {self.name!r} must be one of {ACTIVATIONS}, got {self.activation!r}."
            )
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"`aggregation` of node {self.name!r} must be one of {AGGREGATIONS}, got {self.aggregation!r}."
            )
        if self.bias and self.aggregation == "product":
            raise ValueError(f"node {self.name!r} multiplies its inputs: give the bias to one of them, not to it.")
        if self.period < 0:
            raise ValueError(f"`period` of node {self.name!r} must be >= 0 time steps, got {self.period}.")


@dataclass(frozen=True)
class Edge:
    """A connection.

    Attributes:
        source: Name of the node it comes from.
        target: Name of the node it leads to.
        delay: In time steps; 0 uses the value of the same step, d the value d steps earlier.
        connection: ``full`` (a weight matrix), ``diagonal`` (one weight a unit), ``identity`` (no weight) or
            ``broadcast`` (a source of one unit, repeated).

    Example:
        >>> from lightning_accel.recurrent import Edge
        >>> Edge("hidden", "hidden", delay=1).connection
        'full'
    """

    source: str
    target: str
    delay: int = 0
    connection: Connection = "full"

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(
                f"`delay` of the edge {self.source} -> {self.target} must be >= 0 time steps, got {self.delay}."
            )
        if self.connection not in CONNECTIONS:
            raise ValueError(
                f"`connection` of the edge {self.source} -> {self.target} must be one of {CONNECTIONS}, "
                f"got {self.connection!r}."
            )


@dataclass(frozen=True)
class Stage:
    """One strongly connected component.

    Attributes:
        nodes: Names in the order in which one time step computes them.
        loop: Whether it has to run step by step; otherwise it runs for all time steps at once.
        after: Indices of the earlier stages it takes values from.

    Example:
        >>> from lightning_accel.recurrent import Edge, Node, RecurrentGraph
        >>> graph = RecurrentGraph([Node("x", 2), Node("y", 4)], [Edge("x", "y")], inputs=["x"], outputs=["y"])
        >>> graph.schedule[-1].nodes
        ('y',)
    """

    nodes: tuple[str, ...]
    loop: bool
    after: tuple[int, ...]


class RecurrentGraph:
    """A directed graph of layers, with delays.

    Args:
        nodes: The layers.
        edges: The connections; several may join the same two nodes.
        inputs: Names of the nodes fed from outside, in the order of the input's features. They have no incoming edge.
        outputs: Names of the nodes whose values are returned, in the order of the output's features.

    Raises:
        ValueError: If a name is unknown or used twice, sizes do not fit a connection, an input has an incoming edge, a
            node has none, or a cycle has no delay.

    References:
        Hwang, Sung, "Single Stream Parallelization of Generalized LSTM-like RNNs", arXiv:1503.02852. *Deviations*:
        ``diagonal`` edges (peepholes) and clocks exist; delays may be longer than one step.

    Example:
        >>> from lightning_accel.recurrent import Edge, Node, RecurrentGraph
        >>> nodes = [Node("x", 2), Node("h", 4, activation="tanh")]
        >>> graph = RecurrentGraph(nodes, [Edge("x", "h"), Edge("h", "h", delay=1)], inputs=["x"], outputs=["h"])
        >>> [stage.loop for stage in graph.schedule]
        [False, True]
    """

    def __init__(
        self, nodes: Sequence[Node], edges: Sequence[Edge], *, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        self.nodes: Mapping[str, Node] = {node.name: node for node in nodes}
        self.edges = tuple(edges)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        if len(self.nodes) != len(nodes):
            names = [node.name for node in nodes]
            raise ValueError(
                f"node names must be unique, used twice: {sorted({n for n in names if names.count(n) > 1})}."
            )
        self._check_names()
        for edge in self.edges:
            self._check_sizes(edge)
        self._check_sources()
        self.schedule = self._make_schedule()

    def incoming(self, name: str) -> list[Edge]:
        """Return the edges that lead to the node, in the order in which they were given."""
        return [edge for edge in self.edges if edge.target == name]

    @property
    def max_delays(self) -> dict[str, int]:
        """Return, for each node that is read with a delay, how many time steps back at most."""
        longest: dict[str, int] = {}
        for edge in self.edges:
            if edge.delay:
                longest[edge.source] = max(edge.delay, longest.get(edge.source, 0))
        return longest

    @property
    def step_order(self) -> list[str]:
        """Return all nodes in an order in which one time step can compute them."""
        return [name for stage in self.schedule for name in stage.nodes]

    def _check_names(self) -> None:
        used = [(e.source, f"edge {e.source} -> {e.target}") for e in self.edges]
        used += [(e.target, f"edge {e.source} -> {e.target}") for e in self.edges]
        used += [(n, "`inputs`") for n in self.inputs] + [(n, "`outputs`") for n in self.outputs]
        for name, where in used:
            if name not in self.nodes:
                raise ValueError(f"{where} names the node {name!r}, which does not exist; nodes: {list(self.nodes)}.")
        for what, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"`{what}` must name at least one node, each once, got {list(names)}.")

    def _check_sizes(self, edge: Edge) -> None:
        source, target = self.nodes[edge.source].size, self.nodes[edge.target].size
        if edge.connection in ("identity", "diagonal") and source != target:
            raise ValueError(
                f"the {edge.connection} edge {edge.source} -> {edge.target} joins {source} with {target} units; make "
                "the sizes equal or the connection full."
            )
        if edge.connection == "broadcast" and source != 1:
            raise ValueError(
                f"the broadcast edge {edge.source} -> {edge.target} must start at a node of 1 unit, got {source}."
            )

    def _check_sources(self) -> None:
        fed = {edge.target for edge in self.edges}
        for node in self.nodes.values():
            source = node.name in self.inputs or node.period > 0
            if source and node.name in fed:
                raise ValueError(f"node {node.name!r} is an input or a clock and can have no incoming edge.")
            if not source and node.name not in fed:
                raise ValueError(f"node {node.name!r} has no incoming edge; add one or name it in `inputs`.")
            if node.period and node.name in self.inputs:
                raise ValueError(f"node {node.name!r} can not be an input and a clock; drop its `period`.")

    def _make_schedule(self) -> tuple[Stage, ...]:
        following: dict[str, list[str]] = {name: [] for name in self.nodes}
        at_once: dict[str, list[str]] = {name: [] for name in self.nodes}
        for edge in self.edges:
            following[edge.source].append(edge.target)
            if edge.delay == 0:
                at_once[edge.source].append(edge.target)
        for component in strongly_connected_components(self.nodes, at_once.__getitem__):
            if len(component) > 1 or component[0] in at_once[component[0]]:
                raise ValueError(
                    f"the cycle through {', '.join(component)} has no delay; give one of its edges `delay: 1` or more."
                )
        rank = self._step_ranks(at_once)
        stages: list[Stage] = []
        home: dict[str, int] = {}
        for component in strongly_connected_components(self.nodes, following.__getitem__):
            names = tuple(sorted(component, key=rank.__getitem__))
            loop = len(names) > 1 or names[0] in following[names[0]]
            home.update((name, len(stages)) for name in names)
            after = {home[edge.source] for edge in self.edges if edge.target in names} - {len(stages)}
            stages.append(Stage(names, loop, tuple(sorted(after))))
        return tuple(stages)

    def _step_ranks(self, at_once: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """Number the nodes so that edges without delay lead upwards; where they leave a choice, as they were given."""
        place = {name: k for k, name in enumerate(self.nodes)}
        waiting = dict.fromkeys(self.nodes, 0)
        for targets in at_once.values():
            for target in targets:
                waiting[target] += 1
        ready = [place[name] for name, count in waiting.items() if count == 0]
        names, rank = list(self.nodes), dict[str, int]()
        heapq.heapify(ready)
        while ready:
            name = names[heapq.heappop(ready)]
            rank[name] = len(rank)
            for target in at_once[name]:
                waiting[target] -= 1
                if waiting[target] == 0:
                    heapq.heappush(ready, place[target])
        return rank
