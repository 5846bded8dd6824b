"""Source text of ATen calls: for one time step, and for a whole block of ``n`` time steps at once.

A block's value has a leading dimension of ``n``; a value that no time step changes has not. Integers in the text that
are multiples of the batch are made so by `generation` later.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lightning_accel.recurrent.compiler.rewrite import Node, shape

aten = torch.ops.aten

# Python functions with an `out` argument, whose call costs half of what the same operation costs through `torch.ops`.
FAST = {
    aten.add.Tensor: "t_add",
    aten.add.Scalar: "t_add",
    aten.sub.Tensor: "t_sub",
    aten.sub.Scalar: "t_sub",
    aten.mul.Tensor: "t_mul",
    aten.mul.Scalar: "t_mul",
    aten.div.Tensor: "t_div",
    aten.div.Scalar: "t_div",
    aten.sigmoid.default: "t_sigmoid",
    aten.tanh.default: "t_tanh",
    aten.neg.default: "t_neg",
    aten.exp.default: "t_exp",
    aten.log.default: "t_log",
    aten.sqrt.default: "t_sqrt",
    aten.rsqrt.default: "t_rsqrt",
    aten.reciprocal.default: "t_reciprocal",
    aten.abs.default: "t_abs",
    aten.sin.default: "t_sin",
    aten.cos.default: "t_cos",
    aten.clamp_min.default: "t_clamp_min",
    aten.addcmul.default: "t_addcmul",
    aten.mm.default: "t_mm",
    aten.addmm.default: "t_addmm",
    aten.maximum.default: "t_maximum",
    aten.minimum.default: "t_minimum",
}
_LAYOUT_ONLY = {"memory_format", "pin_memory", "layout", "non_blocking", "implicit"}
_SHIFTED_DIMS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default}
_SHIFTED_DIM = {aten._softmax.default: 1, aten._log_softmax.default: 1, aten.cumsum.default: 1}
_SHIFTED_DIM |= {aten._softmax_backward_data.default: 2, aten._log_softmax_backward_data.default: 2}


def fast_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that generated text calls by a name of its own: one look-up a call instead of two."""
    return {name: getattr(torch, name[2:]) for name in (*FAST.values(), "t_cat")}


def op_name(target: Any) -> str:
    """Return the expression that names an operation."""
    return f"aten.{target.overloadpacket.__name__}.{target._overloadname}"


def call(node: Node, name: Callable[[Node], str]) -> str:
    """Return the call of one time step."""
    if node.target is operator.getitem:
        return f"{name(node.args[0])}[{node.args[1]}]"
    if node.target is aten.native_layer_norm.default:
        return f"torch.native_layer_norm({_arguments(node, node.args, name)})"
    return f"{op_name(node.target)}({_arguments(node, node.args, name)})"


def call_into(node: Node, name: Callable[[Node], str], out: str) -> str | None:
    """Return the call of one time step that writes its result to ``out``; ``None`` if the operation can not."""
    if node.target in FAST and _dense(node):
        return f"{FAST[node.target]}({_arguments(node, node.args, name)}, out={out})"
    if node.target in (aten.clone.default, aten._to_copy.default):
        return f"{out}.copy_({name(node.args[0])})"
    if node.target is aten.cat.default:
        return f"t_cat({_arguments(node, node.args, name)}, out={out})"
    overload = _out_overload(node.target)
    if overload is None:
        return None
    target, argument = overload
    return f"{op_name(target)}({_arguments(node, node.args, name)}, {argument}={out})"


