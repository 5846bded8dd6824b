"""Passes over memory as machine code, where the machine has a C compiler: an option, never a need.

Maxima and clamps are those of the eager passes bit for bit, except that cleared rows hold +0.0 throughout. The
threshold is that of `thresholds.single_threshold` to the rounding of sums, under the same promise: feasible without
slack.
"""

import contextlib
import ctypes
import functools
import math
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.machine_code import CannotCompileError, load
from lightning_accel.projection.c_kernels import text
from lightning_accel.projection.rounding import inner_radius

Compile = Literal["auto"] | bool
_asked: ContextVar[Compile] = ContextVar("whether passes run as machine code", default="auto")
_WORTH = 1 << 16  # entries; below, eager passes take microseconds
_A_THREAD = 1 << 16  # entries that are worth starting a thread for
_NARROW = 256  # columns; fewer are worked on as if several rows were one
_WORDS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
_LONG, _AT, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
_BLOCKS = (_LONG, _LONG, _LONG, _LONG)  # before, groups, after, threads
_ARGUMENTS = {
    "max": (_AT, *_BLOCKS, _AT, _AT),
    "clamp": (_AT, _AT, *_BLOCKS, _AT, _AT, _LONG),
    "norms": (_AT, *_BLOCKS, _AT, _AT),
    "above": (_AT, *_BLOCKS, _AT, _AT, _LONG, _AT, _AT),
    "project": (_AT, _AT, *_BLOCKS, _AT, _AT, _AT, _AT, _REAL, _REAL, _LONG),
}


@contextlib.contextmanager
def compiling(asked: Compile) -> Iterator[None]:
    """Ask for machine code within the block, or for none.

    Raises:
        ValueError: If ``asked`` is neither ``"auto"`` nor a truth value.
    """
    if asked not in ("auto", True, False):
        raise ValueError(f"`compile` must be 'auto', True or False, got {asked!r}.")
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def wanted(x: Tensor) -> bool:
    """Say whether passes over contiguous ``x`` should run as machine code, which is then at hand."""
    asked = _asked.get()
    if asked is False or not _is_plain(x) or (asked == "auto" and x.numel() < _WORTH):
        return False
    reason = refusal()
    if reason is not None and asked is True:
        _warn(reason)
    return reason is None


@functools.cache
def refusal() -> str | None:
    """Return why there is no machine code; ``None`` if there is, compiled and compared with torch on a sample."""
    try:
        library = _library()
    except CannotCompileError as error:
        return str(error)
    return None if all(_agrees(library, dtype) for dtype in _WORDS) else "its results are not those of torch"


