"""`GraphRNN`: a recurrent network built from a graph of layers, as it may stand in a YAML file."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from lightning_accel.recurrent.graph import Edge, Node, RecurrentGraph
from lightning_accel.recurrent.module import Recurrent
from lightning_accel.recurrent.schedule_choice import Schedule

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda v: v,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softplus": softplus,
    "one_minus": lambda v: 1 - v,
}


class GraphCell(nn.Module):
    """One time step of a graph.

    All full connections that leave a node with one delay are one matrix, ``weights[source@delay]``, whose rows belong
    to the targets in the order of the edges: a product for each source instead of one for each edge. Two equal edges
    are two connections with weights of their own.

    Args:
        graph: The layers and connections.
    """

    def __init__(self, graph: RecurrentGraph) -> None:
        super().__init__()
        self.graph = graph
        self._incoming: dict[str, list[int]] = {name: [] for name in graph.nodes}
        self._products: dict[tuple[str, int], list[int]] = {}
        for k, edge in enumerate(graph.edges):
            self._incoming[edge.target].append(k)
            if edge.connection == "full":
                self._products.setdefault((edge.source, edge.delay), []).append(k)
        self._diagonal_names = _diagonal_names(graph.edges)
        fan_in = {n: sum(graph.nodes[e.source].size for e in graph.incoming(n)) for n in graph.nodes}
        self.weights, self.diagonals, self.biases = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for (source, delay), places in self._products.items():
            edges = [graph.edges[k] for k in places]
            rows = [_uniform(fan_in[e.target], graph.nodes[e.target].size, graph.nodes[source].size) for e in edges]
            self.weights[f"{source}@{delay}"] = nn.Parameter(torch.cat(rows))
        for k, name in self._diagonal_names.items():
            target = graph.edges[k].target
            self.diagonals[name] = nn.Parameter(_uniform(fan_in[target], graph.nodes[target].size))
        for node in graph.nodes.values():
            if node.bias:
                self.biases[f"{node.name}@bias"] = nn.Parameter(_uniform(fan_in[node.name], node.size))
        self.delays = sorted(graph.max_delays.items())

    def initial_state(self, x: Any) -> tuple[Tensor, ...]:
        """Return zeros for every node that is read with a delay, newest value first."""
        like = x[0] if isinstance(x, (tuple, list)) else x
        sizes = [self.graph.nodes[name].size for name, longest in self.delays for _ in range(longest)]
        return tuple(like.new_zeros(like.shape[0], size) for size in sizes)

    def forward(self, inputs: Any, state: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Make one step: ``inputs`` of shape (B, sum of input sizes), or with clocks a pair with their values."""
        x, clocks = inputs if isinstance(inputs, (tuple, list)) else (inputs, None)
        past: dict[tuple[str, int], Tensor] = {}
        names = [(name, delay) for name, longest in self.delays for delay in range(1, longest + 1)]
        past.update(zip(names, state, strict=True))
        values: dict[str, Tensor] = dict(
            zip(self.graph.inputs, x.split([self.graph.nodes[n].size for n in self.graph.inputs], -1), strict=True)
        )
        products: dict[tuple[str, int], dict[int, Tensor]] = {}
        ticking = [n.name for n in self.graph.nodes.values() if n.period]
        for k, name in enumerate(ticking):
            values[name] = clocks[:, k : k + 1].expand(-1, self.graph.nodes[name].size)
        for name in self.graph.step_order:
            if name not in values:
                values[name] = self._node(name, values, past, products)
        following = [values[n] if d == 1 else past[n, d - 1] for n, d in names]
        return torch.cat([values[n] for n in self.graph.outputs], -1), tuple(following)

    def _node(
        self,
        name: str,
        values: dict[str, Tensor],
        past: dict[tuple[str, int], Tensor],
        products: dict[tuple[str, int], dict[int, Tensor]],
    ) -> Tensor:
        node, total = self.graph.nodes[name], None
        for k in self._incoming[name]:
            edge = self.graph.edges[k]
            value = past[edge.source, edge.delay] if edge.delay else values[edge.source]
            if edge.connection == "full":
                key = (edge.source, edge.delay)
                if key not in products:
                    places = self._products[key]
                    parts = linear(value, self.weights[f"{edge.source}@{edge.delay}"])
                    sizes = [self.graph.nodes[self.graph.edges[p].target].size for p in places]
                    products[key] = dict(zip(places, parts.split(sizes, -1), strict=True))
                value = products[key][k]
            elif edge.connection == "diagonal":
                value = value * self.diagonals[self._diagonal_names[k]]
            elif edge.connection == "broadcast":
                value = value.expand(-1, node.size)
            join = torch.add if node.aggregation == "sum" else torch.mul
            total = value if total is None else join(total, value)
        assert total is not None
        if node.bias:
            total = total + self.biases[f"{name}@bias"]
        return _ACTIVATIONS[node.activation](total)


