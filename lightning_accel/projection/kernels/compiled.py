"""Passes over memory that `torch.compile` makes one loop each, where there is a compiler: an option, never a need.

Magnitudes are compared as integers, whose order is theirs once the sign bit is gone: that is one instruction where the
rules for NaN take several. 16-bit floats go in pairs, an integer each. Columns are reduced in blocks of a few rows, as
the loop that a compiler makes of a whole column runs down a column before it turns to the next.

Maxima and clamps are those of the eager passes bit for bit, so they may be compiled at any time; sums, whose order a
compiler changes, are not compiled. Every function returns ``None`` (or ``False``) where the eager pass is to do the
work.
"""

import functools
import logging
import math
import time
import types
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_accel.projection.kernels import loops

Compile = bool | Literal["auto"]

_log = logging.getLogger(__name__)
_LARGE = 1 << 22  # bytes; passes over less stay in the caches, where calls cost as much as compiling spares
_WORTH = 1 << 36  # bytes; eager passes over so many lose as much time as compiling takes, about 6 s
_BLOCK = 25  # rows of a block that columns are reduced in
_LEAST = 8  # rows; fewer are left to eager passes
_NARROW = 32  # entries a row; as above
_HALVES = (torch.float16, torch.bfloat16)
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

_wanted: ContextVar[Compile] = ContextVar("compiled passes wanted", default="auto")
_seen = [0]  # bytes of large tensors that passed eagerly
_broken: list[str] = []  # why compiling failed on this machine; it is tried once


class compiling:  # noqa: N801  # a context manager, which a generator would make twice as slow
    """Within the block: compile passes at once (``True``), never, or (``"auto"``) when it has paid."""

    def __init__(self, wanted: Compile) -> None:
        self.wanted = wanted

    def __enter__(self) -> None:
        """Begin the block."""
        self._token = _wanted.set(self.wanted)

    def __exit__(self, *_: object) -> None:
        """End it."""
        _wanted.reset(self._token)


def check_compile(wanted: object) -> None:
    """Refuse an unknown wish.

    Raises:
        ValueError: If it is none of ``True``, ``False`` and ``"auto"``.
    """
    if wanted not in (True, False, "auto"):
        raise ValueError(f"`compile` must be True, False or 'auto', got {wanted!r}.")


def _give_up(error: Exception) -> None:
    """Compile nothing from now on, and say why."""
    _broken.append(str(error))
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(
        f"Compiling projections failed, so they go on without: {first}. Install a C++ compiler, or pass "
        "`compile=False`.",
        RuntimeWarning,
        stacklevel=3,
    )


def largest(x: Tensor) -> Tensor | None:
    """Return the largest magnitude of each row (``before`` is 1) or column, as `eager.group_max`.

    Args:
        x: ``(before, groups, after)``.

    Returns:
        ``(groups,)``, or ``(groups * after,)`` where ``before`` is not 1.
    """
    before, groups, after = x.shape
    rows = x[0] if before == 1 else x.view(before, groups * after)
    bits = _bits(rows) if _possible(rows, by_row=before == 1) and _pays(x) else None
    if bits is None:
        return None
    if before == 1:
        found = _run(loops.largest_of_row_pairs if x.dtype in _HALVES else loops.largest_of_rows, bits)
        return found if found is None else (found.to(torch.int16) if x.dtype in _HALVES else found).view(x.dtype)
    blocks, rest = _row_blocks(bits)
    found = _run(loops.largest_of_column_pairs if x.dtype in _HALVES else loops.largest_of_columns, blocks)
    if found is None or rest == 0:
        return found if found is None else found.view(x.dtype)
    return torch.maximum(found.view(x.dtype), rows[-rest:].abs().amax(0))


