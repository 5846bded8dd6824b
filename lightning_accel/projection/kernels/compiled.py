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
from typing import Literal

import torch
from torch import Tensor

from lightning_accel.machine import CannotCompileError, load
from lightning_accel.machine.openmp import team_of_torch
from lightning_accel.projection.kernels import placement
from lightning_accel.projection.kernels.c_text import passes_text, sums_text
from lightning_accel.projection.kernels.c_thresholds import PROJECTED

Compile = bool | Literal["auto"]

_log = logging.getLogger(__name__)
_WORTH = 1 << 30  # bytes; eager passes over so many lose about as much time as compiling takes
_CALL = 1 << 16  # bytes; over so many an eager pass loses what it loses at least, for its operations
_ALONE = 1 << 18  # entries; starting threads for fewer takes longer than they save
_KINDS = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float", torch.float64: "double"}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

EVALUATIONS = 12  # of a threshold from a start near it; three are enough


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
    out = torch.empty(x.shape[1], dtype=x.dtype, device="cpu")
    failed = library.largest(x.data_ptr(), out.data_ptr(), *x.shape, threads_for(x))
    return None if failed else out


def clamp(source: Tensor, bounds: Tensor, target: Tensor) -> bool:
    """Do what `eager.clamp` does; say whether it was done."""
    library = _library_for(source)
    if library is None or not (bounds.is_contiguous() and is_plain(target)):
        return False
    failed = library.clamp(source.data_ptr(), target.data_ptr(), bounds.data_ptr(), *source.shape, threads_for(source))
    tell_autograd(target)
    return not failed


def clear(x: Tensor, dead: Tensor, *, if_finite: bool) -> bool | None:
    """Clear dead groups in place.

    Args:
        x: ``(before, groups, after)``, contiguous.
        dead: Boolean ``(groups,)``.
        if_finite: Leave ``x`` as it is where an entry is NaN or infinite.

    Returns:
        Whether that was done; ``None`` where the eager pass is to do it.
    """
    library = _library_for(x)
    if library is None or not is_plain(dead):
        return None
    done = library.clear(x.data_ptr(), dead.data_ptr(), *x.shape, threads_for(x), if_finite)
    tell_autograd(x)
    return bool(done)


def library_for_floats() -> "_Library | None":
    """Return machine code for float32 where there is some already and it is wanted."""
    return None if _wanted.get() is False or _broken else _loaded.get(torch.float32)


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
    done: int = _loaded[torch.float32].project(x.data_ptr(), out.data_ptr(), *sizes, threads_for(x), *limits)
    if done == PROJECTED:
        tell_autograd(out)
    return done


def column_sums(x: Tensor, levels: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Do for float32 columns what `ordered_sums.column_sums` does."""
    sums = _sums_for(x, wide)
    if sums is None:
        return None
    rows, columns = x.shape
    totals, others = (torch.zeros(columns, dtype=kind, device=x.device) for kind in (torch.float64, wide))
    level = None if levels is None else levels.contiguous()
    address = None if level is None else level.data_ptr()
    sums.columns(x.data_ptr(), address, totals.data_ptr(), others.data_ptr(), rows, columns, threads_for(x))
    return totals, others


def run_sums(
    x: Tensor, chosen: Tensor | None, levels: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Do for float32 runs what `ordered_sums.run_sums` does."""
    sums = _sums_for(x, wide)
    if sums is None:
        return None
    runs = len(x) if chosen is None else len(chosen)
    totals, others = (torch.empty(runs, dtype=kind, device=x.device) for kind in (torch.float64, wide))
    given = [None if t is None else t.contiguous() for t in (chosen, levels)]
    addresses = [None if t is None else t.data_ptr() for t in given]
    threads = 1 if runs * x.shape[1] < _ALONE else threads_for(x)
    sums.runs(x.data_ptr(), *addresses, totals.data_ptr(), others.data_ptr(), runs, x.shape[1], threads)
    return totals, others


def solve_tangents(
    tangents: tuple[Tensor, Tensor, Tensor], target: float, totals: Tensor | None, guess: float
) -> tuple[float, Tensor] | None:
    """Do what `newton.solve_tangents` does; ``tangents`` are its first three arguments."""
    library = library_for_floats()
    if library is None or not all(t is None or is_plain(t) for t in (*tangents, totals)):
        return None
    groups = len(tangents[0])
    update, memory = (torch.empty(size, dtype=torch.float64, device="cpu") for size in (groups, (3, groups)))
    addresses = [None if t is None else t.data_ptr() for t in (*tangents, totals, update, memory)]
    return library.solve_tangents(*addresses, groups, target, guess), update


def has_settled(vectors: tuple[Tensor, Tensor, Tensor], theta: float, tolerance: float) -> bool | None:
    """Say what `newton` asks of new bounds, old ones and counts, float64 ``(groups,)``."""
    library = library_for_floats()
    if library is None or not all(map(is_plain, vectors)):
        return None
    return bool(library.has_settled(*(v.data_ptr() for v in vectors), len(vectors[0]), theta, tolerance))


def tell_autograd(*written: Tensor) -> None:
    """Say what machine code does not: that values which a gradient might need are gone."""
    torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])