class GraphRNN(nn.Module):
    """A recurrent network from a graph of layers: ``y, state = rnn(x, state)``.

    Args:
        nodes: Name to the arguments of `Node` (``size`` and so on).
        edges: Arguments of `Edge`, each a mapping, or a text ``"source -> target"`` with optional words behind it:
            ``delay=1``, ``diagonal``, ``identity``, ``broadcast``.
        inputs: Names of the nodes that are fed, in the order of the input's features.
        outputs: Names of the nodes that are returned, in the order of the output's features.
        batch_first: Whether inputs and outputs are of shape (B, T, ...) instead of (T, B, ...).
        schedule: See `Recurrent`.

    Raises:
        ValueError: If the graph can not be computed, see `RecurrentGraph`, or an edge's text can not be read.

    References:
        Hwang, Sung, arXiv:1503.02852, section 2. *Deviations*: see `RecurrentGraph`; clocks count from the start of
        every call.

    Example:
        >>> import torch
        >>> from lightning_accel.recurrent import GraphRNN
        >>> nodes = {"x": {"size": 2}, "h": {"size": 4, "activation": "tanh"}}
        >>> rnn = GraphRNN(nodes, ["x -> h", "h -> h delay=1"], ["x"], ["h"])
        >>> y, state = rnn(torch.randn(10, 3, 2))
        >>> y.shape
        torch.Size([10, 3, 4])
    """

    def __init__(
        self,
        nodes: Mapping[str, Mapping[str, Any]],
        edges: Sequence[Mapping[str, Any] | str],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        batch_first: bool = False,
        schedule: Schedule = "auto",
    ) -> None:
        super().__init__()
        parsed = [_read_edge(e) if isinstance(e, str) else Edge(**{str(k): v for k, v in e.items()}) for e in edges]
        listed = [Node(name, **{str(k): v for k, v in node.items()}) for name, node in nodes.items()]
        self.graph = RecurrentGraph(listed, parsed, inputs=list(inputs), outputs=list(outputs))
        self.input_size = sum(self.graph.nodes[n].size for n in self.graph.inputs)
        self.output_size = sum(self.graph.nodes[n].size for n in self.graph.outputs)
        self._periods = [n.period for n in self.graph.nodes.values() if n.period]
        self.rnn = Recurrent(GraphCell(self.graph), batch_first=batch_first, schedule=schedule)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run a sequence of shape (T, B, sum of input sizes); see `Recurrent.forward`."""
        if not self._periods:
            return self.rnn(x, state, lengths)
        time = 1 if self.rnn.batch_first else 0
        steps = torch.arange(x.shape[time], device=x.device)
        ticks = torch.stack([(steps % period == 0).to(x.dtype) for period in self._periods], -1)
        shaped = ticks[None] if time else ticks[:, None]
        return self.rnn((x, shaped.expand(*x.shape[:2], -1)), state, lengths)


def _uniform(fan_in: int, *shape: int) -> Tensor:
    bound = 1.0 / math.sqrt(max(fan_in, 1))
    return torch.empty(*shape).uniform_(-bound, bound)


def _diagonal_names(edges: Sequence[Edge]) -> dict[int, str]:
    """Name the weights of the diagonal edges, by the edges' places; equal ones are numbered."""
    names: dict[int, str] = {}
    for k, edge in enumerate(edges):
        if edge.connection == "diagonal":
            name = f"{edge.source}@{edge.delay}>{edge.target}"
            equal = sum(1 for used in names.values() if used.partition("#")[0] == name)
            names[k] = f"{name}#{equal + 1}" if equal else name
    return names


def _read_edge(text: str) -> Edge:
    source, arrow, rest = text.partition("->")
    words = rest.split()
    if not arrow or not words or not source.strip():
        raise ValueError(f"an edge must read `source -> target [delay=N] [connection]`, got {text!r}.")
    settings: dict[str, Any] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if equals and name == "delay" and value.isdigit():
            settings["delay"] = int(value)
        elif not equals:
            settings["connection"] = word
        else:
            raise ValueError(
                f"an edge may have `delay=N` and a connection behind its target, got {word!r} in {text!r}."
            )
    return Edge(source.strip(), words[0], **settings)