def call_view(node: Node, source: str, *, block: bool) -> str:
    """Return the view of one step's value, or with ``block`` of a block's value, as an expression."""
    x, *args = node.args
    rank, lead = len(shape(x)), 1 if block else 0

    def dim(value: int, of: int = rank) -> int:
        return int(value) % of + lead

    if node.target is aten.slice.Tensor:
        defaults: tuple[Any, ...] = (0, None, None, 1)
        axis, start, end, step = tuple(args) + defaults[len(args) :]
        first, last, _ = slice(start, end, step).indices(shape(x)[int(axis) % rank])
        return f"{source}[{':, ' * dim(axis)}{first}:{last}:{step}]"
    if node.target is aten.select.int:
        return f"{source}.select({dim(args[0])}, {args[1]})"
    if node.target is aten.t.default:
        return f"{source}.transpose(-2, -1)" if rank == 2 else source
    if node.target is aten.transpose.int:
        return f"{source}.transpose({dim(args[0])}, {dim(args[1])})"
    if node.target is aten.permute.default:
        return f"{source}.permute({[0] * lead + [dim(d) for d in args[0]]})"
    if node.target is aten.view.default:
        lengths = ["n"] * lead + [str(s) for s in shape(node)]
        return f"{source}.view({', '.join(lengths)})" if lengths else f"{source}.view(())"
    if node.target is aten.unsqueeze.default:
        return f"{source}.unsqueeze({dim(args[0], rank + 1)})"
    if node.target is aten.squeeze.dim:
        return f"{source}.squeeze({dim(args[0])})" if shape(x)[int(args[0]) % rank] == 1 else source
    if node.target is aten.expand.default:
        extra = len(shape(node)) - rank
        index = f"[:{', None' * extra}]" if block and extra else ""
        lengths = ["n"] * lead + [str(s) for s in shape(node)]
        return f"{source}{index}.expand({', '.join(lengths)})"
    raise AssertionError(f"{node.target} is no view.")


