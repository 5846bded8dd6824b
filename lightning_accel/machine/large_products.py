"""Products of large matrices of our own, where torch's library leaves half of the processor idle.

On AMD processors that compute on 512 bits at once (Zen 5 and later), MKL multiplies matrices at half the rate that the
tiles of `c_products` reach with one thread; on Zen 4, which takes 256 bits at a time, both are equal. Whether they are
used follows from the processor alone, so that runs repeat each other bit by bit.
"""

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_accel.machine.c_functions import REALS, compiled_library
from lightning_accel.machine.toolchain import CannotCompileError

_SUMMANDS = 1024  # of one pass: what is packed of both factors stays in the processor's own memory
_FEWEST = 16  # rows, columns and summands
_ZEN_5 = 26  # family of processors
_LARGE_PRODUCT = """
/* C (rows, columns) = A W + keep * C; A and W with strides of rows and of columns. Returns 0 without memory,
   and C is as it was. */
int large_product(int64_t rows, int64_t columns, int64_t inner, const real *A, int64_t ahead, int64_t along,
    const real *W, int64_t whead, int64_t walong, real *C, int64_t chead, int64_t keep) {
    const long tile = 2 * LANES, tiles = (columns + tile - 1) / tile;
    const size_t bytes = (size_t)(tiles * tile * inner * (long)sizeof(real) + 63) / 64 * 64;
    real *const made = (real *)aligned_alloc(64, bytes);
    real *const some = (real *)aligned_alloc(64, (size_t)(8 * inner * (long)sizeof(real) + 63) / 64 * 64);
    if (!made || !some) {
        free(made);
        free(some);
        return 0;
    }
    for (long j = 0; j < tiles; ++j) {
        const long start = j * tile, width = columns - start < tile ? columns - start : tile;
        real *const panel = made + j * inner * tile;
        if (width < tile)
            memset(panel, 0, (size_t)(inner * tile) * sizeof(real));
        if (walong == 1)
            for (long k = 0; k < inner; ++k)
                memcpy(panel + k * tile, W + k * whead + start, (size_t)width * sizeof(real));
        else
            for (long v = 0; v < width; ++v)
                for (long k = 0; k < inner; ++k)
                    panel[k * tile + v] = W[k * whead + (start + v) * walong];
    }
    for (long r = 0; r < rows; r += 8) {
        const long height = rows - r < 8 ? rows - r : 8;
        if (height < 8)
            memset(some, 0, (size_t)(8 * inner) * sizeof(real));
        if (height == 8 && ahead == 1)
            for (long k = 0; k < inner; ++k)
                memcpy(some + k * 8, A + r + k * along, 8 * sizeof(real));
        else
            for (long i = 0; i < height; ++i)
                for (long k = 0; k < inner; ++k)
                    some[k * 8 + i] = A[(r + i) * ahead + k * along];
        for (long j = 0; j < tiles; ++j) {
            const long start = j * tile, width = columns - start < tile ? columns - start : tile;
            block_of_rows(inner, some, made + j * inner * tile, C + r * chead + start, chead, width, height, keep);
        }
    }
    free(made);
    free(some);
    return 1;
}
"""
_BLOCK = """
static void block_of_rows(long inner, const real *A, const real *W, real *C, long chead, long width, long height,
    int64_t keep) {
    lanes sums[8][2];
    memset(sums, 0, sizeof(sums));
    if (keep)
        for (int r = 0; r < height; ++r)
            memcpy(sums[r], C + r * chead, (size_t)width * sizeof(real));
    for (long k = 0; k < inner; ++k, A += 8, W += 2 * LANES)
        for (int r = 0; r < 8; ++r)
            for (int v = 0; v < 2; ++v)
                sums[r][v] += A[r] * *(const lanes *)(W + v * LANES);
    for (int r = 0; r < height; ++r)
        memcpy(C + r * chead, sums[r], (size_t)width * sizeof(real));
}
"""


@functools.cache
def are_worth_it() -> bool:
    """Tell whether this processor is one on which torch's products are the slower ones."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    family = re.search(r"^cpu family\s*:\s*(\d+)", text, re.MULTILINE)
    is_recent = family is not None and int(family[1]) >= _ZEN_5
    return is_recent and "AuthenticAMD" in text and " avx512f" in text and torch.backends.mkl.is_available()


@functools.cache
def _function(dtype: torch.dtype) -> Callable[..., int] | None:
    try:
        function: Any = compiled_library(f"{_BLOCK}{_LARGE_PRODUCT}", dtype).large_product
    except CannotCompileError:
        return None
    number, address = ctypes.c_int64, ctypes.c_void_p
    matrix: list[Any] = [address, number, number]
    function.argtypes, function.restype = [*[number] * 3, *matrix, *matrix, address, number, number], ctypes.c_int
    found: Callable[..., int] = function
    return found


def multiply(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Do what ``torch.mm`` does."""
    made = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    return made if _multiplied(a, b, made, keep=False) else torch.mm(a, b, out=made)


def add_multiplied(first: Tensor, a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Do what ``torch.addmm`` does."""
    made = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    if made is not first:
        made.copy_(first)
    return made if _multiplied(a, b, made, keep=True) else made.addmm_(a, b)


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return a product, or add it to ``total`` in its place."""
    return multiply(left, right) if total is None else add_multiplied(total, left, right, out=total)


def _multiplied(a: Tensor, b: Tensor, out: Tensor, *, keep: bool) -> bool:
    rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
    if min(rows, inner, columns) < _FEWEST or torch.get_num_threads() != 1 or b.shape[0] != inner:
        return False
    if a.dtype not in REALS or not (a.dtype == b.dtype == out.dtype) or not (a.is_cpu and b.is_cpu and out.is_cpu):
        return False
    if out.shape != (rows, columns) or out.stride(1) != 1 or a.is_neg() or b.is_neg():
        return False
    function = _function(a.dtype)
    if function is None:
        return False
    for start in range(0, inner, _SUMMANDS):
        part_a, part_b = a[:, start : start + _SUMMANDS], b[start : start + _SUMMANDS]
        matrices = (part_a.data_ptr(), *part_a.stride(), part_b.data_ptr(), *part_b.stride())
        if not function(rows, columns, len(part_b), *matrices, out.data_ptr(), out.stride(0), keep or start > 0):
            raise MemoryError("there is no memory for the panels of a product of matrices.")
    return True
