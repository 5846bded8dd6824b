"""Passes over memory in machine code, where there is a C compiler: an option, never a need.

They give what the eager passes give bit for bit, so they may take over at any time: at once where the caller says so,
by default when as much memory has passed that compiling, which takes about a second, has paid. Every function returns
``None`` (or ``False``) where the eager pass is to do the work.
"""

import ctypes
import logging
import time
import warnings
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_accel.machine import CannotCompileError, load
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.kernels.c_text import MAX_THREADS, passes_text, sums_text
from lightning_accel.projection.kernels.c_thresholds import PROJECTED

Compile = bool | Literal["auto"]

_log = logging.getLogger(__name__)
_WORTH = 1 << 30  # bytes; eager passes over so many lose about as much time as compiling takes
_CALL = 1 << 16  # bytes; over so many an eager pass loses what it loses at least, for its operations
_ALONE = 1 << 18  # entries; starting threads for fewer takes longer than they save
_KINDS = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float", torch.float64: "double"}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

EVALUATIONS = 12  # of a threshold from a start near it; three are enough


class NearThreshold(NamedTuple):
    """An l1 threshold that is to be found from the one of a similar tensor.

    Attributes:
        start: That one's.
        limits: The sum of norms to reach, the least one that is close enough, what rounding may add, the radius, and
            the factor that takes the roundoff of float32 off a bound.
    """

    start: float
    limits: tuple[float, float, float, float, float]


_wanted: ContextVar[Compile] = ContextVar("compiled passes wanted", default="auto")
_seen = dict.fromkeys(_KINDS, 0)  # bytes that passed eagerly
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


def largest(x: Tensor) -> Tensor | None:
    """Return the largest magnitude of each group, as `eager.group_max`.

    Args:
        x: ``(before, groups, after)``, contiguous.

    Returns:
        ``(groups,)``.
    """
    library = _library_for(x)
    if library is None:
        return None
    out = torch.empty(x.shape[1], dtype=x.dtype)
    failed = library.largest(x.data_ptr(), out.data_ptr(), *x.shape, _threads(x))
    return None if failed else out


def clamp(source: Tensor, bounds: Tensor, target: Tensor) -> bool:
    """Do what `eager.clamp` does; say whether it was done."""
    library = _library_for(source)
    if library is None or not (bounds.is_contiguous() and _plain(target)):
        return False
    failed = library.clamp(source.data_ptr(), target.data_ptr(), bounds.data_ptr(), *source.shape, _threads(source))
    _tell_autograd(target)
    return not failed


def project_near(x: Tensor, threshold: NearThreshold) -> tuple[Tensor, Tensor, float] | None:
    """Project float32 groups in place in one call, where a similar tensor's threshold is known.

    Args:
        x: ``(before, groups, after)``, contiguous.
        threshold: What to reach, and from where.

    Returns:
        Norms of the groups before, what is left of them, both float64 ``(groups,)``, and the threshold; ``None``
        where nothing was done.
    """
    library = _library_for(x) if x.dtype == torch.float32 else None
    if library is None:
        return None
    tops, kept = torch.empty(2, x.shape[1], dtype=torch.float64).unbind()
    tau = ctypes.c_double(threshold.start)
    if not library.near(
        x.data_ptr(), tops.data_ptr(), kept.data_ptr(), *x.shape, _threads(x), *threshold.limits, ctypes.byref(tau)
    ):
        return None
    _tell_autograd(x)
    return tops, kept, tau.value


def clear_smallest(x: Tensor, cleared: int, dead: Tensor | None) -> tuple[Tensor, Tensor, float] | None:
    """Clear the float32 groups of the smallest magnitudes in place, in one call.

    Args:
        x: ``(before, groups, after)``, contiguous.
        cleared: How many, >= 1.
        dead: Boolean ``(groups,)``, groups that count as the smallest and are cleared in any case.

    Returns:
        Magnitudes before, what is left of them (infinite for all), both float64 ``(groups,)``, and the threshold;
        ``None`` where nothing was done.
    """
    library = _library_for(x) if x.dtype == torch.float32 else None
    if library is None:
        return None
    tops, left = torch.empty(2, x.shape[1], dtype=torch.float64).unbind()
    tau = ctypes.c_double()
    masked = None if dead is None else dead.contiguous()
    address = None if masked is None else masked.data_ptr()
    if not library.smallest(
        x.data_ptr(), tops.data_ptr(), left.data_ptr(), address, *x.shape, _threads(x), cleared, ctypes.byref(tau)
    ):
        return None
    _tell_autograd(x)
    return tops, left, tau.value


def can_project(x: Tensor) -> bool:
    """Whether `project` may be called for ``x``: there is code already, for plain memory of float32."""
    return torch.float32 in _loaded and not _broken and _owns_memory(x) and x.dtype == torch.float32


def project(x: Tensor, out: Tensor, sizes: tuple[int, int, int], limits: tuple[float, ...]) -> int:
    """Project float32 groups onto the ball of their largest magnitudes in one call.

    Args:
        x: One that `can_project`, dense: ``(before, groups, after)`` in memory.
        out: Of the same strides; ``x`` itself, or sharing no memory with it.
        sizes: ``before``, ``groups`` and ``after``.
        limits: As ``project_float`` in `c_thresholds` takes them.

    Returns:
        What ``project_float`` returns.
    """
    done: int = _loaded[torch.float32].project(x.data_ptr(), out.data_ptr(), *sizes, _threads(x), *limits)
    if done == PROJECTED:
        _tell_autograd(out)
    return done


