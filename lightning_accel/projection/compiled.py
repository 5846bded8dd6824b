"""Passes over memory that `torch.compile` makes one loop each, where there is a compiler: an option, never a need.

Magnitudes are compared as integers, whose order is theirs once the sign bit is gone: that is one instruction where the
rules for NaN take several. 16-bit floats go in pairs, an integer each. Columns are reduced in blocks of a few rows, as
the loop that a compiler makes of a whole column runs down a column before it turns to the next.

Maxima and clamps are those of the eager passes bit for bit, so they may be compiled at any time. Sums are added in
another order (they agree to about 1e-6 of their size in float32 and 1e-14 in float64), so they are compiled only where
somebody asks. Every function returns ``None`` (or ``False``) where the eager pass is to do the work.
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
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_accel.projection import passes

Compile = bool | Literal["auto"]

_log = logging.getLogger(__name__)
_LARGE = 1 << 22  # bytes; passes over less stay in the caches, where calls cost as much as compiling spares
_WORTH = 1 << 36  # bytes; eager passes over so many lose as much time as compiling takes, about 6 s
_FEW = 1 << 17  # bytes; a call of a compiled function takes as long as eager sums over less
LARGEST = 1 << 26  # bytes; calls of what is compiled for any shape do not count beside passes over more
_BLOCK = 25  # rows of a block that columns are reduced in
_LEAST = 8  # rows; fewer are left to eager passes
_NARROW = 32  # entries a row; as above
_HALVES = (torch.float16, torch.bfloat16)
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

_wanted: ContextVar[Compile] = ContextVar("compiled passes wanted", default="auto")
_seen = [0]  # bytes of large tensors that passed eagerly
_broken: list[str] = []  # why compiling failed on this machine; it is tried once


class compiling:  # noqa: N801  # a context manager, which a generator would make twice as slow
    """Within the block: compile every pass (``True``), none, or (``"auto"``) what changes no bit, once it has paid."""

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


def wanted() -> bool:
    """Say whether everything is to be compiled, and can be."""
    return _wanted.get() is True and not _broken and not torch.compiler.is_compiling()


def give_up(error: Exception) -> None:
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
    """Return the largest magnitude of each row (``before`` is 1) or column, as `kernels.group_max`.

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
        found = _run(passes.largest_of_row_pairs if x.dtype in _HALVES else passes.largest_of_rows, bits)
        return found if found is None else (found.to(torch.int16) if x.dtype in _HALVES else found).view(x.dtype)
    blocks, rest = row_blocks(bits)
    found = _run(passes.largest_of_column_pairs if x.dtype in _HALVES else passes.largest_of_columns, blocks)
    if found is None or rest == 0:
        return found if found is None else found.view(x.dtype)
    return torch.maximum(found.view(x.dtype), rows[-rest:].abs().amax(0))


def clamp(source: Tensor, bounds: Tensor, target: Tensor, *, one_shape: bool = False) -> bool:
    """Do what `kernels.clamp` does; say whether it was done. ``one_shape``: as in `norms`."""
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
    function = clamp_passes(pairs=pairs, in_place=in_place)
    return _run(function, bits, level, sign, *targets, one_shape=one_shape) is not None


def clamp_passes(*, pairs: bool, in_place: bool) -> Callable[..., Tensor]:
    """Return what clamps integers of floats (or of pairs of 16-bit ones) to levels, keeping the bits of ``sign``.

    Arguments: integers ``(rows, columns)``; level and sign, ``(rows, 1)`` or ``(1, columns)``; if not in place the
    target. Inductor treats a target that is the source itself differently, so there are two of each.
    """
    if in_place:
        return passes.clamp_pairs if pairs else passes.clamp
    return passes.clamp_pairs_to if pairs else passes.clamp_to


