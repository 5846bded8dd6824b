"""Projections against a copy of the same bytes, the callback against a plain training step, shrunk models.

Ratios of the first kind are times over that of ``copy_`` (to a tensor that exists), which moves every byte once in and
once out: no in-place projection of a tensor that does not fit into the caches can come close to 1 or below, for it
reads twice. Times are CPU time of the one thread, so that other programs disturb them less.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_accel.bench.overhead_row import overhead_rows
from lightning_accel.bench.plain_projections import against_plain_torch
from lightning_accel.bench.shrink_rows import shrink_rows
from lightning_accel.evidence.rows import BenchRow
from lightning_accel.measure import compare_paired, synchronize
from lightning_accel.projection import ExactState, project_l1inf, radius_for_sparsity

_SHAPES = ((1_000, 10_000), (10_000, 10_000))
_CONVOLUTION = (512, 512, 3, 3)
_DIRECTIONS = ("rows", "columns")
_CHANNELS = ("out-channels", "in-channels")
_IN_PLACE = (1.3, 1.5)
_NEW = 3.0
_EXACT = {0.5: 5.0, 0.9: 4.0, 0.99: 2.0}
_HALF = 2.5
_THREADS = 0.6
_STEP = 1e-2  # of the entries' spread: about what Adam moves weights by in a step
_MOVED = "starts where the last call ended, for a tensor whose entries were 1 % of their spread away"
_EAGER = "nothing is compiled, as on a machine without a compiler"
_DEFAULT = "compiled, as by default once 1 GiB has passed"
Candidates = dict[str, tuple[Callable[[], object], float | None, str]]


def rows(*, quick: bool, device: str) -> Iterator[BenchRow]:
    """Yield the rows of the suite.

    Args:
        quick: Few pairs and small tensors, for a look in about a minute.
        device: To run on.
    """
    pairs = 3 if quick else 15
    compiling = _compile(device)
    # first of all, in a process as that of a fit is: not one that has held gigabytes
    fits, turns = (1, 3) if quick else (6, 20)
    yield from overhead_rows(fits=fits, turns=turns, device=device, clock=_clock(device), note=compiling)
    for shape in ((500, 2_000),) if quick else _SHAPES:
        case = f"{shape[0]:,} x {shape[1]:,}"
        few = 7 if shape[0] > 5_000 else pairs
        yield from _against_copy(case, shape, _DIRECTIONS, pairs=few, device=device, compiling=compiling)
    kernel = (64, 64, 3, 3) if quick else _CONVOLUTION
    case = f"convolution {' x '.join(map(str, kernel))}"
    yield from _against_copy(case, kernel, _CHANNELS, pairs=pairs, device=device, compiling=compiling)
    if device == "cpu" and (os.cpu_count() or 1) > 1:
        for shape in ((500, 2_000),) if quick else _SHAPES:
            yield from _two_threads(shape, pairs=pairs if shape[0] > 5_000 else 4 * pairs)
    if device == "cpu":
        yield from against_plain_torch(quick=quick, clock=_clock(device))
    yield from shrink_rows(width=256 if quick else 4096, pairs=pairs, device=device, clock=_clock(device))


def _compile(device: str) -> str:
    """Compile, as the default does once 1 GiB has passed; return what to say of that."""
    x = torch.randn(50, 1_000).to(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        project_l1inf(x, 1.0, compile=True)
    if any("Compiling" in str(w.message) for w in caught):
        return "no compiler was found, so this is eager"
    return _DEFAULT


def _clock(device: str) -> Callable[[], float]:
    return time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _over_copy(case: str, x: Tensor, candidates: Candidates, *, pairs: int, device: str) -> Iterator[BenchRow]:
    """Time candidates (with targets and notes) and a copy in turns.

    Each gets ``x`` anew, in turns as it was and moved as by an optimizer's step.
    """
    other, seconds = torch.empty_like(x), dict[str, list[float]]()
    clock = _clock(device)

    def timed(run: Callable[[], object], version: Tensor) -> float:
        x.copy_(version)
        synchronize(device)
        begin = clock()
        run()
        synchronize(device)
        return clock() - begin

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    versions = x.clone(), x + _STEP * noise
    everything = {"copy_": lambda: other.copy_(versions[0])} | {name: run for name, (run, *_) in candidates.items()}
    for i in range(pairs + 2):  # the first two start up and are not counted
        for name, run in everything.items():
            seconds.setdefault(name, []).append(timed(run, versions[i % 2]))
    seconds = {name: values[2:] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, (_, target, note) in candidates.items():
        ratio = compare_paired(seconds[name], seconds["copy_"])
        yield BenchRow(
            suite="projection",
            case=case,
            variant=name,
            baseline="copy_",
            ratio=ratio,
            seconds={"copy_": medians["copy_"], name: medians[name]},
            target=target,
            better="at most",
            note=note,
        )


def _against_copy(
    case: str, shape: tuple[int, ...], names: tuple[str, str], *, pairs: int, device: str, compiling: str
) -> Iterator[BenchRow]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for dim, name in enumerate(names):
        candidates: Candidates = {f"clone, {name}": (x.clone, None, "the floor of what allocates with torch")}
        fresh = x.clone()
        candidates |= _bilevel(x, dim, name, _IN_PLACE[dim], compiling) | _exact(x, dim, name)
        yield from _over_copy(f"{case} float32", x, candidates, pairs=pairs, device=device)
        x.copy_(fresh)
        del fresh
        half = x.bfloat16()
        candidates = _bilevel(half, dim, name, _HALF, compiling, new=False)
        yield from _over_copy(f"{case} bfloat16", half, candidates, pairs=pairs, device=device)


def _bilevel(x: Tensor, dim: int, name: str, target: float, compiling: str, *, new: bool = True) -> Candidates:
    radius = radius_for_sparsity(x, 0.5, (dim,))
    clipped = float((project_l1inf(x, radius, (dim,)) != x).float().mean())
    share = f"clears half of the groups, changes {clipped:.0%} of the entries"
    candidates: Candidates = {}
    for compile, how, goal in ((True, "", target), (False, ", eager", None)):
        note = f"{share}; {compiling if compile else _EAGER}"
        in_place = partial(project_l1inf, x, radius, (dim,), out=x, compile=compile)
        candidates[f"bi-level in place, {name}{how}"] = in_place, goal, note
        if new:
            fresh = partial(project_l1inf, x, radius, (dim,), compile=compile)
            candidates[f"bi-level new tensor, {name}{how}"] = fresh, goal and _NEW, note
    return candidates


def _exact(x: Tensor, dim: int, name: str) -> Candidates:
    candidates: Candidates = {}
    radii = {sparsity: radius_for_sparsity(x, sparsity, (dim,), "exact") for sparsity in _EXACT}
    for sparsity, target in _EXACT.items():
        run = partial(project_l1inf, x, radii[sparsity], (dim,), "exact", out=x, state=ExactState(), compile=True)
        candidates[f"exact, {sparsity:.0%} zero, {name}"] = run, target, _MOVED
    return candidates


def _two_threads(shape: tuple[int, int], *, pairs: int) -> Iterator[BenchRow]:
    """Time each way of projecting with one thread and with two, all in turns.

    Times are wall-clock times, which other programs disturb, so the turns of every row are spread over seconds.
    """
    before, counts = torch.get_num_threads(), {"one thread": 1, "two threads": 2}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    fresh = x.clone()
    ways = {
        f"two threads, bi-level in place, {name}{'' if compile else ', eager'}": partial(
            project_l1inf, x, radius_for_sparsity(x, 0.5, (dim,)), (dim,), out=x, compile=compile
        )
        for dim, name in enumerate(_DIRECTIONS)
        for compile in (True, False)
    }
    seconds: dict[str, dict[str, list[float]]] = {way: {key: [] for key in counts} for way in ways}
    try:
        for i in range(pairs + 1):
            for way, run in ways.items():
                for key, threads in counts.items():
                    torch.set_num_threads(threads)
                    x.copy_(fresh)  # wakes the threads, as the operations of a training step do
                    begin = time.perf_counter()
                    run()
                    if i:  # the first starts the threads, and compiles for them
                        seconds[way][key].append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    for (way, run), times in zip(ways.items(), seconds.values(), strict=True):
        yield BenchRow(
            suite="projection",
            case=f"{shape[0]:,} x {shape[1]:,} float32",
            variant=way,
            baseline="one thread",
            ratio=compare_paired(times["two threads"], times["one thread"]),
            seconds={
                "one thread": statistics.median(times["one thread"]),
                way: statistics.median(times["two threads"]),
            },
            target=_THREADS if run.keywords["compile"] else None,
            better="at most",
            note="wall-clock time",
        )
