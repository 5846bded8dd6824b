"""Bring a traced step to a small vocabulary: no identities, no splits, derivatives as products with a coefficient."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from lightning_accel.recurrent.compiler.rewrite import Node, aten, make, merge_equal, shape, to_meta

_SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
}
_IDENTITIES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
_ZEROS = {aten.zeros_like.default: 0, aten.new_zeros.default: 0, aten.ones_like.default: 1, aten.new_ones.default: 1}


def normalize(graph: fx.Graph) -> None:
    """Bring the graph to a small vocabulary: no identities, no splits, derivatives as products with a coefficient."""
    for node in list(graph.nodes):
        if "val" in node.meta:
            node.meta["val"] = to_meta(node.meta["val"])
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


def _replace_split_part(graph: fx.Graph, node: Node) -> None:
    source, index = node.args
    if source.target in _SPLITS:
        x = source.args[0]
        dim = (source.args[2] if len(source.args) > 2 else 0) % len(shape(x))
        sizes = [part.shape[dim] for part in source.meta["val"]]
        start = sum(sizes[:index])
        with graph.inserting_before(node):
            whole = len(sizes) == 1
            part = x if whole else make(graph, aten.slice.Tensor, x, dim, start, start + sizes[index], 1)
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


def _whole(_: fx.Graph, node: Node) -> Node | None:
    """Take a slice of everything, and a concatenation of one part, for what they are of."""
    source = node.args[0]
    if isinstance(source, (list, tuple)):
        source = source[0] if len(source) == 1 else None
    return source if source is not None and shape(source) == shape(node) else None


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
    aten.cat.default: _whole,
    aten.slice.Tensor: _whole,
    aten.clone.default: _clone,
    aten.view.default: _same_shape_view,
    aten._unsafe_view.default: _same_shape_view,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(_ZEROS, _filled),
}