def call_block(node: Node, name: Callable[[Node], str], is_block: Callable[[Node], bool]) -> str:
    """Return the call that computes a block's value at once; needs at least one input that time steps change."""
    target, rank = node.target, len(_first(node.meta["val"]).shape)
    if target is operator.getitem:
        return call(node, name)
    if torch.Tag.pointwise in target.tags or target in (aten._to_copy.default, aten.clone.default):
        return _pointwise(node, lambda a: _aligned(a, name, is_block, rank))
    if target in (aten.mm.default, aten.bmm.default):
        return f"torch.matmul({name(node.args[0])}, {name(node.args[1])})"
    if target is aten.addmm.default and not node.kwargs:
        bias, a, b = node.args
        return f"torch.add({_aligned(bias, name, is_block, 2)}, torch.matmul({name(a)}, {name(b)}))"
    if target is aten.cat.default:
        parts, axis = node.args[0], int(node.args[1]) if len(node.args) > 1 else 0
        blocks = [name(p) if is_block(p) else f"{name(p)}.expand(n, {_lengths(p)})" for p in parts]
        return f"torch.cat([{', '.join(blocks)}], {axis % rank + 1})"
    if target in _SHIFTED_DIMS and len(node.args) > 1 and node.args[1]:
        x, dims, *rest = node.args
        shifted = [int(d) % len(shape(x)) + 1 for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
        return f"{op_name(target)}({name(x)}, {shifted}{''.join(f', {r!r}' for r in rest)}{_keywords(node)})"
    if target in _SHIFTED_DIM and all(is_block(i) for i in node.all_input_nodes):
        args = list(node.args)
        args[_SHIFTED_DIM[target]] = int(args[_SHIFTED_DIM[target]]) % len(shape(args[0])) + 1
        return f"{op_name(target)}({_arguments(node, tuple(args), name)})"
    if (
        target is aten.native_layer_norm.default
        and is_block(node.args[0])
        and not any(map(is_block, _nodes(node.args[2:4])))
    ):
        return f"torch.native_layer_norm({_arguments(node, node.args, name)})"
    if target is aten.native_layer_norm_backward.default and list(node.args[-1]) == [True, False, False]:
        weights = [i for i in _nodes(node.args[5:7]) if is_block(i)]
        if not weights and all(map(is_block, _nodes(node.args[:5]))):
            return call(node, name)
    if target is aten.slice_backward.default:
        gradient, sizes, axis, *rest = node.args
        numbers = ", ".join(repr(r) for r in rest)
        return f"{op_name(target)}({name(gradient)}, [n, {_numbers(sizes)}], {int(axis) % len(sizes) + 1}, {numbers})"
    return _mapped(node, name, is_block)


def _pointwise(node: Node, name: Callable[[Node], str]) -> str:
    if node.target is aten.clone.default:
        return f"{name(node.args[0])}.clone()"
    if node.target is aten._to_copy.default:
        return f"{name(node.args[0])}.to({node.meta['val'].dtype})"
    return f"{FAST.get(node.target) or op_name(node.target)}({_arguments(node, node.args, name)})"


def call_block_product(
    node: Node, name: Callable[[Node], str], is_block: Callable[[Node], bool], out: str
) -> str | None:
    """Return a product with a matrix that no time step changes, as one product into ``out``; ``None`` if it is none."""
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return None
    *bias, a, b = node.args
    if is_block(b) or not is_block(a):
        return None
    rows, columns = shape(node)
    flat = f"{name(a)}.reshape(-1, {shape(a)[1]}), {name(b)}, out={out}.view(-1, {columns}))"
    if not bias:
        return f"t_mm({flat}.view(n, {rows}, {columns})"
    first = name(bias[0])
    if is_block(bias[0]) or len(shape(bias[0])) == 2:
        aligned = _aligned(bias[0], name, is_block, 2)
        first = f"{aligned}.expand(n, {rows}, {columns}).reshape(-1, {columns})"
    return f"t_addmm({first}, {flat}.view(n, {rows}, {columns})"


def _mapped(node: Node, name: Callable[[Node], str], is_block: Callable[[Node], bool]) -> str:
    """Let torch map any other operation over the block."""
    inputs = node.all_input_nodes
    inner = {source: f"q{k}" for k, source in enumerate(inputs)}
    dims = ", ".join("0" if is_block(i) else "None" for i in inputs)
    values = ", ".join(name(i) for i in inputs)
    arguments = ", ".join(inner.values())
    return f"torch.func.vmap(lambda {arguments}: {call(node, inner.__getitem__)}, ({dims},))({values})"


def _aligned(source: Any, name: Callable[[Node], str], is_block: Callable[[Node], bool], rank: int) -> str:
    missing = rank - len(shape(source))
    return f"{name(source)}[:{', None' * missing}]" if is_block(source) and missing > 0 else name(source)


def _arguments(node: Node, args: tuple[Any, ...], name: Callable[[Node], str]) -> str:
    return ", ".join(_text(a, name) for a in args) + _keywords(node, name)


def _keywords(node: Node, name: Callable[[Node], str] | None = None) -> str:
    kept = {k: v for k, v in node.kwargs.items() if k not in _LAYOUT_ONLY and k != "device"}
    text = "".join(f", {k}={_text(v, name)}" for k, v in kept.items())
    makes = isinstance(node.target, torch._ops.OpOverload) and not node.all_input_nodes
    if makes and any(a.name == "device" for a in node.target._schema.arguments):
        text += ", device=device"
    return text


def _text(value: Any, name: Callable[[Node], str] | None) -> str:
    if isinstance(value, fx.Node):
        assert name is not None
        return name(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v, name) for v in value)}]"
    return repr(value)


def _dense(node: Node) -> bool:
    """Tell whether all keywords are such that the fast Python functions take them."""
    return set(node.kwargs) <= {"alpha", "beta", "value"}


def _out_overload(target: Any) -> tuple[Any, str] | None:
    """Find the overload of an operation that writes to a given tensor, and the name of that argument."""
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    for overload in target.overloadpacket.overloads():
        other = getattr(target.overloadpacket, overload)
        outs = [a for a in other._schema.arguments if a.is_out]
        given = [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out]
        if len(outs) == 1 and given == wanted and str(outs[0].type) == "Tensor":
            return other, outs[0].name
    return None


def _nodes(values: Any) -> list[Node]:
    return [v for v in values if isinstance(v, fx.Node)]


def _first(value: Any) -> torch.Tensor:
    first: torch.Tensor = value[0] if isinstance(value, (list, tuple)) else value
    return first


def _lengths(node: Node) -> str:
    return _numbers(shape(node))


def _numbers(values: Any) -> str:
    return ", ".join(str(v) for v in values)
