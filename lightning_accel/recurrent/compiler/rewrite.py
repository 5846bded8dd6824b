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
_SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
}
_IDENTITIES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
_ZEROS = {aten.zeros_like.default: 0, aten.new_zeros.default: 0, aten.ones_like.default: 1, aten.new_ones.default: 1}


def shape(node: Node) -> tuple[int, ...]:
    """Return the shape of one step's value."""
    return tuple(node.meta["val"].shape)


def normalize(graph: fx.Graph) -> None:
    """Bring the graph to a small vocabulary: no identities, no splits, derivatives as products with a coefficient."""
    for node in list(graph.nodes):
        if "val" in node.meta:
            node.meta["val"] = _to_meta(node.meta["val"])
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _RULES:
            with graph.inserting_before(node):
                replacement = _RULES[node.target](graph, node)
            if replacement is not None:
                node.replace_all_uses_with(replacement)
                graph.erase_node(node)
        elif node.op == "call_function" and node.target is operator.getitem:
            _replace_split_part(graph, node)
    graph.eliminate_dead_code()
    merge_equal(graph)


def make(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Add a call at the graph's insertion point and infer its shape."""
    node = graph.call_function(target, args, kwargs)
    lower = fx.node.map_arg
    node.meta["val"] = _to_meta(target(*lower(args, _value), **lower(kwargs, _value)))
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


def _to_meta(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(v) for v in value)
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def _freeze(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(value.items()))
    return (type(value).__name__, value)


def _replace_split_part(graph: fx.Graph, node: Node) -> None:
    source, index = node.args
    if source.target in _SPLITS:
        x = source.args[0]
        dim = (source.args[2] if len(source.args) > 2 else 0) % len(shape(x))
        sizes = [part.shape[dim] for part in source.meta["val"]]
        start = sum(sizes[:index])
        with graph.inserting_before(node):
            part = make(graph, aten.slice.Tensor, x, dim, start, start + sizes[index], 1)
    elif source.target is aten.unbind.int:
        x = source.args[0]
        dim = (source.args[1] if len(source.args) > 1 else 0) % len(shape(x))
        with graph.inserting_before(node):
            part = make(graph, aten.select.int, x, dim, index)
    else:
        return
    node.replace_all_uses_with(part)
    graph.erase_node(node)


def _sigmoid_backward(graph: fx.Graph, node: Node) -> Node:
    gradient, y = node.args
    return make(graph, aten.mul.Tensor, gradient, make(graph, aten.mul.Tensor, y, _one_minus(graph, y)))


def _tanh_backward(graph: fx.Graph, node: Node) -> Node:
    gradient, y = node.args
    return make(graph, aten.mul.Tensor, gradient, _one_minus(graph, make(graph, aten.mul.Tensor, y, y)))


def _one_minus(graph: fx.Graph, y: Node) -> Node:
    return make(graph, aten.sub.Tensor, _scalar(graph, 1.0, y), y)


def _scalar(graph: fx.Graph, value: float, like: Node) -> Node:
    return make(graph, aten.scalar_tensor.default, value, dtype=like.meta["val"].dtype)


def _rsub(graph: fx.Graph, node: Node) -> Node | None:
    x, other, *alpha = node.args
    if alpha or node.kwargs:
        return None
    return make(graph, aten.sub.Tensor, _scalar(graph, other, x), x)


def _relu(graph: fx.Graph, node: Node) -> Node:
    return make(graph, aten.clamp_min.default, node.args[0], 0)


def _transpose_twice(_: fx.Graph, node: Node) -> Node | None:
    inner = node.args[0]
    return inner.args[0] if inner.target is aten.t.default else None


def _identity(_: fx.Graph, node: Node) -> Node:
    return node.args[0]


def _clone(_: fx.Graph, node: Node) -> Node | None:
    # Nothing is changed in place, so a copy is only worth keeping where it changes the layout.
    return None if node.kwargs.get("memory_format") is not None else node.args[0]


def _same_shape_view(graph: fx.Graph, node: Node) -> Node | None:
    x = node.args[0]
    if shape(x) == shape(node):
        return x
    if node.target is aten._unsafe_view.default:
        return make(graph, aten.view.default, x, list(shape(node)))
    return None


def _filled(graph: fx.Graph, node: Node) -> Node:
    value, meta = _ZEROS[node.target], node.meta["val"]
    return make(graph, aten.full.default, list(meta.shape), value, dtype=meta.dtype)


def _layer_norm_backward(graph: fx.Graph, node: Node) -> None:
    """Split it: the input's gradient may stay in a loop, those of weight and bias are summed over all time steps."""
    parts = [user for user in node.users if user.target is operator.getitem]
    *args, mask = node.args
    if sum(mask) < 2:
        return
    if mask[0]:
        of_input = make(graph, node.target, *args, [True, False, False])
        for part in parts:
            if part.args[1] == 0:
                part.update_arg(0, of_input)
    rest = make(graph, node.target, *args, [False, *mask[1:]])
    for part in parts:
        if part.args[1] != 0:
            part.update_arg(0, rest)


def _fill(graph: fx.Graph, node: Node) -> Node:
    meta = node.meta["val"]
    return make(graph, aten.full.default, list(meta.shape), node.args[1], dtype=meta.dtype)


def _log_sigmoid(graph: fx.Graph, node: Node) -> None:
    """Write ``-softplus(-x)``; what torch keeps beside it for its backward is not needed."""
    value = make(graph, aten.neg.default, make(graph, aten.softplus.default, _negative(graph, node.args[0]), 1, _EXACT))
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(value)


def _log_sigmoid_backward(graph: fx.Graph, node: Node) -> Node:
    gradient, x, _ = node.args
    decay = make(graph, aten.exp.default, make(graph, aten.clamp_max.default, _negative(graph, x), _EXACT))
    slope = make(graph, aten.div.Tensor, decay, make(graph, aten.add.Scalar, decay, 1))
    return make(graph, aten.mul.Tensor, gradient, slope)


def _negative(graph: fx.Graph, x: Node) -> Node:
    return make(graph, aten.neg.default, x)


_EXACT = 40  # softplus(x) is x from here on, in float64 too


_RULES: dict[Any, Callable[[fx.Graph, Node], Node | None]] = {
    aten.sigmoid_backward.default: _sigmoid_backward,
    aten.tanh_backward.default: _tanh_backward,
    aten.rsub.Scalar: _rsub,
    aten.fill.Scalar: _fill,
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.log_sigmoid_backward.default: _log_sigmoid_backward,
    aten.relu.default: _relu,
    aten.t.default: _transpose_twice,
    aten.clone.default: _clone,
    aten.view.default: _same_shape_view,
    aten._unsafe_view.default: _same_shape_view,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(_ZEROS, _filled),
}