def group_max(x: Tensor) -> Tensor:
    """Do what `kernels.group_max` does, for what is `wanted`."""
    before, groups, after = x.shape
    fold = _fold(x)
    if fold > 1:
        whole = before // fold * fold
        parts = group_max(x[:whole].view(whole // fold, fold * groups, after)).view(fold, groups)
        if whole < before:
            parts = torch.cat([parts, _largest(_library(), x[whole:]).unsqueeze(0)])
        return parts.amax(0)
    return _largest(_library(), x)


def clamp(source: Tensor, bounds: Tensor, target: Tensor) -> None:
    """Do what `kernels.clamp` does, for what is `wanted`."""
    before, groups, after = source.shape
    fold = _fold(source)
    whole = before // fold * fold
    shape = (whole // fold, fold * groups, after)
    _clamp(_library(), source[:whole].view(shape), bounds.repeat(fold), target[:whole].view(shape))
    if whole < before:
        _clamp(_library(), source[whole:], bounds, target[whole:])
    _tell_autograd(target)


def group_norms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `kernels.group_norms` does, for float32 and float64 that is `wanted`; sums may overflow."""
    before, groups, after = x.shape
    width = groups if before == 1 else groups * after
    largest, total = x.new_empty(width), x.new_empty(width, dtype=torch.float64)
    run = getattr(_library(), f"norms_{_WORDS[x.dtype]}")
    run(x.data_ptr(), *x.shape, _threads(x.numel()), largest.data_ptr(), total.data_ptr())
    return largest.view(groups, -1).amax(1).double(), total.view(groups, -1).sum(1)


def excess(x: Tensor, chosen: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `kernels.excess` does, for float32 and float64 that is `wanted` and levels in its type.

    Rows are read if they are chosen; columns all together, for they share their cache lines.
    """
    before, groups, after = x.shape
    width = len(chosen)
    if before > 1 or after == 1:
        level = torch.full((groups,), torch.inf, dtype=x.dtype).index_copy_(0, chosen, level)
        level, width = level.repeat_interleave(after), groups * after
    total, count = torch.empty(2, width, dtype=torch.float64).unbind()
    level, chosen = level.contiguous(), chosen.contiguous()
    run = getattr(_library(), f"above_{_WORDS[x.dtype]}")
    places = level.data_ptr(), chosen.data_ptr(), len(chosen), total.data_ptr(), count.data_ptr()
    run(x.data_ptr(), *x.shape, _threads(x.numel()), *places)
    if before == 1 and after > 1:
        return total, count
    return total.view(groups, after).sum(1)[chosen], count.view(groups, after).sum(1)[chosen]


class Threshold(NamedTuple):
    """What a threshold found; see `thresholds.Thresholds`.

    Attributes:
        bounds: float64 ``(n,)``.
        tau: Taken off each norm.
        norm: Their sum before.
    """

    bounds: Tensor
    tau: float
    norm: float


def threshold(norms: Tensor, radius: float, terms: int) -> Threshold:
    """Do what `thresholds.single_threshold` does."""
    norms, bounds, found = norms.contiguous(), torch.empty_like(norms), (_REAL * 2)()
    target = inner_radius(radius, terms)
    _library().threshold(norms.data_ptr(), len(norms), radius, target, bounds.data_ptr(), found)
    return Threshold(bounds, found[1], found[0])


class WholeProjection:
    """Maxima, threshold and clamp of one tensor in place, in one call.

    Between the operations of a training step, whose data and code fill the caches, each small operation takes 3 us or
    more; this one call replaces some 20 of them.

    Args:
        blocks: ``(before, groups, after)``, contiguous, float32 or float64, on CPU; it stays where it is.
    """

    def __init__(self, blocks: Tensor) -> None:
        before, groups, after = blocks.shape
        self.groups = groups
        self._blocks, self._words = blocks, blocks.new_empty(groups * (2 + after))
        at = blocks.data_ptr()
        self._fixed = at, at, before, groups, after
        self._infinity, self._entries = _INFINITY[blocks.dtype], blocks.numel()
        self._call = getattr(_library(), f"project_{_WORDS[blocks.dtype]}")

    def run(self, radius: float, terms: int) -> tuple[Tensor, Threshold]:
        """Project; return the norms of the groups, float64 ``(groups,)``, and what was found.

        What holds NaN or infinity stays as it is.
        """
        tops, bounds = torch.empty(2, self.groups, dtype=torch.float64).unbind()
        found = (_REAL * 2)()
        self._call(
            *self._fixed,
            _threads(self._entries),
            self._words.data_ptr(),
            tops.data_ptr(),
            bounds.data_ptr(),
            found,
            radius,
            inner_radius(radius, terms),
            self._infinity,
        )
        _tell_autograd(self._blocks)
        return tops, Threshold(bounds, found[1], found[0])


def whole(x: Tensor) -> WholeProjection | None:
    """Return the projection in one call, where it can be had without a warning."""
    plain = _is_plain(x) and x.dtype in (torch.float32, torch.float64)
    return WholeProjection(x) if plain and refusal() is None else None


def _is_plain(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in _WORDS
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and x.is_contiguous()
        and not x.is_neg()
        and not torch.compiler.is_compiling()
    )


def _tell_autograd(x: Tensor) -> None:
    """Count as a write in place, so that a graph that saved ``x`` refuses to go backward with other numbers."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _fold(x: Tensor) -> int:
    before, groups, after = x.shape
    width = groups * after
    return max(1, min(before, 2 * _NARROW // width)) if before > 1 and width < _NARROW else 1


def _threads(entries: int) -> int:
    return max(1, min(torch.get_num_threads(), entries // _A_THREAD))


def _wide(x: Tensor) -> Tensor:
    before, groups, after = x.shape
    return x.new_empty(groups * after if before > 1 and after > 1 else 0)


def _largest(library: ctypes.CDLL, x: Tensor) -> Tensor:
    largest, wide = x.new_empty(x.shape[1]), _wide(x)
    run = getattr(library, f"max_{_WORDS[x.dtype]}")
    run(x.data_ptr(), *x.shape, _threads(x.numel()), wide.data_ptr(), largest.data_ptr())
    return largest


def _clamp(library: ctypes.CDLL, source: Tensor, bounds: Tensor, target: Tensor) -> None:
    bounds, wide = bounds.contiguous(), _wide(source)
    places = wide.data_ptr(), bounds.data_ptr(), _INFINITY[source.dtype]
    run = getattr(library, f"clamp_{_WORDS[source.dtype]}")
    run(source.data_ptr(), target.data_ptr(), *source.shape, _threads(source.numel()), *places)


@functools.cache
def _library() -> ctypes.CDLL:
    library = load(text(), keep=True)
    for name, arguments in _ARGUMENTS.items():
        for bits in (16, 32, 64) if name in ("max", "clamp") else (32, 64):
            _declare(library, f"{name}_{bits}", arguments)
    _declare(library, "threshold", (_AT, _LONG, _REAL, _REAL, _AT, _AT))
    return library


def _declare(library: ctypes.CDLL, name: str, arguments: tuple[Any, ...]) -> None:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, _LONG if name.startswith(("project", "threshold")) else None


def _agrees(library: ctypes.CDLL, dtype: torch.dtype) -> bool:
    """Compare with torch on a small tensor, of rows, columns and both, in place and not."""
    sample = torch.randn(7, 9 * 131, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for shape in ((1, 7, 9 * 131), (7, 9 * 131, 1), (7, 9, 131)):
        x = sample.view(shape)
        largest = x.abs().amax((0, 2))
        bounds = largest * torch.linspace(-0.2, 1.2, shape[1]).clamp_(0.0, 1.0).to(dtype)
        bounds[-1] = math.inf
        expected = x.clamp(-bounds.view(1, -1, 1), bounds.view(1, -1, 1))
        new, same = torch.empty_like(x), x.clone()
        _clamp(library, x, bounds, new)
        _clamp(library, same, bounds, same)
        if not (torch.equal(_largest(library, x), largest) and torch.equal(new, expected) and torch.equal(same, new)):
            return False
    return True


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"Projections go on without machine code: {reason} Install a C compiler, or do not ask for `compile`.",
        RuntimeWarning,
        stacklevel=6,
    )