def clamp(source: Tensor, bounds: Tensor, target: Tensor) -> bool:
    """Do what `eager.clamp` does; say whether it was done."""
    before, groups, after = source.shape
    rows, out = (t[0] if before == 1 else t.view(before, groups * after) for t in (source, target))
    in_place = source.data_ptr() == target.data_ptr()
    if not (_possible(rows, by_row=before == 1) and _pays(source)):
        return False
    bits, out_bits = _bits(rows), _bits(out)
    if bits is None or out_bits is None:
        return False
    pairs = source.dtype in _HALVES
    if float(bounds.max()) == math.inf:  # infinite bounds leave NaN alone, which is above infinity here
        return False
    level = bounds.view(torch.int16 if pairs else bits.dtype)
    repeats = (2 if pairs else 1) if before == 1 else after
    if repeats > 1:
        level = level.repeat_interleave(repeats)
    info = torch.iinfo(level.dtype)
    sign = -level >> (info.bits - 1) & info.min  # none where the level is 0
    level, sign = (t.view(bits.dtype).unsqueeze(1 if before == 1 else 0) for t in (level, sign))
    targets = () if in_place else (out_bits,)
    function = _clamp_loop(pairs=pairs, in_place=in_place)
    if _run(function, bits, level, sign, *targets) is None:
        return False
    # compiled code writes without telling autograd, which must not use values that are gone for a gradient
    if not target.is_inference():
        torch.autograd.graph.increment_version(target)
    return True


def _clamp_loop(*, pairs: bool, in_place: bool) -> Callable[..., Tensor]:
    """Return what clamps integers of floats (or of pairs of 16-bit ones) to levels, keeping the bits of ``sign``.

    Arguments: integers ``(rows, columns)``; level and sign, ``(rows, 1)`` or ``(1, columns)``; if not in place the
    target. Inductor treats a target that is the source itself differently, so there are two of each.
    """
    if in_place:
        return loops.clamp_pairs if pairs else loops.clamp
    return loops.clamp_pairs_to if pairs else loops.clamp_to


def _possible(rows: Tensor, *, by_row: bool) -> bool:
    if _broken or _wanted.get() is False or rows.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return rows.shape[1] >= _NARROW and rows.shape[0] >= (2 if by_row else _LEAST)


def _pays(x: Tensor) -> bool:
    if _wanted.get() is True:
        return True
    size = x.numel() * x.element_size()
    if size < _LARGE:
        return False
    _seen[0] += size
    return _seen[0] > _WORTH


def _bits(rows: Tensor) -> Tensor | None:
    """View floats as integers, 16-bit ones in pairs; ``None`` where that does not come out even."""
    if rows.dtype not in _HALVES:
        return rows.view(_INTEGERS[rows.dtype])
    return rows.view(torch.int32) if rows.shape[1] % 2 == 0 == rows.storage_offset() % 2 else None


def _row_blocks(rows: Tensor) -> tuple[Tensor, int]:
    """Return rows as ``(blocks, height, width)``, and how many rows are left over at the end, best none."""
    height = min(_BLOCK, len(rows) // 2)
    height = next((h for h in range(height, height // 2, -1) if len(rows) % h == 0), height)
    blocks = len(rows) // height
    return rows[: blocks * height].view(blocks, height, -1), len(rows) - blocks * height


def _run(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call a function compiled; return ``None``, after one warning, where that fails."""
    key = function, tensors[0].dtype, torch.get_num_threads()
    begin = 0.0 if key in _known else time.perf_counter()
    try:
        if torch.is_grad_enabled():
            with torch.no_grad():
                result = _compiled(*key)(*tensors)
        else:
            result = _compiled(*key)(*tensors)
    except Exception as error:  # whatever a compiler may raise
        _give_up(error)
        return None
    if begin:
        _known.add(key)
        _log.info("Compiled %s of projections (%s) in %.1f s.", function.__name__, key[1], time.perf_counter() - begin)
    return result


_known: set[tuple[Callable[..., Any], torch.dtype, int]] = set()  # what was logged


@functools.cache
def _compiled(function: Callable[..., Any], dtype: torch.dtype, threads: int) -> Callable[..., Any]:  # noqa: ARG001
    """Compile a function once a type and number of threads, as code of its own: others need not be looked through."""
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=True, fullgraph=True)
