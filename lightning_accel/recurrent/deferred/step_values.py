"""Values that a tensor of every step must have, compared bit for bit at the cost of a look at its memory."""

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _memory_comparison() -> Callable[[int, int, int], int] | None:
    """Return the C library's ``memcmp``; several times the faster of all ways to compare some hundred numbers."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        compare: Any = ctypes.CDLL(None).memcmp
        compare.argtypes, compare.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int
        found: Callable[[int, int, int], int] = compare
        return found
    return None


_compare = _memory_comparison()


class StepValues:
    """Values of all steps.

    Args:
        values: Of shape (T, B, ...).
    """

    __slots__ = ("_address", "_bytes", "_dtype", "_shape", "values")

    def __init__(self, values: Tensor) -> None:
        self.values = values.contiguous()
        self._shape, self._dtype = values.shape[1:], values.dtype
        self._bytes = values.element_size() * (values.numel() // max(len(values), 1))
        self._address = self.values.data_ptr() if values.is_cpu and _compare is not None else 0

    def are_in(self, tensor: Tensor, step: int) -> bool:
        """Tell whether a tensor has the values of a step; on a GPU, where looking would wait, their shape and type."""
        if tensor.shape != self._shape or tensor.dtype is not self._dtype:
            return False
        if self._address and tensor.is_cpu and tensor.is_contiguous():
            return not _compare(tensor.data_ptr(), self._address + step * self._bytes, self._bytes)  # type: ignore[misc]
        return same_values(tensor, self.values[step])


def same_values(tensor: Tensor, expected: Tensor) -> bool:
    """Compare bit for bit; on a GPU, where looking waits for it, only shape and type."""
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype or tensor.device != expected.device:
        return False
    return tensor.device.type != "cpu" or torch.equal(tensor, expected)