def column_sums(x: Tensor, levels: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Do for float32 columns what `ordered_sums.column_sums` does."""
    sums = _sums_for(x, wide)
    if sums is None:
        return None
    rows, columns = x.shape
    totals, others = torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, dtype=wide)
    level = None if levels is None else levels.contiguous()
    address = None if level is None else level.data_ptr()
    sums.columns(x.data_ptr(), address, totals.data_ptr(), others.data_ptr(), rows, columns, _threads(x))
    return totals, others


def run_sums(
    x: Tensor, chosen: Tensor | None, levels: Tensor | None, wide: torch.dtype, sides: int
) -> tuple[Tensor, Tensor] | None:
    """Do for float32 runs what `ordered_sums.run_sums` does; the sums of each run's ``sides`` apart."""
    sums = _sums_for(x, wide)
    if sums is None:
        return None
    runs = len(x) if chosen is None else len(chosen)
    totals, others = torch.empty(runs, sides, dtype=torch.float64), torch.empty(runs, dtype=wide)
    given = [None if t is None else t.contiguous() for t in (chosen, levels)]
    addresses = [None if t is None else t.data_ptr() for t in given]
    threads = 1 if runs * x.shape[1] < _ALONE else _threads(x)
    sums.runs(x.data_ptr(), *addresses, totals.data_ptr(), others.data_ptr(), runs, x.shape[1], threads)
    return totals, others


def _tell_autograd(written: Tensor) -> None:
    """Say what machine code does not: that values which a gradient might need are gone."""
    if not written.is_inference():
        torch.autograd.graph.increment_version(written)


class _Library:
    """The passes over floats of one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        kind = _KINDS[dtype]
        infinity = torch.tensor(torch.inf, dtype=dtype)
        bits = int(infinity.view(_INTEGERS[dtype.itemsize]))
        code = load(passes_text(kind, 8 * dtype.itemsize, bits, EVALUATIONS))
        self.largest, self.clamp = code[f"largest_{kind}"], code[f"clamp_{kind}"]
        self.sums: dict[torch.dtype, _Sums] = {}  # compiled when they are needed
        address, count = ctypes.c_void_p, ctypes.c_int64
        self.largest.argtypes = [address] * 2 + [count] * 4
        self.clamp.argtypes = [address] * 3 + [count] * 4
        if dtype == torch.float32:
            number = ctypes.c_double
            self.near, self.smallest = code.project_near_float, code.clear_smallest_float
            self.near.argtypes = [address] * 3 + [count] * 4 + [number] * 5 + [address]
            self.smallest.argtypes = [address] * 4 + [count] * 5 + [address]
            self.project = code.project_float
            self.project.argtypes = [address] * 2 + [count] * 4 + [number] * 5


class _Sums:
    """The sums over float32 groups, begun in one type of numbers."""

    def __init__(self, wide: torch.dtype) -> None:
        code = load(sums_text(_KINDS[wide]))
        self.columns, self.runs = code[f"column_sums_{_KINDS[wide]}"], code[f"run_sums_{_KINDS[wide]}"]
        address, count = ctypes.c_void_p, ctypes.c_int64
        self.columns.argtypes, self.columns.restype = [address] * 4 + [count] * 3, None
        self.runs.argtypes, self.runs.restype = [address] * 5 + [count] * 3, None


def _sums_for(x: Tensor, wide: torch.dtype) -> _Sums | None:
    """Return machine code for sums over ``x`` where it is to be had and wanted."""
    library = _library_for(x) if x.dtype == torch.float32 else None
    if library is None:
        return None
    if wide not in library.sums:
        try:
            library.sums[wide] = _Sums(wide)
        except (CannotCompileError, AttributeError) as error:
            _give_up(error)
    return library.sums.get(wide)


def _library_for(x: Tensor) -> _Library | None:
    """Return machine code for ``x`` where it is to be had and wanted."""
    wanted = _wanted.get()
    if wanted is False or _broken or not _plain(x) or x.numel() == 0:
        return None
    if x.dtype not in _loaded:
        _seen[x.dtype] += x.numel() * x.element_size() + _CALL
        if wanted == "auto" and _seen[x.dtype] < _WORTH:
            return None
        _load(x.dtype)
    return _loaded.get(x.dtype)


_loaded: dict[torch.dtype, _Library] = {}


def _load(dtype: torch.dtype) -> None:
    begin = time.perf_counter()
    try:
        _loaded[dtype] = _Library(dtype)
    except (CannotCompileError, AttributeError) as error:
        _give_up(error)
        return
    _log.info("Compiled the passes of projections over %s in %.1f s.", dtype, time.perf_counter() - begin)


def _give_up(error: Exception) -> None:
    """Compile nothing from now on, and say why."""
    _broken.append(str(error))
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(
        f"Compiling projections failed, so they go on without: {first} Install a C compiler, or pass `compile=False`.",
        RuntimeWarning,
        stacklevel=3,
    )


def _plain(x: Tensor) -> bool:
    """Whether a tensor is nothing but its memory on CPU, and contiguous."""
    return x.is_contiguous() and _owns_memory(x)


def _owns_memory(x: Tensor) -> bool:
    """Whether a tensor is nothing but its memory on CPU: no wrapper of a transform, of a trace or of a subclass."""
    if type(x) not in _TYPES or placement.is_far(x) or x.is_neg() or torch.compiler.is_compiling():
        return False
    try:
        return x.data_ptr() != 0
    except RuntimeError:  # within a transform
        return False


_TYPES = (Tensor, torch.nn.Parameter)


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < _ALONE else min(torch.get_num_threads(), MAX_THREADS)
