"""Every elementwise operation that is written in C gives what torch gives, on a grid of special numbers."""

import math

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from lightning_accel.machine.c_functions import MachineCode
from lightning_accel.recurrent.compiler.emit_c import emit_c_expression
from lightning_accel.recurrent.compiler.emit_c.emit_c_expression import expression
from lightning_accel.recurrent.compiler.normalize import normalize
from lightning_accel.recurrent.compiler.trace import _refuse_side_effects

ONE = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "exp of a mask": lambda x: torch.exp(x.masked_fill(x < 0, -math.inf)),
    "log": torch.log,
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "cube": lambda x: x**3,
    "root": lambda x: x.abs() ** 0.3,
    "inverse power": lambda x: x**-1.5,
    "sign": torch.sign,
    "sgn": torch.sgn,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "hardsigmoid": functional.hardsigmoid,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "elu of another slope": lambda x: functional.elu(x, 0.3),
    "selu": functional.selu,
    "celu": lambda x: functional.celu(x, 0.7),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu by tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "softplus": functional.softplus,
    "softplus of another slope": lambda x: functional.softplus(x, 2.0, 5.0),
    "softsign": functional.softsign,
    "softshrink": functional.softshrink,
    "hardshrink": functional.hardshrink,
    "tanhshrink": functional.tanhshrink,
    "logsigmoid": functional.logsigmoid,
    "threshold": lambda x: functional.threshold(x, 0.1, 20.0),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp below": lambda x: x.clamp(min=0.0),
    "clamp above": lambda x: x.clamp(max=0.1),
    "isnan": torch.isnan,
    "not": lambda x: ~(x > 0),
    "logical not": lambda x: torch.logical_not(x > 0),
    "one minus": lambda x: 1 - x,
    "scaled": lambda x: torch.add(0.3 * x, x, alpha=0.7),
    "divided": lambda x: x / 3.0,
}
TWO = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "clamp by a tensor": lambda x, y: x.clamp(min=y),
    "clamp above by a tensor": lambda x, y: x.clamp(max=y),
    "where": lambda x, y: torch.where(x > y, x, y),
    "where with a number": lambda x, y: torch.where(x > y, x, 0.5),
    "both": lambda x, y: (x > 0) & (y > 0),
    "either": lambda x, y: (x > 0) | (y > 0),
    "one of two": lambda x, y: (x > 0) ^ (y > 0),
    "logical and": lambda x, y: torch.logical_and(x > 0, y > 0),
    "logical or": lambda x, y: torch.logical_or(x > 0, y > 0),
    "masked fill": lambda x, y: x.masked_fill(y > 0, 2.5),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y),
    "threshold backward": lambda g, x: torch.ops.aten.threshold_backward(g, x, 0.1),
    "hardtanh backward": lambda g, x: torch.ops.aten.hardtanh_backward(g, x, -1.0, 1.0),
    "hardsigmoid backward": torch.ops.aten.hardsigmoid_backward.default,
    "leaky_relu backward": lambda g, x: torch.ops.aten.leaky_relu_backward(g, x, 0.01, False),
    "elu backward": lambda g, x: torch.ops.aten.elu_backward(g, 0.3, 1.1, 1.0, False, x),
    "elu backward of a result": lambda g, x: torch.ops.aten.elu_backward(g, 0.3, 1.1, 1.0, True, x),
    "softplus backward": lambda g, x: torch.ops.aten.softplus_backward(g, x, 1.0, 20.0),
    "softshrink backward": lambda g, x: torch.ops.aten.softshrink_backward(g, x, 0.5),
    "hardshrink backward": lambda g, x: torch.ops.aten.hardshrink_backward(g, x, 0.5),
    "sigmoid backward": lambda g, x: torch.func.vjp(torch.sigmoid, x)[1](g)[0],
    "tanh backward": lambda g, x: torch.func.vjp(torch.tanh, x)[1](g)[0],
    "logsigmoid backward": lambda g, x: torch.func.vjp(functional.logsigmoid, x)[1](g)[0],
    "gelu backward": lambda g, x: torch.func.vjp(functional.gelu, x)[1](g)[0],
    "gelu by tanh backward": lambda g, x: torch.func.vjp(lambda v: functional.gelu(v, approximate="tanh"), x)[1](g)[0],
    "silu backward": lambda g, x: torch.func.vjp(functional.silu, x)[1](g)[0],
    "clamp backward": lambda g, x: torch.func.vjp(lambda v: v.clamp(-0.5, 0.7), x)[1](g)[0],
}

