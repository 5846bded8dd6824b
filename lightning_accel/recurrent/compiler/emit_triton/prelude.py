"""Functions that every emitted kernel may call, as Triton text.

They take no part of Triton's own library but its builtins, so that one process can interpret a kernel and compile it
for another machine. exp, tanh and log1p are written out, for Triton has them only in a library of the chip's vendor,
which its interpreter does not know. That also multiplies the bits of bfloat16 as integers, so there factors are made
wide first, which changes no product. Coefficients of tanh as in the Cephes library (Moshier).
"""

PRELUDE = '''
def plus_(a, b):
    return a + b


def tanh_32(x):
    a = tl.abs(x)
    z = x * x
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0.0, -large, large)
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(a < 0.625, p * z * x + x, large)


def tanh_64(x):
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -large, large)


def gelu_tanh_32(x):
    return tanh_32(0.7978845608028654 * (x + 0.044715 * x * x * x))


def gelu_tanh_64(x):
    return tanh_64(0.7978845608028654 * (x + 0.044715 * x * x * x))


def expm1_32(x):
    half = tanh_32(0.5 * x)
    return tl.where(tl.abs(x) < 0.5, 2.0 * half / (1.0 - half), tl.exp(x) - 1.0)


def expm1_64(x):
    half = tanh_64(0.5 * x)
    return tl.where(tl.abs(x) < 0.5, 2.0 * half / (1.0 - half), tl.exp(x) - 1.0)


def log1p_(x):
    u = 1.0 + x
    safe = tl.where((u == 1.0) | (u == float("inf")), 2.0, u)
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / (safe - 1.0))))


def dot_(left, right, total, PRECISION: tl.constexpr):
    if PRECISION == "wide":
        found = tl.dot(left.to(total.dtype), right.to(total.dtype), total, out_dtype=total.dtype)
    else:
        found = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return found


def meet_(p_arrived, target):
    """Wait until all programs that share a block of streams are here; what they wrote can be read then."""
    tl.debug_barrier()
    seen = tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") + 1
    while seen < target:
        seen = tl.atomic_add(p_arrived, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
'''
