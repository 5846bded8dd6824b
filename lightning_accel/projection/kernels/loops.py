"""Loops over a tensor that a compiler makes of expressions; `compiled` has them compiled and says when.

Magnitudes are compared as integers, whose order is theirs once the sign bit is gone.
"""

import torch
from torch import Tensor


def largest_of_rows(bits: Tensor) -> Tensor:
    """Return the largest magnitude of each row of ``bits``, ``(rows, columns)``."""
    return (bits & torch.iinfo(bits.dtype).max).amax(1)


def largest_of_row_pairs(bits: Tensor) -> Tensor:
    """Do the same for pairs of 16-bit floats, int32 ``(rows, columns / 2)``."""
    return torch.maximum((bits & 0x7FFF0000).amax(1) >> 16, (bits & 0x7FFF).amax(1))


def largest_of_columns(blocks: Tensor) -> Tensor:
    """Return the largest magnitude of each column of ``blocks``, ``(blocks, height, columns)``."""
    return (blocks & torch.iinfo(blocks.dtype).max).amax(1).amax(0)


def largest_of_column_pairs(blocks: Tensor) -> Tensor:
    """Do the same for pairs."""
    return (blocks & 0x7FFF0000).amax(1).amax(0) | (blocks & 0x7FFF).amax(1).amax(0)


def clamp(bits: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Clamp in place to ``level``, ``(rows, 1)`` or ``(1, columns)``, keeping the bits of ``sign``."""
    return bits.copy_(torch.minimum(bits & torch.iinfo(bits.dtype).max, level) | (bits & sign))


def clamp_to(bits: Tensor, level: Tensor, sign: Tensor, target: Tensor) -> Tensor:
    """Write what `clamp` writes to ``target``."""
    return target.copy_(torch.minimum(bits & torch.iinfo(bits.dtype).max, level) | (bits & sign))


def _clamped_pairs(bits: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    high = torch.minimum(bits & 0x7FFF0000, level & 0x7FFF0000)
    low = torch.minimum(bits & 0x7FFF, level & 0x7FFF)
    return high | low | (bits & sign)


def clamp_pairs(bits: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Clamp pairs in place."""
    return bits.copy_(_clamped_pairs(bits, level, sign))


def clamp_pairs_to(bits: Tensor, level: Tensor, sign: Tensor, target: Tensor) -> Tensor:
    """Write what `clamp_pairs` writes to ``target``."""
    return target.copy_(_clamped_pairs(bits, level, sign))
