"""Machine code of generated C, and the product of matrices that it calls.

The text includes nothing but the C library, so that a compiler takes a third of a second for it. Products of many rows
are those of torch's own library, by its exported symbols.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_accel.machine.c_products import PRODUCTS_IN_C
from lightning_accel.machine.toolchain import CannotCompileError, find_compiler, load

REALS = {torch.float32: "float", torch.float64: "double"}
_PRODUCTS = {torch.float32: "sgemm_", torch.float64: "dgemm_"}

# exp, sigmoid and tanh that a compiler can vectorize, within 2 units in the last place; in float64 the C library's.
# Coefficients of exp and tanh as in the Cephes library (Moshier). NaN passes every comparison and stays.
_PRELUDE = """
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
static inline float exp_float(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    float k = x * 1.44269504f + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &k, 4);
    k -= 12582912.0f;
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* 2^k in two factors: neither 2^128 nor 2^-150 is a normal number, the products of their halves are rounded once */
    int32_t power = (int32_t)((uint32_t)bits - 0x4b400000u), half = power >> 1;
    int32_t first = (int32_t)((uint32_t)(half + 127) << 23), second = (int32_t)((uint32_t)(power - half + 127) << 23);
    float factor, other;
    memcpy(&factor, &first, 4);
    memcpy(&other, &second, 4);
    return p * factor * other;
}
static inline float tanh_float(float x) {
    float a = fabsf(x), z = x * x;
    float large = copysignf(1.0f - 2.0f / (exp_float(2.0f * a) + 1.0f), x);
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    float small = p * z * x + x;
    return a < 0.625f ? small : (x != x ? x : large);
}
static inline real exp_real(real x) {
    return sizeof(real) == 4 ? (real)exp_float((float)x) : (real)exp((double)x);
}
static inline real sigmoid_real(real x) {
    return (real)1 / ((real)1 + exp_real(-x));
}
static inline real tanh_real(real x) {
    return sizeof(real) == 4 ? (real)tanh_float((float)x) : (real)tanh((double)x);
}
static inline real gelu_tanh(real x) {
    return tanh_real((real)0.7978845608028654 * (x + (real)0.044715 * x * x * x));
}
"""
_FIRST_TEXT = "int few_rows(void) { return FEW_ROWS; }"  # compiles wherever anything does


class MachineCode:
    """Compiled functions, each called as ``run(name, n, blocks, constants)``.

    Args:
        source: C functions ``void name(int64_t n, int64_t B, const int64_t *at, product_t call)`` on numbers of the
            type ``real``; ``at`` holds, for each tensor, its address and its strides in time and in streams.
        dtype: Of the numbers, float32 or float64.
        quick: See `lightning_accel.machine.toolchain.load`.

    Raises:
        CannotCompileError: If there is no compiler, or the text does not compile.
    """

    def __init__(self, source: str, dtype: torch.dtype, *, quick: bool = False) -> None:
        self._library = compiled_library(source, dtype, quick=quick)
        self._product = product_address(dtype)

    def run(self, name: str, steps: int, streams: int, blocks: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        """Call a function.

        Args:
            name: Of the function.
            steps: Time steps.
            streams: Size of the batch.
            blocks: Values of every time step, in the order of the text.
            constants: Values that no time step changes, after them. A matrix may lie column by column; its stride of
                streams is less the distance of its columns then, see `packed` in the text.
        """
        held: list[Tensor] = []
        at: list[int] = []
        for block in blocks:
            tensor, steps_apart, streams_apart = dense_rows(block, of_steps=True)
            held.append(tensor)
            at += (tensor.data_ptr(), steps_apart, streams_apart)
        for constant in constants:
            if _lies_by_columns(constant):
                at += (constant.data_ptr(), 0, -constant.stride(1))
                continue
            tensor, _, streams_apart = dense_rows(constant, of_steps=False)
            held.append(tensor)
            at += (tensor.data_ptr(), 0, streams_apart)
        getattr(self._library, name)(
            ctypes.c_int64(steps), ctypes.c_int64(streams), (ctypes.c_int64 * len(at))(*at), self._product
        )


def start_check() -> None:
    """Begin in the background what `refusal` asks, so that a slow compiler holds up nobody who has other work."""
    with _check_lock:
        begun, _begun[0] = _begun[0], True
    if not begun:
        threading.Thread(target=refusal, name="lightning_accel compiler check", daemon=True).start()


def refusal() -> str | None:
    """Return why this machine compiles nothing; ``None`` if it does."""
    with _answer_lock:  # who comes while the question is asked waits for the one answer
        return _refusal()


_check_lock, _answer_lock = threading.Lock(), threading.Lock()
_begun = [False]


@functools.cache
def _refusal() -> str | None:
    if find_compiler() is None:
        return "there is no C compiler (looked for $CC, cc, gcc and clang)"
    if any(not hasattr(_torch_library(), name) for name in _PRODUCTS.values()):
        return "torch's library exports no products of matrices"
    try:
        compiled_library(_FIRST_TEXT, torch.float32)
    except CannotCompileError as error:
        return str(error)
    return None


def second_factor(matrix: Tensor, streams: int) -> Tensor:
    """Return the second factor of a loop's products as they take it: for few streams as it lies, else row by row.

    Args:
        matrix: Of shape (inner, columns).
        streams: Rows of the first factor.
    """
    if streams <= _few_rows() and _lies_by_columns(matrix):
        return matrix
    return matrix.contiguous()


@functools.cache
def _few_rows() -> int:
    """Return the number of rows up to which a loop packs the second factor of its products by itself."""
    return int(compiled_library(_FIRST_TEXT, torch.float32).few_rows())


@functools.cache
def product_address(dtype: torch.dtype) -> ctypes.c_void_p:
    """Return the address of torch's product of matrices."""
    return ctypes.cast(getattr(_torch_library(), _PRODUCTS[dtype]), ctypes.c_void_p)