def norms(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the largest magnitude and the l1 norm of each row or column; float32 and float64 only.

    Up to 64 MiB the pass is compiled for the one shape, without guards: calls then take a third as long.

    Returns:
        Both as `largest` returns its one; the l1 norms in float64 or in the type of ``x``.
    """
    before, groups, after = x.shape
    rows = x[0] if before == 1 else x.view(before, groups * after)
    if not (_possible(rows, by_row=before == 1) and _sums_pay(x)):
        return None
    if before == 1:
        return _run(passes.norms_of_rows, rows, one_shape=True)
    blocks, rest = row_blocks(rows)
    found = _run(passes.norms_of_columns, blocks, one_shape=True)
    if found is None or rest == 0:
        return found
    last = rows[-rest:].abs()
    return torch.maximum(found[0], last.amax(0)), found[1] + last.sum(0)


def excess(x: Tensor, groups: Tensor | None, level: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return sums of what is above its level, and counts, of chosen rows or of all columns; as `norms`.

    Args:
        x: ``(before, groups, after)``.
        groups: Indices of the rows; ``None`` for columns.
        level: In the type of ``x``: one a chosen row, or one a column, ``(groups * after,)``.
    """
    rows = x[0] if groups is not None else x.view(len(x), -1)
    if level.dtype != x.dtype or not (_possible(rows, by_row=groups is not None) and _sums_pay(x)):
        return None
    if groups is not None:
        return _run(passes.excess_of_rows, rows, groups, level) if len(groups) > 1 else None
    blocks, rest = row_blocks(rows)
    found = _run(passes.excess_of_columns, blocks, level)
    if found is None or rest == 0:
        return found
    above = (rows[-rest:].abs() - level).clamp_min_(0.0)
    return found[0] + above.sum(0), found[1] + (above > 0.0).sum(0)


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


def _sums_pay(x: Tensor) -> bool:
    return _wanted.get() is True and x.dtype not in _HALVES and x.numel() * x.element_size() > _FEW


def _bits(rows: Tensor) -> Tensor | None:
    """View floats as integers, 16-bit ones in pairs; ``None`` where that does not come out even."""
    if rows.dtype not in _HALVES:
        return rows.view(_INTEGERS[rows.dtype])
    return rows.view(torch.int32) if rows.shape[1] % 2 == 0 == rows.storage_offset() % 2 else None


def row_blocks(rows: Tensor) -> tuple[Tensor, int]:
    """Return rows as ``(blocks, height, width)``, and how many rows are left over at the end, best none."""
    height = min(_BLOCK, len(rows) // 2)
    height = next((h for h in range(height, height // 2, -1) if len(rows) % h == 0), height)
    blocks = len(rows) // height
    return rows[: blocks * height].view(blocks, height, -1), len(rows) - blocks * height


def _run(function: Callable[..., Any], *tensors: Tensor, one_shape: bool = False) -> Any:
    """Call a function compiled; return ``None``, after one warning, where that fails."""
    key = function, tensors[0].dtype, torch.get_num_threads()
    begin = 0.0 if key in _known else time.perf_counter()
    try:
        if one_shape and _wanted.get() is True and tensors[0].nbytes <= LARGEST:
            return _compiled_for(function, key[2], tuple((t.dtype, t.shape) for t in tensors))(*tensors)
        if torch.is_grad_enabled():
            with torch.no_grad():
                result = _compiled(*key)(*tensors)
        else:
            result = _compiled(*key)(*tensors)
    except Exception as error:  # whatever a compiler may raise
        give_up(error)
        return None
    if begin:
        _known.add(key)
        log_seconds(f"{function.__name__} of projections ({key[1]})", begin)
    return result


def log_seconds(what: str, begin: float) -> None:
    """Log how long compiling took that began at ``begin``."""
    _log.info("Compiled %s in %.1f s.", what, time.perf_counter() - begin)


_known: set[tuple[Callable[..., Any], torch.dtype, int]] = set()  # what was logged


@functools.cache
def _compiled(function: Callable[..., Any], dtype: torch.dtype, threads: int) -> Callable[..., Any]:  # noqa: ARG001
    """Compile a function once a type and number of threads, as code of its own: others need not be looked through."""
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=True, fullgraph=True)


@functools.cache
def _compiled_for(
    function: Callable[..., Any],
    threads: int,  # noqa: ARG001
    shapes: tuple[tuple[torch.dtype, torch.Size], ...],
) -> Callable[..., Any]:
    """Compile a function of contiguous tensors for their very shapes."""
    begin, examples = time.perf_counter(), [torch.zeros(shape, dtype=dtype) for dtype, shape in shapes]
    with torch.no_grad():
        compiled: Callable[..., Any] = torch._inductor.compile(make_fx(function)(*examples), [*examples])
        compiled(*examples)
    log_seconds(f"{function.__name__} of projections ({shapes[0][0]}) for {tuple(shapes[0][1])}", begin)
    return compiled
