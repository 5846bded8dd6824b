"""Split a traced step into what runs once, what runs for all time steps at once, and what runs step by step.

Delay edges join each next state with its state, and each state's gradient with the gradient of the next state one step
earlier. Tarjan's components of that graph are the loops; the rest of the forward and of the backward runs for a whole
block of time steps in one call, in segments before, between and after the loops.
"""

import operator
from dataclasses import dataclass, field

import torch

from lightning_accel.recurrent.compiler.normalize import normalize
from lightning_accel.recurrent.compiler.rewrite import (
    VIEWS,
    Node,
    factor_sums,
    fuse_sums,
    hoist_coefficients,
    pin,
)
from lightning_accel.recurrent.compiler.trace import StepGraph
from lightning_accel.recurrent.graph import strongly_connected_components


@dataclass
class Segment:
    """Nodes that run together: a loop, or calls that each cover the whole block."""

    nodes: list[Node]
    loop: bool


@dataclass
class Stages:
    """Where every node of a step runs.

    Attributes:
        step: The step.
        invariant: Nodes that no time step changes.
        components: Strongly connected components in topological order.
        loop_of: The component of every node that lies on a cycle.
        order: Position of every node within one step.
        forward_nodes: What outputs and next states need.
        backward_nodes: What the gradients of states need, and what `add_backward` adds.
        read: Values of every time step that are needed although no backward node takes them.
    """

    step: StepGraph
    invariant: set[Node]
    components: list[list[Node]]
    loop_of: dict[Node, int]
    order: dict[Node, int]
    forward_nodes: set[Node]
    backward_nodes: set[Node] = field(default_factory=set)
    read: set[Node] = field(default_factory=set)

    @property
    def forward(self) -> list[Segment]:
        """Segments of the forward, in order."""
        return self._segments(self.forward_nodes)

    @property
    def backward(self) -> list[Segment]:
        """Segments of the backward, in order."""
        return self._segments(self.backward_nodes)

    def widest(self, streams: int) -> int:
        """Return how many numbers a stream the widest value of a step has, if the step is one of so many streams."""
        values = [n.meta["val"] for s in (*self.forward, *self.backward) for n in s.nodes]
        return max((v.numel() // streams for v in values if isinstance(v, torch.Tensor)), default=1) or 1

    def add_backward(self, *roots: Node) -> None:
        """Add what the backward needs to compute ``roots`` for every time step; views of forward values are remade."""
        feeds = {d: g for d, g in zip(self.step.d_next_states, self.step.d_states, strict=True) if d is not None and g}
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node in self.backward_nodes or node in self.invariant:
                continue
            if node in self.forward_nodes and node.target not in VIEWS:
                continue
            self.backward_nodes.add(node)
            stack += node.all_input_nodes
            if node in feeds:
                stack.append(feeds[node])

    @property
    def saved(self) -> list[Node]:
        """Forward values that the backward reads, inputs and states among them."""
        read = self.read.union(*(n.all_input_nodes for n in self.backward_nodes))
        return sorted((read & self.forward_nodes) - self.backward_nodes, key=self.order.__getitem__)

    def _segments(self, members: set[Node]) -> list[Segment]:
        depth: dict[Node, int] = {}
        batches: dict[int, list[Node]] = {}
        loops: dict[int, list[list[Node]]] = {}
        sources = self._delayed_sources()
        for component in self.components:
            nodes = [n for n in component if n in members]
            if not nodes:
                continue
            remade = members is self.backward_nodes and nodes[0] in self.forward_nodes
            loop = nodes[0] in self.loop_of and nodes[0] not in self.constant_states and not remade
            level = 1 if loop else 0
            for node in nodes:
                for source in (*node.all_input_nodes, *sources.get(node, ())):
                    if source in depth:  # a loop has an odd level, what runs for all steps at once an even one
                        level = max(level, depth[source] + (depth[source] % 2 + 1 if loop else depth[source] % 2))
            depth.update(dict.fromkeys(nodes, level))
            nodes.sort(key=self.order.__getitem__)
            if loop:
                loops.setdefault(level, []).append(nodes)
            else:
                batches.setdefault(level, []).extend(nodes)
        segments = []
        for level in sorted({*batches, *loops}):
            if level in batches:
                segments.append(Segment(batches[level], loop=False))
            segments += [Segment(nodes, loop=True) for nodes in loops.get(level, [])]
        return segments

    @property
    def constant_states(self) -> set[Node]:
        """States that every step returns as they are."""
        return {s for s, n in zip(self.step.states, self.step.next_states, strict=True) if s is n}

    @property
    def looped_states(self) -> set[int]:
        """Places of the states that change from step to step within a loop."""
        return {j for j, state in enumerate(self.step.states) if self.in_loop(state)}

    def in_loop(self, node: Node) -> bool:
        """Whether a node runs step by step."""
        return node in self.loop_of and node not in self.constant_states

    def state_of(self, node: Node) -> int | None:
        """Return which state's slab holds the node."""
        for j, (state, following) in enumerate(zip(self.step.states, self.step.next_states, strict=True)):
            if self.in_loop(state) and node in (state, following):
                return j
        return None

    def _delayed_sources(self) -> dict[Node, list[Node]]:
        return {target: [source] for source, target in delay_edges(self.step) if source is not target}


def delay_edges(step: StepGraph) -> list[tuple[Node, Node]]:
    """Return (source, target) of the edges that lead to the next time step, or for gradients to the previous one."""
    edges = list(zip(step.next_states, step.states, strict=True))
    for gradient, tangent in zip(step.d_states, step.d_next_states, strict=True):
        if gradient is not None and tangent is not None:
            edges.append((gradient, tangent))
    return edges


def rewrite(step: StepGraph) -> None:
    """Rewrite a traced step so that its loops are small."""
    graph = step.graph
    normalize(graph)
    step.read_roles()
    for improve in (hoist_coefficients, fuse_sums, factor_sums):
        improve(graph, _analyse(step).loop_of)
        graph.eliminate_dead_code()
        step.read_roles()
    _pin_results(step)


def stage(step: StepGraph) -> Stages:
    """Find the loops of a rewritten step."""
    stages = _analyse(step)
    stages.add_backward(*(g for g in step.d_states if g is not None))
    return stages


def _pin_results(step: StepGraph) -> None:
    nx, ns, _, ny = step.counts
    states: set[Node] = set()
    for k in range(ns):
        if step.next_states[k] is not step.states[k]:
            pin(step.graph, ny + k, states)
    step.read_roles()
    taken: set[Node] = set()
    gradient = ny + ns
    for k in range(nx + ns):
        if step.smooth_inputs[k]:
            pin(step.graph, gradient, taken)
            gradient += 1
    for k in range(ny):
        pin(step.graph, k, set())
    step.read_roles()


def _analyse(step: StepGraph) -> Stages:
    nodes = [n for n in step.graph.nodes if n.op != "output"]
    successors = {n: [u for u in n.users if u.op != "output"] for n in nodes}
    for source, target in delay_edges(step):
        successors[source].append(target)
    components = strongly_connected_components(nodes, successors.__getitem__)
    loop_of = {n: k for k, c in enumerate(components) if len(c) > 1 or c[0] in successors[c[0]] for n in c}
    invariant = set(step.weights)
    for node in nodes:
        if node.op == "get_attr" or (node.op == "call_function" and invariant.issuperset(node.all_input_nodes)):
            invariant.add(node)
    order = {n: k for k, n in enumerate(nodes)}
    states = dict(zip(step.states, step.next_states, strict=True))
    forward: set[Node] = set()
    stack = [*step.ys, *step.next_states]
    while stack:
        node = stack.pop()
        if node in forward or node in invariant:
            continue
        forward.add(node)
        stack += node.all_input_nodes
        if node in states:
            stack.append(states[node])
        forward |= {n for n in nodes if n.target is operator.getitem and n.args[0] in forward}
    return Stages(step, invariant, components, loop_of, order, forward)
