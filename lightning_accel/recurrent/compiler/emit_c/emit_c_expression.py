"""C expressions of elementwise ATen operations on single numbers."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning_accel.recurrent.compiler.rewrite import Node, aten

_BINARY = {
    aten.mul.Tensor: "*",
    aten.mul.Scalar: "*",
    aten.div.Tensor: "/",
    aten.div.Scalar: "/",
    aten.gt.Scalar: ">",
    aten.gt.Tensor: ">",
    aten.ge.Scalar: ">=",
    aten.ge.Tensor: ">=",
    aten.lt.Scalar: "<",
    aten.lt.Tensor: "<",
    aten.le.Scalar: "<=",
    aten.le.Tensor: "<=",
    aten.eq.Scalar: "==",
    aten.eq.Tensor: "==",
    aten.ne.Scalar: "!=",
    aten.ne.Tensor: "!=",
    aten.logical_and.default: "&&",
    aten.bitwise_and.Tensor: "&",
}
_DEFAULTS = {aten.softplus.default: (None, 1, 20)}
_SUMS = {aten.add.Tensor: "+", aten.add.Scalar: "+", aten.sub.Tensor: "-", aten.sub.Scalar: "-"}
# `{0}` and so on are the arguments. Comparisons are written so that NaN stays NaN.
_FORMS = {
    aten.neg.default: "-{0}",
    aten.sigmoid.default: "sigmoid_real({0})",
    aten.tanh.default: "tanh_real({0})",
    aten.exp.default: "exp_real({0})",
    aten.log.default: "(real)log((double){0})",
    aten.sin.default: "(real)sin((double){0})",
    aten.cos.default: "(real)cos((double){0})",
    aten.sqrt.default: "(real)sqrt((double){0})",
    aten.rsqrt.default: "(real)(1.0 / sqrt((double){0}))",
    aten.reciprocal.default: "(real)1 / {0}",
    aten.abs.default: "({0} < 0 ? -{0} : {0})",
    aten.clamp_min.default: "({0} < {1} ? {1} : {0})",
    aten.clamp_max.default: "({0} > {1} ? {1} : {0})",
    aten.maximum.default: "({0} > {1} || {0} != {0} ? {0} : {1})",
    aten.minimum.default: "({0} < {1} || {0} != {0} ? {0} : {1})",
    aten.threshold_backward.default: "({1} <= {2} ? (real)0 : {0})",
    aten.where.self: "({0} ? {1} : {2})",
    aten.masked_fill.Scalar: "({1} ? {2} : {0})",
    aten.sgn.default: "(real)(({0} > 0) - ({0} < 0))",
    aten.sign.default: "(real)(({0} > 0) - ({0} < 0))",
    aten.softplus.default: "({0} * {1} > {2} ? {0} : (real)log1p(exp((double)({0} * {1}))) / {1})",
    aten.softplus_backward.default: "({1} * {2} > {3} ? {0} : {0} * sigmoid_real({1} * {2}))",
    aten.logical_not.default: "!{0}",
    aten.bitwise_not.default: "!{0}",
    aten.clone.default: "{0}",
    aten.detach.default: "{0}",
}


def expression(node: Node, operand: Callable[[Node], str]) -> str | None:
    """Write the value of one number of an elementwise call; ``None`` if the operation is not among those known.

    Args:
        node: The call.
        operand: Names an argument's number.
    """
    target = node.target
    if target is aten._to_copy.default:
        return f"(real){operand(node.args[0])}" if node.meta["val"].dtype.is_floating_point else None
    if target is aten.expand.default:  # of one number to a row
        return operand(node.args[0])
    args = (*node.args, *_DEFAULTS.get(target, ())[len(node.args) :])
    parts = [_part(a, operand) for a in args]
    if any(p is None for p in parts):
        return None
    if target in _SUMS and set(node.kwargs) <= {"alpha"}:
        scale = node.kwargs.get("alpha", 1) if len(parts) < 3 else node.args[2]
        second = parts[1] if scale == 1 else f"{_part(scale, operand)} * {parts[1]}"
        return f"{parts[0]} {_SUMS[target]} {second}"
    if target is aten.addcmul.default and set(node.kwargs) <= {"value"}:
        scale = node.kwargs.get("value", 1)
        return f"{parts[0]} + {'' if scale == 1 else f'{_part(scale, operand)} * '}{parts[1]} * {parts[2]}"
    if _layout_only(node.kwargs):
        return _plain(target, parts)
    return None


def _plain(target: Any, parts: Sequence[Any]) -> str | None:
    if target in _BINARY and len(parts) == 2:
        return f"{parts[0]} {_BINARY[target]} {parts[1]}"
    if target in _FORMS:
        return _FORMS[target].format(*parts)
    if target is aten.pow.Tensor_Scalar and parts[1] == "((real)2.0)":
        return f"{parts[0]} * {parts[0]}"
    return None


def _layout_only(kwargs: dict[str, Any]) -> bool:
    return all(k == "memory_format" for k in kwargs)


def _part(value: Any, operand: Callable[[Node], str]) -> str | None:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        number = repr(float(value))
        return f"((real){number.replace('inf', 'INFINITY').replace('nan', 'NAN')})"
    return operand(value) if hasattr(value, "meta") else None
