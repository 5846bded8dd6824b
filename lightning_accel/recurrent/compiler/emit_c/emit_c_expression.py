"""C expressions of elementwise ATen operations on single numbers.

Each gives what torch gives, for infinities, NaN, both zeros and the smallest numbers too, within the rounding of the
last places; a test compares every one of them on a grid of such numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_accel.recurrent.compiler.rewrite import Node, aten

_COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_BINARY = {
    aten.mul.Tensor: "*",
    aten.mul.Scalar: "*",
    aten.div.Tensor: "/",
    aten.div.Scalar: "/",
    aten.bitwise_and.Tensor: "&",
    aten.bitwise_or.Tensor: "|",
    aten.bitwise_xor.Tensor: "^",
    aten.logical_and.default: "&&",
    aten.logical_or.default: "||",
} | {getattr(getattr(aten, name), kind): sign for name, sign in _COMPARISONS.items() for kind in ("Tensor", "Scalar")}
_SUMS = {aten.add.Tensor: "+", aten.add.Scalar: "+", aten.sub.Tensor: "-", aten.sub.Scalar: "-"}
# Arguments that may be left out, in order.
_DEFAULTS: dict[Any, tuple[Any, ...]] = {
    aten.softplus.default: (None, 1, 20),
    aten.elu.default: (None, 1, 1, 1),
    aten.celu.default: (None, 1.0),
    aten.leaky_relu.default: (None, 0.01),
    aten.hardtanh.default: (None, -1, 1),
    aten.softshrink.default: (None, 0.5),
    aten.hardshrink.default: (None, 0.5),
    aten.clamp.default: (None, None, None),
    aten.clamp.Tensor: (None, None, None),
}
# `{0}` and so on are the arguments. Comparisons are written so that NaN stays NaN.
_FORMS = {
    aten.neg.default: "-{0}",
    aten.sigmoid.default: "sigmoid_real({0})",
    aten.tanh.default: "tanh_real({0})",
    aten.exp.default: "exp_real({0})",
    aten.sqrt.default: "(real)sqrt((double){0})",
    aten.rsqrt.default: "(real)(1.0 / sqrt((double){0}))",
    aten.reciprocal.default: "(real)1 / {0}",
    aten.abs.default: "(real)fabs((double){0})",
    aten.clamp_min.default: "({0} < {1} ? {1} : {0})",
    aten.clamp_max.default: "({0} > {1} ? {1} : {0})",
    aten.clamp_min.Tensor: "({0} < {1} || {1} != {1} ? {1} : {0})",
    aten.clamp_max.Tensor: "({0} > {1} || {1} != {1} ? {1} : {0})",
    aten.hardtanh.default: "({0} < {1} ? {1} : {0} > {2} ? {2} : {0})",
    aten.hardtanh_backward.default: "({1} > {2} && {1} < {3} ? {0} : (real)0)",
    aten.hardsigmoid.default: "({0} <= -3 ? (real)0 : {0} >= 3 ? (real)1 : ({0} + 3) / 6)",
    aten.hardsigmoid_backward.default: "({1} > -3 && {1} < 3 ? {0} * (real)(1.0f / 6.0f) : (real)0)",
    aten.silu.default: "{0} / ((real)1 + exp_real(-{0}))",
    aten.softplus.default: "({0} * {1} > {2} ? {0} : (real)log1p(exp((double)({0} * {1}))) / {1})",
    aten.softplus_backward.default: "({1} * {2} > {3} ? {0} : {0} * exp_real({1} * {2}) / (exp_real({1} * {2}) + 1))",
    aten.elu.default: "({0} < 0 ? (real)expm1((double)({0} * {3})) * ({1} * {2}) : {0} * {2})",
    aten.celu.default: "({0} < 0 ? (real)expm1((double)({0} / {1})) * {1} : {0})",
    aten.leaky_relu.default: "({0} > 0 ? {0} : {0} * {1})",
    aten.leaky_relu_backward.default: "({1} > 0 ? {0} : {0} * {2})",
    aten.softshrink.default: "({0} > {1} ? {0} - {1} : {0} < -{1} ? {0} + {1} : {0} * 0)",
    aten.hardshrink.default: "({0} >= -{1} && {0} <= {1} ? (real)0 : {0})",
    aten.softshrink_backward.default: "({1} < -{2} || {1} > {2} ? {0} : (real)0)",
    aten.hardshrink_backward.default: "({1} < -{2} || {1} > {2} ? {0} : (real)0)",
    aten.maximum.default: "({0} > {1} || {0} != {0} ? {0} : {1})",
    aten.minimum.default: "({0} < {1} || {0} != {0} ? {0} : {1})",
    aten.threshold.default: "({0} <= {1} ? {2} : {0})",
    aten.threshold_backward.default: "({1} <= {2} ? (real)0 : {0})",
    aten.where.self: "({0} ? {1} : {2})",
    aten.masked_fill.Scalar: "({1} ? {2} : {0})",
    aten.masked_fill.Tensor: "({1} ? {2} : {0})",
    aten.sgn.default: "(real)(({0} > 0) - ({0} < 0))",
    aten.sign.default: "(real)(({0} > 0) - ({0} < 0))",
    aten.logical_not.default: "!{0}",
    aten.isnan.default: "{0} != {0}",
    aten.clone.default: "{0}",
    aten.detach.default: "{0}",
    aten.addcdiv.default: "{0} + {1} / {2}",
} | {
    getattr(aten, name).default: f"(real){name}((double){{0}})"
    for name in ("log", "log1p", "expm1", "sin", "cos", "tan", "sinh", "cosh", "atan", "erf", "floor", "ceil", "trunc")
}
_FLAGS_ONLY = {aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor}  # C has them for integers only
_GELU_FORMS = {
    (aten.gelu.default, "none"): "(real)0.5 * {0} * (real)(1.0 + erf((double){0} * 0.7071067811865476))",
    (aten.gelu.default, "tanh"): "(real)0.5 * {0} * ((real)1 + gelu_tanh({0}))",
    (aten.gelu_backward.default, "none"): "{0} * (real)(0.5 * (1.0 + erf((double){1} * 0.7071067811865476))"
    " + (double){1} * exp(-0.5 * (double){1} * (double){1}) * 0.3989422804014327)",
    (aten.gelu_backward.default, "tanh"): "{0} * ((real)0.5 * ((real)1 + gelu_tanh({1}))"
    " + (real)0.5 * {1} * ((real)1 - gelu_tanh({1}) * gelu_tanh({1}))"
    " * (real)0.7978845608028654 * ((real)1 + (real)0.134145 * {1} * {1}))",
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
    if target in (aten.gelu.default, aten.gelu_backward.default):
        form = _GELU_FORMS[target, node.kwargs.get("approximate", "none")]
        return form.format(*map(operand, node.args))
    args = (*node.args, *_DEFAULTS.get(target, ())[len(node.args) :])
    if target in (aten.clamp.default, aten.clamp.Tensor):
        return _clamp([None if a is None else _part(a, operand) for a in args], args[1:])
    parts = [_part(a, operand) for a in args]
    if any(p is None for p in parts):
        return None
    if target in _SUMS and set(node.kwargs) <= {"alpha"}:
        scale = node.kwargs.get("alpha", 1) if len(parts) < 3 else node.args[2]
        second = parts[1] if scale == 1 else f"{_part(scale, operand)} * {parts[1]}"
        return f"{parts[0]} {_SUMS[target]} {second}"
    if target in (aten.addcmul.default, aten.addcdiv.default) and set(node.kwargs) <= {"value"}:
        scale, sign = node.kwargs.get("value", 1), "*" if target is aten.addcmul.default else "/"
        return f"{parts[0]} + {'' if scale == 1 else f'{_part(scale, operand)} * '}{parts[1]} {sign} {parts[2]}"
    if not _layout_only(node.kwargs) or (target in _FLAGS_ONLY and node.meta["val"].dtype is not torch.bool):
        return None
    if target is aten.bitwise_not.default:
        return f"!{parts[0]}" if node.meta["val"].dtype is torch.bool else None
    if target is aten.elu_backward.default:
        return _elu_backward(node.args[4], parts)
    if target is aten.leaky_relu_backward.default and node.args[3]:
        return None
    return _plain(target, parts)


def _plain(target: Any, parts: Sequence[Any]) -> str | None:
    if target in _BINARY and len(parts) == 2:
        return f"{parts[0]} {_BINARY[target]} {parts[1]}"
    if target in _FORMS:
        return _FORMS[target].format(*parts)
    if target is aten.pow.Tensor_Scalar:
        if parts[1] in ("((real)1.0)", "((real)2.0)", "((real)3.0)"):
            return " * ".join([parts[0]] * int(float(parts[1][7:-1])))
        return f"(real)pow((double){parts[0]}, (double){parts[1]})"
    return None


def _clamp(parts: Sequence[str | None], limits: Sequence[Any]) -> str | None:
    """Write ``clamp(x, low, high)``, of which one may be missing."""
    if any(isinstance(limit, float) and math.isnan(limit) for limit in limits):
        return None
    x, low, high = parts
    inner = x if low is None else f"({x} < {low} || {low} != {low} ? {low} : {x})"
    return inner if high is None else f"({inner} > {high} || {high} != {high} ? {high} : {inner})"


def _elu_backward(is_result: bool, parts: Sequence[Any]) -> str:
    gradient, alpha, scale, input_scale, _, value = parts
    if is_result:
        slope = f"{input_scale} * ({value} + {alpha} * {scale})"
    else:
        slope = f"{input_scale} * ({alpha} * {scale}) * exp_real({value} * {input_scale})"
    return f"({value} > 0 ? {gradient} * {scale} : {gradient} * {slope})"


def _layout_only(kwargs: dict[str, Any]) -> bool:
    return all(k == "memory_format" for k in kwargs)


def _part(value: Any, operand: Callable[[Node], str]) -> str | None:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        number = repr(float(value))
        return f"((real){number.replace('inf', 'INFINITY').replace('nan', 'NAN')})"
    if not hasattr(value, "meta"):
        return None
    if value.target in (aten.full.default, aten.scalar_tensor.default):  # a number that stands in the text
        number = value.args[1] if value.target is aten.full.default else value.args[0]
        if isinstance(number, (bool, int, float)):
            return _part(bool(number) if value.meta["val"].dtype is torch.bool else float(number), operand)
    return operand(value)
