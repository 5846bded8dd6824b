"""Triton expressions of elementwise ATen operations on a tile of numbers.

Each gives what torch gives, NaN and infinities included, within the rounding of the last places; a test compares every
one of them on a grid of numbers, through Triton's interpreter.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

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
    aten.logical_and.default: "&",
    aten.logical_or.default: "|",
} | {getattr(getattr(aten, name), kind): sign for name, sign in _COMPARISONS.items() for kind in ("Tensor", "Scalar")}
_FLAGS_ONLY = {
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
}
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
# `{0}` and so on are the arguments, `{real}` the type of the numbers. Comparisons are written so that NaN stays NaN.
_FORMS = {
    aten.neg.default: "-{0}",
    aten.sigmoid.default: "1.0 / (1.0 + tl.exp(-{0}))",
    aten.tanh.default: "tanh_{bits}({0})",
    aten.exp.default: "tl.exp({0})",
    aten.log.default: "tl.log({0})",
    aten.sqrt.default: "tl.sqrt({0})",
    aten.rsqrt.default: "1.0 / tl.sqrt({0})",
    aten.reciprocal.default: "1.0 / {0}",
    aten.abs.default: "tl.abs({0})",
    aten.sin.default: "tl.sin({0})",
    aten.cos.default: "tl.cos({0})",
    aten.erf.default: "tl.erf({0})",
    aten.floor.default: "tl.floor({0})",
    aten.ceil.default: "tl.ceil({0})",
    aten.trunc.default: "tl.where({0} < 0.0, tl.ceil({0}), tl.floor({0}))",
    aten.log1p.default: "log1p_({0})",
    aten.expm1.default: "expm1_{bits}({0})",
    aten.clamp_min.default: "tl.where({0} < {1}, {1}, {0})",
    aten.clamp_max.default: "tl.where({0} > {1}, {1}, {0})",
    aten.clamp_min.Tensor: "tl.where(({0} < {1}) | ({1} != {1}), {1}, {0})",
    aten.clamp_max.Tensor: "tl.where(({0} > {1}) | ({1} != {1}), {1}, {0})",
    aten.hardtanh.default: "tl.where({0} < {1}, {1}, tl.where({0} > {2}, {2}, {0}))",
    aten.hardtanh_backward.default: "tl.where(({1} > {2}) & ({1} < {3}), {0}, 0.0)",
    aten.hardsigmoid.default: "tl.where({0} <= -3.0, 0.0, tl.where({0} >= 3.0, 1.0, ({0} + 3.0) / 6.0))",
    aten.hardsigmoid_backward.default: "tl.where(({1} > -3.0) & ({1} < 3.0), {0} * (1.0 / 6.0), 0.0)",
    aten.silu.default: "{0} / (1.0 + tl.exp(-{0}))",
    aten.softplus.default: "tl.where({0} * {1} > {2}, {0}, log1p_(tl.exp({0} * {1})) / {1})",
    aten.softplus_backward.default: "tl.where({1} * {2} > {3}, {0}, {0} / (1.0 + tl.exp(-({1} * {2}))))",
    aten.elu.default: "tl.where({0} < 0.0, expm1_{bits}({0} * {3}) * ({1} * {2}), {0} * {2})",
    aten.celu.default: "tl.where({0} < 0.0, expm1_{bits}({0} / {1}) * {1}, {0})",
    aten.leaky_relu.default: "tl.where({0} > 0.0, {0}, {0} * {1})",
    aten.leaky_relu_backward.default: "tl.where({1} > 0.0, {0}, {0} * {2})",
    aten.softshrink.default: "tl.where({0} > {1}, {0} - {1}, tl.where({0} < -{1}, {0} + {1}, {0} * 0.0))",
    aten.hardshrink.default: "tl.where(({0} >= -{1}) & ({0} <= {1}), 0.0, {0})",
    aten.softshrink_backward.default: "tl.where(({1} < -{2}) | ({1} > {2}), {0}, 0.0)",
    aten.hardshrink_backward.default: "tl.where(({1} < -{2}) | ({1} > {2}), {0}, 0.0)",
    aten.maximum.default: "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    aten.minimum.default: "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    aten.threshold.default: "tl.where({0} <= {1}, {2}, {0})",
    aten.threshold_backward.default: "tl.where({1} <= {2}, 0.0, {0})",
    aten.where.self: "tl.where({0}, {1}, {2})",
    aten.masked_fill.Scalar: "tl.where({1}, {2}, {0})",
    aten.masked_fill.Tensor: "tl.where({1}, {2}, {0})",
    aten.sgn.default: "({0} > 0.0).to({real}) - ({0} < 0.0).to({real})",
    aten.sign.default: "({0} > 0.0).to({real}) - ({0} < 0.0).to({real})",
    aten.isnan.default: "{0} != {0}",
    aten.clone.default: "{0}",
    aten.detach.default: "{0}",
}
_GELU_FORMS = {
    (aten.gelu.default, "none"): "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    (aten.gelu.default, "tanh"): "0.5 * {0} * (1.0 + gelu_tanh_{bits}({0}))",
    (aten.gelu_backward.default, "none"): "{0} * (0.5 * (1.0 + tl.erf({1} * 0.7071067811865476))"
    " + {1} * tl.exp(-0.5 * {1} * {1}) * 0.3989422804014327)",
    (aten.gelu_backward.default, "tanh"): "{0} * (0.5 * (1.0 + gelu_tanh_{bits}({1}))"
    " + 0.5 * {1} * (1.0 - gelu_tanh_{bits}({1}) * gelu_tanh_{bits}({1}))"
    " * 0.7978845608028654 * (1.0 + 0.134145 * {1} * {1}))",
}
_CONDITIONS = {aten.where.self: (0,), aten.masked_fill.Scalar: (1,), aten.masked_fill.Tensor: (1,)}
TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.bool: "tl.int1",
}


def expression(node: Node, operand: Callable[[Node], str], real: torch.dtype) -> str | None:
    """Write the value of a tile of an elementwise call; ``None`` if the operation is not among those known.

    Args:
        node: The call.
        operand: Names an argument's tile, numbers in the type ``real``, flags as they are.
        real: Type in which numbers are computed, float32 or float64.
    """
    target = node.target
    if target is aten._to_copy.default:
        return _converted(node, operand, real)
    if target is aten.expand.default:  # of one number to a row
        return operand(node.args[0])
    if target in (aten.gelu.default, aten.gelu_backward.default):
        form = _GELU_FORMS[target, node.kwargs.get("approximate", "none")]
        return form.format(*(_number(a, operand, real, target, 0) for a in node.args), bits=_bits(real))
    args = (*node.args, *_DEFAULTS.get(target, ())[len(node.args) :])
    parts = [None if a is None else _number(a, operand, real, target, k) for k, a in enumerate(args)]
    if target in (aten.clamp.default, aten.clamp.Tensor):
        return _clamp(parts, args[1:])
    if any(p is None for p in parts):
        return None
    if target in _SUMS and set(node.kwargs) <= {"alpha"}:
        scale = node.kwargs.get("alpha", 1) if len(parts) < 3 else node.args[2]
        second = parts[1] if scale == 1 else f"{scale!r} * {parts[1]}"
        return f"{parts[0]} {_SUMS[target]} {second}"
    if target in (aten.addcmul.default, aten.addcdiv.default) and set(node.kwargs) <= {"value"}:
        scale, sign = node.kwargs.get("value", 1), "*" if target is aten.addcmul.default else "/"
        return f"{parts[0]} + {'' if scale == 1 else f'{float(scale)!r} * '}{parts[1]} {sign} {parts[2]}"
    if any(k != "memory_format" for k in node.kwargs):
        return None
    flags = [a for a in node.args if isinstance(a, fx.Node) and a.meta["val"].dtype is torch.bool]
    if target in _FLAGS_ONLY and len(flags) < len(node.args):
        return None
    if target in (aten.bitwise_not.default, aten.logical_not.default):
        return f"{parts[0]} == 0"
    if target is aten.elu_backward.default:
        return _elu_backward(node.args[4], [p for p in parts if p is not None])
    if target is aten.leaky_relu_backward.default and node.args[3]:
        return None
    return _plain(target, [p for p in parts if p is not None], node.args, real)


def _plain(target: Any, parts: Sequence[str], args: Sequence[Any], real: torch.dtype) -> str | None:
    if target in _BINARY and len(parts) == 2:
        return f"{parts[0]} {_BINARY[target]} {parts[1]}"
    if target in _FORMS:
        return _FORMS[target].format(*parts, real=TYPES[real], bits=_bits(real))
    if target is aten.pow.Tensor_Scalar:
        if args[1] in (1, 2, 3):
            return " * ".join([parts[0]] * int(args[1]))
        return f"tl.sqrt({parts[0]})" if args[1] == 0.5 else None
    return None


def _converted(node: Node, operand: Callable[[Node], str], real: torch.dtype) -> str | None:
    """Write a conversion: numbers are kept in the type of computation, rounded to what the step asks for."""
    (source,), to = node.args, node.meta["val"].dtype
    value = operand(source)
    if source.meta["val"].dtype is torch.bool:
        return f"{value}.to({TYPES[real]})" if to.is_floating_point else None
    if not to.is_floating_point:
        return f"{value} != 0.0" if to is torch.bool else None
    return value if to is real else f"{value}.to({TYPES[to]}).to({TYPES[real]})"


def _clamp(parts: Sequence[str | None], limits: Sequence[Any]) -> str | None:
    """Write ``clamp(x, low, high)``, of which one may be missing."""
    if any(isinstance(limit, float) and math.isnan(limit) for limit in limits):
        return None
    x, low, high = parts
    inner = x if low is None else f"tl.where(({x} < {low}) | ({low} != {low}), {low}, {x})"
    return inner if high is None else f"tl.where(({inner} > {high}) | ({high} != {high}), {high}, {inner})"


def _elu_backward(is_result: bool, parts: Sequence[str]) -> str:
    gradient, alpha, scale, input_scale, _, value = parts
    if is_result:
        slope = f"{input_scale} * ({value} + {alpha} * {scale})"
    else:
        slope = f"{input_scale} * ({alpha} * {scale}) * tl.exp({value} * {input_scale})"
    return f"tl.where({value} > 0.0, {gradient} * {scale}, {gradient} * {slope})"


def _bits(real: torch.dtype) -> str:
    return "64" if real is torch.float64 else "32"


def _number(
    value: Any, operand: Callable[[Node], str], real: torch.dtype, target: Any = None, place: int = -1
) -> str | None:
    """Write an argument: a number of the text, or a tile, whose flags count as 0 and 1 where numbers are wanted."""
    if isinstance(value, bool):
        return repr(value)
    if isinstance(value, (int, float)):
        return _literal(float(value), real)
    if not hasattr(value, "meta") or not isinstance(value.meta["val"], torch.Tensor):
        return None
    kind = value.meta["val"].dtype
    if value.target in (aten.full.default, aten.scalar_tensor.default):  # a number that stands in the text
        number = value.args[1] if value.target is aten.full.default else value.args[0]
        if isinstance(number, (bool, int, float)):
            return repr(bool(number)) if kind is torch.bool else _literal(float(number), real)
    text = operand(value)
    wants_flag = target in _FLAGS_ONLY or place in _CONDITIONS.get(target, ()) or target is aten.bitwise_not.default
    return f"{text}.to({TYPES[real]})" if kind is torch.bool and not wants_flag else text


def _literal(number: float, real: torch.dtype) -> str:
    if math.isfinite(number) and real is torch.float32:
        return repr(number) if number >= 0 else f"({number!r})"
    text = repr(number) if math.isfinite(number) else f'float("{number!r}")'
    return f"tl.full((), {text}, {TYPES[real]})"