# torch's own kernels are a few units of the *input* off here, ours are not: the difference of near numbers, and erf.
CANCELS = {
    "tanhshrink",
    "tanh backward",
    "gelu",
    "gelu by tanh",
    "gelu backward",
    "gelu by tanh backward",
    "silu backward",
}


def grid(dtype):
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    values = [0.0, least / 4, least, 1e-30, 1e-4, 0.1, 0.3, 0.5, 0.624, 0.626, 0.7, 1.0, 1.5, 2.5, 3.0, 6.0, 9.0, 20.0]
    values += [20.5, 50.0, 86.9, 87.5, 88.7, 88.8, 103.9, 104.5, 708.0, 710.0, 1e10, 1e30, most, math.inf, math.nan]
    return torch.tensor([*values, *(-v for v in values)], dtype=dtype)


def trace(function, inputs):
    """Trace as a step is traced; functions with more arguments than inputs get their defaults."""
    traced = make_fx(lambda *values: function(*values))(*inputs)
    _refuse_side_effects(traced)
    normalize(traced.graph)
    return traced


def in_c(function, inputs):
    """Compile ``function``, as traced and normalized, into one C loop; return what it computes."""
    traced = trace(function, inputs)
    names, lines = {}, []
    for k, node in enumerate(n for n in traced.graph.nodes if n.op == "placeholder"):
        names[node] = f"((real *)at[{3 * k}])[k]"
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is not torch.ops.aten.empty_like.default:
            constant = node.target in (torch.ops.aten.full.default, torch.ops.aten.scalar_tensor.default)
            text = "0" if constant else expression(node, names.__getitem__)
            assert text is not None, f"{node.target} has no form in C"
            number = "int" if node.meta["val"].dtype is torch.bool else "real"
            names[node] = f"x_{node.name}"
            lines.append(f"const {number} x_{node.name} = {text};")
    (result,) = fx.node.map_arg(next(n for n in traced.graph.nodes if n.op == "output").args[0:1], names.__getitem__)
    body = "\n".join([*lines, f"((real *)at[{3 * len(inputs)}])[k] = {result};"])
    source = f"""void all(int64_t n, int64_t B, const int64_t *at, product_t call) {{
    for (int64_t k = 0; k < B; ++k) {{ {body} }} }}"""
    out = torch.empty_like(inputs[0])
    flat = [t.contiguous().view(1, 1, -1) for t in (*inputs, out)]
    MachineCode(source, out.dtype).run("all", 1, out.numel(), flat, [])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_c_gives_what_torch_gives(name, dtype):
    values = grid(dtype)
    inputs = [values]
    if name in TWO:
        inputs = [v.reshape(-1).clone() for v in torch.meshgrid(values, values, indexing="ij")]
    # torch's kernels treat NaN otherwise where a vector is not full
    inputs = [torch.cat([v, torch.ones(-len(v) % 64, dtype=dtype)]) for v in inputs]
    function = {**ONE, **TWO}[name]
    expected = function(*inputs).to(dtype)
    actual = in_c(function, inputs)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    tiny, few_ulp = torch.finfo(dtype).tiny, (4e-7 if dtype is torch.float32 else 2e-15)
    near = (actual - expected).abs() <= few_ulp * expected.abs() + 3 * tiny * torch.finfo(dtype).eps
    if name in CANCELS:
        largest = torch.stack([i.abs() for i in inputs]).prod(0).clamp_min(1e-30)
        near |= ((actual - expected).abs() <= few_ulp * largest) | torch.stack([~i.isfinite() for i in inputs]).any(0)
    wrong = ~(same | near)
    shown = [tuple(float(v[k]) for v in (*inputs, actual, expected)) for k in wrong.nonzero()[:5, 0].tolist()]
    assert not shown, shown


def test_every_form_in_the_table_is_compared():
    seen = set()
    for function in (*ONE.values(), *TWO.values()):
        values = torch.rand(3) + 0.1
        arguments = (values, values) if function in TWO.values() else (values,)
        traced = trace(function, arguments)
        seen |= {n.target for n in traced.graph.nodes}
    aten = torch.ops.aten
    elsewhere = {aten.clone.default, aten.detach.default, aten.rsqrt.default, aten.clamp_max.Tensor}
    elsewhere |= {aten.clamp_min.Tensor, aten.masked_fill.Tensor, aten.mul.Scalar, aten.div.Scalar}
    table = {*emit_c_expression._FORMS, *emit_c_expression._BINARY} - elsewhere
    missing = {t for t in table - seen if not t._overloadname.startswith("Scalar")}
    assert not missing
