"""What containers and small tensors hold, in one piece: a look at a cell is due at every call of it."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from lightning_accel.recurrent.exactness.code_names import is_fixed

_CONTAINERS = (list, tuple, dict)
_ATOMS = frozenset({int, float, complex, str, bool, bytes, type(None)})
_MOST_ITEMS = 1_000  # more are counted one by one, for there may be too many to watch
_DEEPEST = 8  # a container may hold itself
_SMALL_TENSOR_BYTES = 2**16


def plain_contents(value: Any) -> tuple[type, str] | None:
    """Return what a container of numbers, texts and such containers holds; ``None`` if it holds anything else.

    It is told by Python's own text, which is another one for any other type, value or order: ``1``, ``1.0``, ``True``.
    """
    if not _is_plain(value, _DEEPEST):
        return None
    try:
        return type(value), repr(value)
    except ValueError:  # an integer of thousands of digits
        return None


def fixed_contents(value: Any) -> tuple[Any, ...] | None:
    """Return which objects a container holds where all of them stay what they are, see `is_fixed`; else ``None``."""
    kind = type(value)
    if kind not in _CONTAINERS or not value:
        return None
    items = value.values() if kind is dict else value
    if len(value) > _MOST_ITEMS or not all(map(is_fixed, set(map(type, items)))):
        return None
    keys = plain_contents(tuple(value)) if kind is dict else kind
    return None if keys is None else (keys, *map(id, items))


def numbers_of(tensor: Tensor) -> tuple[int, bytes] | None:
    """Return where a tensor lies and, if it is small, its numbers, which may be written to past autograd.

    ``None`` for those that do not lie densely in plain memory.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
        return None
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # one of a transform, which has no memory of its own
        return None
    if address == 0 or tensor.nbytes > _SMALL_TENSOR_BYTES:  # memory that was given back, or too much of it
        return address, b""
    return address, ctypes.string_at(address, tensor.nbytes)


def _is_plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind not in _CONTAINERS or len(value) > _MOST_ITEMS or depth == 0:
        return False
    parts = (value, value.values()) if kind is dict else (value,)
    for part in parts:
        kinds = set(map(type, part)) - _ATOMS
        if kinds and not (
            kinds.issubset(_CONTAINERS) and all(_is_plain(i, depth - 1) for i in part if type(i) in kinds)
        ):
            return False
    return True