@functools.cache
def _torch_library() -> ctypes.CDLL | None:
    paths = sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"))
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(paths[0])) if paths else None
    return None


@functools.lru_cache(maxsize=256)
def compiled_library(source: str, dtype: torch.dtype, *, quick: bool = False) -> ctypes.CDLL:
    """Compile functions behind the prelude, once a process.

    Args:
        source: Of the functions.
        dtype: Of the type ``real`` in it.
        quick: See `lightning_accel.machine.toolchain.load`.

    Raises:
        CannotCompileError: If there is no compiler, or the text does not compile.
    """
    return load(f"typedef {REALS[dtype]} real;\n{_PRELUDE}\n{PRODUCTS_IN_C}\n{source}\n", quick=quick)


def dense_rows(tensor: Tensor, *, of_steps: bool) -> tuple[Tensor, int, int]:
    """Return a tensor with its last dimension dense, as generated functions read it, and how far its rows are apart.

    Args:
        tensor: Of shape (steps, streams, ...) or (streams, ...), or whatever all streams share.
        of_steps: Whether its first dimension is that of steps.

    Returns:
        The tensor, the distance of steps (0 without them) and that of streams; 0 where all share one row.
    """
    strides = tensor.stride()
    if strides and strides[-1] != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    dim = 1 if of_steps else 0
    has_streams = len(strides) == dim + 2 and tensor.shape[dim] != 1
    return tensor, strides[0] if of_steps else 0, strides[dim] if has_streams else 0


def _lies_by_columns(tensor: Tensor) -> bool:
    """Tell whether a tensor is a matrix whose columns, and not its rows, are dense."""
    if tensor.dim() != 2 or min(tensor.shape) < 2:
        return False
    return tensor.stride(0) == 1 and tensor.stride(1) >= tensor.shape[0]