class _Library:
    """The passes over floats of one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        kind = _KINDS[dtype]
        infinity = torch.tensor(torch.inf, dtype=dtype, device="cpu")
        bits = int(infinity.view(_INTEGERS[dtype.itemsize]))
        code = load(passes_text(kind, 8 * dtype.itemsize, bits, EVALUATIONS))
        _share_threads(code)
        self.largest, self.clamp, self.clear = (code[f"{name}_{kind}"] for name in ("largest", "clamp", "clear"))
        self.sums: dict[torch.dtype, _Sums] = {}  # compiled when they are needed
        address, count = ctypes.c_void_p, ctypes.c_int64
        self.largest.argtypes = [address] * 2 + [count] * 4
        self.clamp.argtypes = [address] * 3 + [count] * 4
        self.clear.argtypes = [address] * 2 + [count] * 4 + [ctypes.c_int]
        if dtype == torch.float32:
            number = ctypes.c_double
            self.project = code.project_float
            self.project.argtypes = [address] * 2 + [count] * 4 + [number] * 5
            self.project_parts, self.clear_parts = code.project_parts_float, code.clear_parts_float
            self.solve_tangents = code.solve_tangents
            self.solve_tangents.argtypes = [address] * 6 + [count, number, number]
            self.solve_tangents.restype = number
            self.has_settled = code.has_settled
            self.has_settled.argtypes = [address] * 3 + [count, number, number]
            self.project_parts.argtypes, self.clear_parts.argtypes = [address, count, number], [address, count]


class _Sums:
    """The sums over float32 groups, begun in one type of numbers."""

    def __init__(self, wide: torch.dtype) -> None:
        code = load(sums_text(_KINDS[wide]))
        _share_threads(code)
        self.columns, self.runs = code[f"column_sums_{_KINDS[wide]}"], code[f"run_sums_{_KINDS[wide]}"]
        address, count = ctypes.c_void_p, ctypes.c_int64
        self.columns.argtypes, self.columns.restype = [address] * 4 + [count] * 3, None
        self.runs.argtypes, self.runs.restype = [address] * 5 + [count] * 3, None


def _share_threads(code: ctypes.CDLL) -> None:
    """Let machine code run on torch's own threads where their runtime is known; else it starts some at every pass."""
    code.work_with.argtypes, code.work_with.restype = [ctypes.c_void_p], None
    code.work_with(team_of_torch())


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
    if wanted is False or _broken or not is_plain(x) or x.numel() == 0:
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


def is_plain(x: Tensor) -> bool:
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


def threads_for(x: Tensor) -> int:
    """Return how many threads share a pass over ``x``."""
    return 1 if x.numel() < _ALONE else torch.get_num_threads()
