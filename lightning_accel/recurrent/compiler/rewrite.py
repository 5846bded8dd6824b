"""Rewrite a traced step so that less of it lies in the loops and what lies there needs fewer calls.

All rewrites keep the mathematics; some change the order of roundings.
"""

import operator
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from torch import fx

aten = torch.ops.aten
# torch types a node's arguments as a union of everything a graph can hold; what they are here, the target says.
Node: TypeAlias = Any

# Operations whose result shares its input's memory.
VIEWS = {
    aten.slice.Tensor,
    aten.select.int,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
}


def shape(node: Node) -> tuple[int, ...]:
    """Return the shape of one step's value."""
    return tuple(node.meta["val"].shape)


def make(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Add a call at the graph's insertion point and infer its shape."""
    node = graph.call_function(target, args, kwargs)
    lower = fx.node.map_arg
    node.meta["val"] = to_meta(target(*lower(args, _value), **lower(kwargs, _value)))
    return node


def merge_equal(graph: fx.Graph) -> None:
    """Compute equal calls once."""
    seen: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def hoist_coefficients(graph: fx.Graph, loop_of: dict[Node, int]) -> None:
    """Turn ``(v * a) * b`` into ``v * (a * b)`` where only ``v`` is in the loop, so that ``a * b`` is not."""
    for node in list(graph.nodes):
        if node.target is not aten.mul.Tensor or node not in loop_of:
            continue
        inner, b = _loop_first(node, loop_of)
        if inner is None or inner.target is not aten.mul.Tensor or not isinstance(b, fx.Node):
            continue
        v, a = _loop_first(inner, loop_of)
        if v is None or not isinstance(a, fx.Node):
            continue
        if torch.broadcast_shapes(shape(a), shape(b)) not in (shape(a), shape(b)):
            continue
        with graph.inserting_before(node):
            coefficient = make(graph, aten.mul.Tensor, a, b)
            product = make(graph, aten.mul.Tensor, v, coefficient)
        loop_of[product] = loop_of[node]
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    merge_equal(graph)


def fuse_sums(graph: fx.Graph, loop_of: dict[Node, int]) -> None:
    """Turn ``u + a @ b`` into one addmm and ``u + a * b`` into one addcmul, in the loops."""
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node not in loop_of or node.kwargs or len(node.args) != 2:
            continue
        left, right = node.args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            continue
        # products of matrices first: of u + a @ b + c * d the matrix product gains most
        for u, product in sorted(((left, right), (right, left)), key=lambda p: p[1].target is aten.mul.Tensor):
            if loop_of.get(product) != loop_of[node] or len(product.users) != 1 or u is product:
                continue
            fused = _fuse(graph, node, u, product, loop_of)
            if fused is not None:
                loop_of[fused] = loop_of[node]
                node.replace_all_uses_with(fused)
                graph.erase_node(node)
                graph.erase_node(product)
                break


def factor_sums(graph: fx.Graph, loop_of: dict[Node, int]) -> None:
    """Turn ``u + v * a + v * b`` and ``v * a + v * b`` into one product with ``a + b``, which is not in the loop."""
    for node in list(graph.nodes):
        if node.target is not aten.addcmul.default or node not in loop_of or node.kwargs:
            continue
        inner, v, b = _factors(node, loop_of)
        if inner is None or len(inner.users) != 1 or inner.kwargs:
            continue
        if inner.target is aten.mul.Tensor:
            first, (w, a) = None, _loop_first(inner, loop_of)
        elif inner.target is aten.addcmul.default:
            first, w, a = _factors(inner, loop_of)
        else:
            continue
        if w is not v or not isinstance(a, fx.Node) or shape(a) != shape(b):
            continue
        with graph.inserting_before(node):
            total = make(graph, aten.add.Tensor, a, b)
            if first is None:
                factored = make(graph, aten.mul.Tensor, v, total)
            else:
                factored = make(graph, aten.addcmul.default, first, v, total)
        loop_of[factored] = loop_of[node]
        node.replace_all_uses_with(factored)
        graph.erase_node(node)
        graph.erase_node(inner)


def _factors(node: Node, loop_of: dict[Node, int]) -> tuple[Any, Any, Any]:
    """Return (u, v, a) of ``addcmul(u, v, a)``, with ``v`` in the node's loop and ``a`` outside; ``None`` if not so."""
    u, *factors = node.args
    inside = [loop_of.get(a) == loop_of[node] for a in factors]
    if sorted(inside) != [False, True] or loop_of.get(u) != loop_of[node]:
        return None, None, None
    return (u, *factors) if inside[0] else (u, factors[1], factors[0])


def pin(graph: fx.Graph, index: int, taken: set[Node]) -> None:
    """Make result ``index`` a call of its own that owns its memory, by a copy where it is not."""
    output = next(n for n in graph.nodes if n.op == "output")
    results = list(output.args[0])
    node = results[index]
    if node.op != "call_function" or node in taken or node.target in VIEWS or node.target is operator.getitem:
        with graph.inserting_before(output):
            results[index] = make(graph, aten.clone.default, node)
        output.args = (tuple(results),)
    taken.add(results[index])


def _fuse(graph: fx.Graph, node: Node, u: Node, product: Node, loop_of: dict[Node, int]) -> Node | None:
    with graph.inserting_before(node):
        if product.target is aten.mm.default and shape(u) == shape(product):
            return make(graph, aten.addmm.default, u, *product.args)
        if product.target is aten.addmm.default and not product.kwargs:
            bias = product.args[0]
            outside = loop_of[node] not in (loop_of.get(u), loop_of.get(bias))
            if outside and torch.broadcast_shapes(shape(u), shape(bias)) == shape(product):
                return make(graph, aten.addmm.default, make(graph, aten.add.Tensor, u, bias), *product.args[1:])
        if (
            product.target is aten.mul.Tensor
            and shape(u) == shape(product) == shape(node)
            and all(isinstance(a, fx.Node) for a in product.args)
        ):
            return make(graph, aten.addcmul.default, u, *product.args)
    return None


def _loop_first(node: Node, loop_of: dict[Node, int]) -> tuple[Node | None, Any]:
    """Return the factors, the one in the node's loop first; ``None`` first unless exactly one is there."""
    first, second = node.args
    inside = [isinstance(a, fx.Node) and loop_of.get(a) == loop_of[node] for a in (first, second)]
    if inside == [True, False]:
        return first, second
    if inside == [False, True]:
        return second, first
    return None, None


def _value(node: Node) -> Any:
    return node.meta["val"]


def to_meta(value: Any) -> Any:
    """Keep of a value what a text needs: shapes and types."""
    if isinstance(value, (list, tuple)):
        return type(value)(to_meta(v) for v in value)
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def _freeze(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(value.items()))
    return (type(value).__name__, value)
